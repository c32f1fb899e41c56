"""What all ranks must agree on before they run the collectives of a step.

A rank that finds something wrong cannot stop its peers once they wait for it in a collective. So
they ask one another first, on the host: one all-reduce of 24 bytes over gloo, which waits for no
device and for no kernel. In the steady state the hosts are ahead of their devices, so it costs
no device time; a step asks before it begins and after each encoding.
"""

from __future__ import annotations

import hashlib
import weakref
from datetime import timedelta
from typing import Literal, get_args

import torch
import torch.distributed as dist

from colocc.errors import LayoutError
from colocc.runtime.groups import Use, close_groups, open_groups
from colocc.runtime.texts import agree_on

Check = Literal["first", "every", "finite"]
CHECKS: tuple[Check, ...] = get_args(Check)


def parse_check(text: str) -> Check:
    """The check that ``text`` names. Raises: LayoutError if it names none."""
    for known in CHECKS:
        if text == known:
            return known
    raise LayoutError(
        f"check {text!r} is not known: write check='every' to have each step's batch compared and "
        "errors of one rank raised on all, 'finite' to look for NaN and inf, too, or 'first' to "
        "compare the first batch alone"
    )


class Agreement:
    """All ranks' way to find out whether one of them has an error; collective to make."""

    def __init__(self, timeout: timedelta) -> None:
        self._world = weakref.ref(_world())
        self._members = tuple(range(dist.get_world_size()))
        # The ranks of the fake backend are not there to be asked.
        alone = dist.get_backend() == "fake" or len(self._members) == 1
        self._use: Use = "shared" if dist.get_backend() == "gloo" else "agreement"
        self._group: dist.ProcessGroup | None = None
        if not alone:
            opened = open_groups([self._members], timeout=timeout, use=self._use)
            self._group = opened[self._members]

    def settle(self, what: str, text: str, error: Exception | None) -> None:
        """Return if no rank has an ``error`` and all bring the same ``text``; collective.

        Raises: ``error`` itself where all ranks have the same, else a LayoutError on every rank
        alike that names the ranks with an error, or those whose ``text`` differs from rank 0's.
        """
        if self._group is None:
            if error is not None:
                raise error
            return
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        code = int.from_bytes(digest, "little")
        vote = torch.tensor([int(error is not None), code, -code], device="cpu")
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
        failed, highest, lowest = vote.tolist()
        if failed or highest != -lowest:
            agree_on(what, text, error)

    def any(self, question: bool) -> bool:
        """Whether any rank says yes; collective."""
        if self._group is None:
            return question
        answer = torch.tensor([int(question)], device="cpu")
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group)
        return bool(answer)

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            close_groups([self._members], use=self._use, world=self._world)
            self._group = None


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world

"""Between which ranks the schedule ``filled`` sends messages, and whether a GPU can keep them
apart."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from colocc.errors import LayoutError
from colocc.passes.portions import Portions
from colocc.runtime.groups import Members, Use

# Streams beside those of messages: two of computing, the current one, and the modules' own groups.
OTHERS = 12
# CUDA has no more hardware queues.
MOST_QUEUES = 32
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Link:
    """The messages of one kind in one direction: from each first rank of ``pairs`` to the second,
    in the groups ``lists``, of ``use``."""

    use: Use
    lists: tuple[Members, ...]
    pairs: Pairs

    def most(self) -> int:
        """The most pairs that any rank takes part in."""
        return max(self.of_ranks().values(), default=0)

    def of_ranks(self) -> Counter[int]:
        """How many pairs each rank takes part in."""
        return Counter(itertools.chain(*self.pairs))


def links_of(portions: Portions) -> tuple[Link, ...]:
    """All links of a program, the same on every rank; none carries messages both ways between two
    ranks, which would wait for each other."""
    pipelines = tuple(tuple(ranks) for ranks in portions.sink.groups("pp"))
    chain = tuple(pair for ranks in pipelines for pair in itertools.pairwise(ranks))
    back = tuple((after, before) for before, after in chain)
    return (
        Link("pipeline", pipelines, chain),
        Link("pipeline back", pipelines, back),
        *_both_ways(portions),
    )


def _both_ways(portions: Portions) -> Iterator[Link]:
    everyone = (tuple(range(portions.sink.size)),)
    uses: tuple[tuple[Use, Use], ...] = (
        ("embeddings up", "embeddings down"),
        ("gradients up", "gradients down"),
    )
    for (up, down), pairs in zip(uses, portions.routes(), strict=True):
        rising = tuple(pair for pair in pairs if pair[0] < pair[1])
        falling = tuple(pair for pair in pairs if pair[0] > pair[1])
        yield from [Link(use, everyone, own) for use, own in ((up, rising), (down, falling)) if own]


def check_links(portions: Portions) -> None:
    """Raises: LayoutError if work on a GPU that waits for a message may hold up work that does not.

    CUDA deals streams to CUDA_DEVICE_MAX_CONNECTIONS hardware queues, and what shares one runs in
    order. Every pair of ranks in a link has a stream on both; but if device_id was given to
    init_process_group, torch has one for all pairs of a group.
    """
    links = links_of(portions)
    streams = sum((link.of_ranks() for link in links), Counter[int]())
    rank, most = max(streams.items(), key=lambda found: (found[1], -found[0]))
    needed = most + OTHERS
    if needed > MOST_QUEUES:
        raise LayoutError(
            f"schedule 'filled' has {most} streams of messages on rank {rank} and some {OTHERS} "
            f"others, which must not wait for each other: CUDA has {MOST_QUEUES} queues. Write "
            "schedule='three_phase'."
        )
    given = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if given is None or not given.isdecimal() or int(given) < needed:
        found = "not set, which means 8" if given is None else f"set to {given!r}"
        raise LayoutError(
            f"schedule 'filled' runs on some {needed} streams that must not wait for each other, "
            f"and CUDA_DEVICE_MAX_CONNECTIONS is {found}: set it to {MOST_QUEUES} before the "
            "program starts, or write schedule='three_phase'."
        )
    world: Any = dist.group.WORLD
    if world.bound_device_id is not None and (joined := [x for x in links if x.most() > 1]):
        raise LayoutError(
            f"schedule 'filled' sends between {joined[0].most()} pairs of one rank apart, which "
            "torch joins into one queue where device_id was given to init_process_group: leave it "
            "out, or write schedule='three_phase'"
        )

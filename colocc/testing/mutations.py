"""Bugs on purpose, each one that a peer has shipped: a suite must turn red under every one.

for name in MUTATIONS:
    with mutated(program, name), pytest.raises(AssertionError):
        check(program)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from colocc.runtime import gradients, megatron, schedule
from colocc.runtime.data import Batches
from colocc.runtime.redistribution import Redistribution
from colocc.runtime.row_moves import RowRedistribution
from colocc.runtime.rows import rows_held

if TYPE_CHECKING:
    from colocc.program import Program


def _scaled(factor: Fraction) -> Callable[[Program], contextlib.AbstractContextManager[Any]]:
    """The encoders' gradients times ``factor``."""

    @contextlib.contextmanager
    def mutate(program: Program) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for move in program.redistributions.values():
                plan = replace(move.plan, scale=move.plan.scale * factor)
                stack.enter_context(mock.patch.object(move, "plan", plan))
            yield

    return mutate


def _samples_swapped(program: Program) -> contextlib.AbstractContextManager[Any]:
    """Each encoder slot takes its first and last sample in each other's place."""
    original = Batches.encoder_input

    def swapped(self: Batches, node: Any) -> Any:
        def swap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                return value
            order = list(range(value.shape[0]))
            order[0], order[-1] = order[-1], order[0]
            return value[order]

        return torch.utils._pytree.tree_map(swap, original(self, node))

    return mock.patch.object(Batches, "encoder_input", swapped)


def _microbatches_swapped(program: Program) -> contextlib.AbstractContextManager[Any]:
    """The language module reads the first microbatch's text with the last one's images."""
    original = Batches.sink_input

    def swapped(self: Batches, node: Any, microbatch: int) -> Any:
        last = len(self.microbatches) - 1
        return original(self, node, {0: last, last: 0}.get(microbatch, microbatch))

    return mock.patch.object(Batches, "sink_input", swapped)


@contextlib.contextmanager
def _group_permuted(program: Program) -> Iterator[None]:
    """What arrives from the peers of a group is joined in the reverse of their order."""
    original = Redistribution.__call__

    def reversed_parts(self: Redistribution, value: torch.Tensor, **known: Any) -> torch.Tensor:
        moved = original(self, value, **known)
        peers = max((len(step.members) for step in self.forward.steps), default=1)
        parts, dim = max(peers, 2), self.dims[0]
        if moved.shape[dim] % parts:
            return moved.flip(dim)
        return torch.cat(list(reversed(moved.chunk(parts, dim))), dim)

    with (
        mock.patch.object(Redistribution, "__call__", reversed_parts),
        mock.patch.object(RowRedistribution, "move", _reversed_rows(RowRedistribution.move)),
    ):
        yield


def _reversed_rows(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def reversed_rows(
        self: RowRedistribution, steps: Any, traffic: Any, value: torch.Tensor
    ) -> torch.Tensor:
        moved = original(self, steps, traffic, value)
        return moved.flip(0) if steps is self.forward_steps else moved

    return reversed_rows


@contextlib.contextmanager
def _zero_pad_adjoint(program: Program) -> Iterator[None]:
    """Backward keeps what this rank had itself and fills the rest with zeros, as a local narrow's
    own autograd would."""
    original = Redistribution.move

    def padded(
        self: Redistribution, direction: Any, value: torch.Tensor, sizes: tuple[int, ...]
    ) -> torch.Tensor:
        moved = original(self, direction, value, sizes)
        if direction is not self.backward:
            return moved
        own = _own_part(self, moved)
        return torch.where(own, moved, torch.zeros_like(moved))

    with (
        mock.patch.object(Redistribution, "move", padded),
        mock.patch.object(RowRedistribution, "move", _padded_rows(RowRedistribution.move)),
    ):
        yield


def _padded_rows(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def padded(
        self: RowRedistribution, steps: Any, traffic: Any, value: torch.Tensor
    ) -> torch.Tensor:
        moved = original(self, steps, traffic, value)
        if steps is self.forward_steps or self.rows is None:
            return moved
        held, read = (
            rows_held(self.plan, side, self.rows, self.rank)
            for side in (self.plan.src, self.plan.dst)
        )
        own = torch.from_numpy(np.isin(held, read)).to(moved.device)
        return moved * own[:, None]

    return padded


def _own_part(move: Redistribution, moved: torch.Tensor) -> torch.Tensor:
    """Which rows of the gradient this rank's own replica had, by their samples."""
    reads, held = move.backward.has[0], move.backward.wants[0]
    units = [u for start, stop in held for u in range(start, stop)]
    # One dim may hold the rows of all samples.
    rows = moved.shape[move.dims[0]] // len(units)
    own = [any(a <= unit < b for a, b in reads) for unit in units for _ in range(rows)]
    shape = [1] * moved.dim()
    shape[move.dims[0]] = len(own)
    return torch.tensor(own, device=moved.device).view(shape)


def _local_tokens(program: Program) -> contextlib.AbstractContextManager[Any]:
    """Each replica divides by its own token count instead of the sum over replicas."""

    def local(tokens: torch.Tensor, collection: Any) -> torch.Tensor:
        total = tokens.clone()
        dist.all_reduce(total, group=collection.mp)
        replicas: int = collection.dp_cp.size()
        scaled: torch.Tensor = total // collection.tp.size() * replicas
        return scaled

    return mock.patch.object(megatron, "global_tokens", local)


@contextlib.contextmanager
def _finalized_early(program: Program) -> Iterator[None]:
    """Gradients are reduced before the encoders' backward has run."""
    backward = schedule.Encoded.backward
    finalize = gradients.finalize
    tokens: list[Any] = []

    def hold(self: Any) -> None:
        tokens.append(self)

    def swapped(program: Program, count: Any, *, force_all_reduce: bool) -> None:
        finalize(program, count, force_all_reduce=force_all_reduce)
        backward(tokens.pop())

    with (
        mock.patch.object(schedule.Encoded, "backward", hold),
        mock.patch.object(schedule, "finalize", swapped),
    ):
        yield


MUTATIONS: dict[str, Callable[[Program], contextlib.AbstractContextManager[Any]]] = {
    "encoder gradients x0": _scaled(Fraction(0)),
    "encoder gradients x0.5": _scaled(Fraction(1, 2)),
    "encoder gradients x2": _scaled(Fraction(2)),
    "samples swapped": _samples_swapped,
    "microbatches swapped": _microbatches_swapped,
    "group permuted": _group_permuted,
    "zero-pad adjoint": _zero_pad_adjoint,
    "local token count": _local_tokens,
    "finalised before phase 3": _finalized_early,
}


def mutated(program: Program, name: str) -> contextlib.AbstractContextManager[Any]:
    """``program`` with the bug ``name`` of MUTATIONS, inside the block."""
    return MUTATIONS[name](program)

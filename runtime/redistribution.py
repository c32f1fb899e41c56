"""Run a plan: move the parts of a value between ranks, and its gradient back.

Every rank has equally many samples in a unit and equally many elements in a chunk of the sequence,
so all sizes follow from what a rank has itself. The collectives depend on the layouts alone: a rank
with zero rows takes part.
"""

from __future__ import annotations

from typing import Any

import torch

from colocc.errors import LayoutError
from colocc.passes.solve.boxes import Box, length
from colocc.passes.solve.plan import Plan
from colocc.runtime.exchange import share
from colocc.runtime.fragments import Sizes, shape_of
from colocc.runtime.steps import Direction, Groups
from colocc.sequence import check_length
from colocc.types import Type


class Redistribution:
    """A plan bound to this rank and its process groups; calling it moves a tensor.

    The result requires grad if the argument does, and its backward runs the plan's backward steps,
    on all ranks: what autograd would derive by itself would count a replicated gradient once per
    holder.

    ``dims`` are the dims of the tensor that hold the samples and, where the plan cuts it, the
    sequence. If both are one dim, it holds the rows of all samples, sample by sample.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Groups,
        rank: int,
        *,
        name: str = "redistribution",
        dims: tuple[int, ...] | None = None,
    ) -> None:
        self.plan, self.rank, self.name = plan, rank, name
        self.dims = tuple(range(_cut_dims(plan))) if dims is None else dims
        self.forward = Direction(plan.forward, plan.src, plan.dst, groups, rank)
        self.backward = Direction(plan.backward, plan.dst, plan.src, groups, rank)
        self.held = length(self.forward.has[0])
        self.wanted = length(self.forward.wants[0])

    def __call__(self, value: torch.Tensor, *, samples: int | None = None) -> torch.Tensor:
        """Return the part that this rank reads, from the part that it holds.

        ``samples`` is the number of samples that all ranks together hold; it must be given where
        one dim holds the rows of all samples and the plan cuts the sequence.
        Raises: LayoutError if the value cannot be cut, which is the same on all ranks.
        """
        sizes = self._sizes(value, samples)
        result: torch.Tensor = _Move.apply(value, self, sizes)  # type: ignore[no-untyped-call]
        return result

    def move(self, direction: Direction, value: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """What ``direction`` makes of ``value``: contiguous, and a tensor of its own."""
        fragment = self._open(value, direction.has, sizes)
        fragments = direction.run([fragment] if direction.has[0] else [], sizes, fragment)
        if direction.places is None:
            result = self._close(fragments[0])
            return result.clone() if share(result, value) else result
        result = value.new_empty(self._shape(value, direction.wants, sizes))
        whole = self._open(result, direction.wants, sizes)
        for source, target in direction.places:
            target.of([whole], sizes).copy_(source.of(fragments, sizes))
        return result

    def _sizes(self, value: torch.Tensor, samples: int | None) -> Sizes:
        """The elements of one cell along each dim of the plan."""
        plan, box = self.plan, self.forward.has
        last = max(self.dims) + ("slice" in plan.dims)
        if value.dim() <= last:
            raise LayoutError(
                f"{self.name}: a value of shape {list(value.shape)} has no dim {last}: "
                f"{plan.src.module} -> {plan.dst.module} cuts the dims "
                f"{', '.join(plan.dims)} of it. Give it {last + 1} dims at least."
            )
        sizes = [self._unit_size(value, samples)]
        if len(self.dims) == 2:
            rows = value.shape[self.dims[1]]
            if self.dims[0] == self.dims[1]:
                rows //= max(1, self.held * sizes[0])
            whole = rows * plan.grid[1] // length(box[1])
            for side in (plan.src, plan.dst):
                check_length(f"{self.name}: the value of {plan.src.module}", whole, side.layout)
            sizes.append(whole // plan.grid[1])
        if "slice" in plan.dims:
            sizes.append(self._slice_size(value.shape[-1]))
        return tuple(sizes)

    def _unit_size(self, value: torch.Tensor, samples: int | None) -> int:
        if len(self.dims) == 2 and self.dims[0] == self.dims[1]:
            return self._samples_of_unit(value.shape[self.dims[0]], samples)
        count = value.shape[self.dims[0]]
        if count % self.held:
            raise LayoutError(
                f"{self.name}: {self.plan.src.module} ({self.plan.src.layout}) made {count} rows "
                f"in dim {self.dims[0]} for {self.held} equal parts of the batch: {count} % "
                f"{self.held} = {count % self.held}. Every sample must make the same number of "
                "rows, and the step's samples must be a multiple of "
                f"{self.plan.units}."
            )
        return count // self.held

    def _samples_of_unit(self, count: int, samples: int | None) -> int:
        if samples is None or samples % self.plan.units:
            raise LayoutError(
                f"{self.name}: dim {self.dims[0]} holds the rows of all samples of the step, and "
                f"their number is {samples}: it must be given, as a multiple of {self.plan.units}."
            )
        own = samples // self.plan.units * self.held
        if count % max(1, own):
            raise LayoutError(
                f"{self.name}: {self.plan.src.module} ({self.plan.src.layout}) made {count} rows "
                f"for {own} samples: {count} % {own} = {count % own}. Every sample must make the "
                "same number of rows."
            )
        return samples // self.plan.units

    def _slice_size(self, size: int) -> int:
        slices = self.plan.grid[-1]
        if size % slices:
            raise LayoutError(
                f"{self.name}: the last dim has {size} elements, which the ranks of a node fetch "
                f"in {slices} slices: {size} % {slices} = {size % slices}. Leave out "
                "ranks_per_node."
            )
        return size // slices

    def _open(self, tensor: torch.Tensor, box: Box, sizes: Sizes) -> torch.Tensor:
        """``tensor``, which holds ``box``, with the dims of the plan first; a view."""
        dims = list(self.dims)
        if len(dims) == 2 and dims[0] == dims[1]:
            tensor = tensor.unflatten(dims[0], shape_of(box[:2], sizes[:2], ()))
            dims[1] += 1
        dims += [tensor.dim() - 1] * ("slice" in self.plan.dims)
        return tensor.movedim(dims, list(range(len(dims))))

    def _close(self, fragment: torch.Tensor) -> torch.Tensor:
        """The inverse of ``_open``, contiguous."""
        dims = list(self.dims)
        flat = len(dims) == 2 and dims[0] == dims[1]
        dims[1:] = [dims[0] + 1] if flat else dims[1:]
        dims += [fragment.dim() - 1] * ("slice" in self.plan.dims)
        tensor = fragment.movedim(list(range(len(dims))), dims)
        return (tensor.flatten(dims[0], dims[1]) if flat else tensor).contiguous()

    def _shape(self, value: torch.Tensor, box: Box, sizes: Sizes) -> list[int]:
        shape = list(value.shape)
        lengths = shape_of(box, sizes, ())
        for dim, size in zip(self.dims, lengths, strict=False):
            shape[dim] = size
        if len(self.dims) == 2 and self.dims[0] == self.dims[1]:
            shape[self.dims[0]] = lengths[0] * lengths[1]
        return shape


def tensor_dims(plan: Plan, value: Type | None) -> tuple[int, ...]:
    """Which dims of ``value`` hold the samples and, where ``plan`` cuts it, the sequence."""
    batch = value.batch if value is not None and value.batch is not None else 0
    if "sequence" not in plan.dims:
        return (batch,)
    assert value is not None and value.sequence is not None
    return (batch, value.sequence)


def _cut_dims(plan: Plan) -> int:
    return len(plan.dims) - ("slice" in plan.dims)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, owner: Redistribution, sizes: Sizes) -> torch.Tensor:
        ctx.owner, ctx.sizes = owner, sizes
        return owner.move(owner.forward, value, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        owner: Redistribution = ctx.owner
        back = owner.move(owner.backward, gradient, ctx.sizes)
        if owner.plan.scale != 1:
            back = back * float(owner.plan.scale)
        return back, None, None

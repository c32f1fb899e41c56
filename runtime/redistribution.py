"""Run a plan: move the rows of a value between ranks, and its gradient back.

One unit of a plan is ``rows`` rows of the batch dim; every rank has the same number, because tokens
per sample are uniform. The collectives depend on the layouts alone: a rank with zero rows takes
part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from colocc.errors import LayoutError
from colocc.passes.solve.plan import Plan, Step, length


class Redistribution:
    """A plan bound to this rank and its process groups; calling it moves a tensor.

    The result requires grad if the argument does, and its backward runs the plan's backward steps,
    on all ranks: what autograd would derive by itself would count a replicated gradient once per
    holder.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Mapping[tuple[int, ...], dist.ProcessGroup],
        rank: int,
        *,
        name: str = "redistribution",
        dim: int = 0,
    ) -> None:
        self.plan, self.rank, self.name, self.dim = plan, rank, name, dim
        self.forward_steps = [_BoundStep(step, groups, rank) for step in plan.forward]
        self.backward_steps = [_BoundStep(step, groups, rank) for step in plan.backward]
        self.held = length(plan.src.units()[rank])
        self.wanted = length(plan.dst.units()[rank])

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Return the rows that this rank reads, from those that it holds.

        Shapes: dim ``dim`` holds the rows of ``held`` units before and of ``wanted`` units after.
        Raises: LayoutError if the rows do not divide by the units, which is the same on all ranks.
        """
        count = value.shape[self.dim]
        if count % self.held:
            raise LayoutError(
                f"{self.name}: {self.plan.src.module} ({self.plan.src.layout}) made {count} rows "
                "in dim "
                f"{self.dim} for {self.held} equal parts of the batch: {count} % {self.held} = "
                f"{count % self.held}. Every sample must make the same number of rows."
            )
        moved: torch.Tensor = _Move.apply(value, self, count // self.held)  # type: ignore[no-untyped-call]
        return moved

    def move(self, steps: list[_BoundStep], value: torch.Tensor, rows: int) -> torch.Tensor:
        """``value`` after ``steps``; a result that no step made is ``value`` itself."""
        value = value.movedim(self.dim, 0)
        for step in steps:
            value = step(value, rows)
        return value.movedim(0, self.dim)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, owner: Redistribution, rows: int) -> torch.Tensor:
        ctx.owner, ctx.rows = owner, rows
        return _fresh(owner.move(owner.forward_steps, value, rows), value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        owner: Redistribution = ctx.owner
        back = owner.move(owner.backward_steps, gradient, ctx.rows)
        if owner.plan.scale != 1:
            back = back * float(owner.plan.scale)
        return back, None, None


def _fresh(result: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``result``, as a tensor of its own where no step made a new one."""
    shares = result.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    return result.clone() if shares else result


class _BoundStep:
    """A step with this rank's group, its place in it, and what it sends to and gets from each
    peer."""

    def __init__(
        self, step: Step, groups: Mapping[tuple[int, ...], dist.ProcessGroup], rank: int
    ) -> None:
        self.kind, self.rank = step.kind, rank
        self.keeps = step.keeps[rank] if step.keeps else ()
        self.members = step.group_of(rank) or ()
        self.group = groups[self.members] if self.members else None
        if self.group is not None:
            # new_group sorts its ranks: positions come from the group itself.
            order = dist.get_process_group_ranks(self.group)
            if tuple(order) != self.members:
                raise LayoutError(f"group {order} does not ascend like the plan's {self.members}")
        self.outgoing, self.incoming = self._traffic(step, rank)

    def _traffic(self, step: Step, rank: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Per peer in the group: the interval that this rank sends (empty: 0, 0), the units it
        gets."""
        if step.kind != "all_to_all":
            return [], []
        peers = self.members or (rank,)
        to = {peer: (start, stop) for peer, start, stop in step.sends[rank]}
        outgoing = [to.get(peer, (0, 0)) for peer in peers]
        incoming = [
            sum(stop - start for target, start, stop in step.sends[peer] if target == rank)
            for peer in peers
        ]
        return outgoing, incoming

    def __call__(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        if self.kind == "narrow":
            return _pick(value, self.keeps, rows)
        if self.kind == "all_gather":
            return self._all_gather(value)
        return self._all_to_all(value, rows)

    def _all_gather(self, value: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return value
        gathered = value.new_empty((len(self.members) * value.shape[0], *value.shape[1:]))
        dist.all_gather_into_tensor(gathered, value.contiguous(), group=self.group)
        return gathered

    def _all_to_all(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        sent = _pick(value, [cut for cut in self.outgoing if cut[1] > cut[0]], rows)
        if self.group is None:
            return sent
        received = value.new_empty((sum(self.incoming) * rows, *value.shape[1:]))
        dist.all_to_all_single(
            received,
            sent.contiguous(),
            output_split_sizes=[units * rows for units in self.incoming],
            input_split_sizes=[(stop - start) * rows for start, stop in self.outgoing],
            group=self.group,
        )
        return received


def _pick(value: torch.Tensor, intervals: Any, rows: int) -> torch.Tensor:
    """The rows of ``intervals``, joined; a view where there is one interval."""
    parts = [value.narrow(0, start * rows, (stop - start) * rows) for start, stop in intervals]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else value.narrow(0, 0, 0)

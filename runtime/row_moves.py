"""How rows move from the ranks that encode them to those that read them.

As every rank holds its rows in one order (rows.py), a step of a plan is an index_select, one
collective with splits, and an index_select. A rank without rows takes part with none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from colocc.errors import LayoutError
from colocc.passes.solve.plan import Holding, Plan, Step
from colocc.runtime.exchange import exchange
from colocc.runtime.rows import Cells, Corners, Ids, Rows, corners_of, counted, rows_held


class RowRedistribution:
    """A plan bound to this rank and its process groups, for rows that ``rows`` describes.

    Set ``rows`` before each call: every rank the same. The result requires grad if the argument
    does, and its backward runs the plan's backward steps, on all ranks.
    """

    _cells: Cells | None = None
    _traffic: tuple[list[_Traffic], list[_Traffic]] | None = None

    def __init__(
        self,
        plan: Plan,
        groups: Mapping[tuple[int, ...], dist.ProcessGroup],
        rank: int,
        *,
        name: str = "redistribution",
        empty: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        if "slice" in plan.dims:
            raise LayoutError(f"{name}: rows do not move in slices: leave out ranks_per_node")
        self.plan, self.rank, self.name, self.empty = plan, rank, name, empty
        self._source = corners_of(plan.src, rank)
        self.forward_steps = _bound(plan.forward, plan.src, groups, rank)
        self.backward_steps = _bound(plan.backward, plan.dst, groups, rank)

    @property
    def rows(self) -> Rows | None:
        """The rows of the step at hand."""
        return None if self._cells is None else self._cells.rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        if self._cells is not None and self._cells.rows.alike(rows):
            return
        self._cells, self._traffic = Cells(self.plan, rows), None
        self._held = self._cells.inside(self._source)

    def counted(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """``value`` if this rank holds so many rows, as ``counted``; without a collective."""
        assert self._cells is not None, "rows are set before the encoders run"
        who = f"{self.plan.src.module} on rank {self.rank}"
        return counted(value, self._held, self._cells.rows, who)

    def __call__(self, value: torch.Tensor | None) -> torch.Tensor:
        """Return the rows that this rank reads, by sample and position, from those it holds.

        Shapes: [rows held, ...] to [rows read, ...]. ``value`` is None where an encoder was given
        nothing at all, which is so on all ranks.
        Raises: LayoutError if the encoder made another number of rows than its samples have
        placeholders.
        """
        value, cells = self.counted(value), self._cells
        assert cells is not None
        if value is None:
            assert self.empty is not None
            value = self.empty()
        if self._traffic is None:
            self._traffic = (
                [step.traffic(cells, value.device) for step in self.forward_steps],
                [step.traffic(cells, value.device) for step in self.backward_steps],
            )
        moved: torch.Tensor = _Move.apply(value, self, *self._traffic)  # type: ignore[no-untyped-call]
        return moved

    def move(
        self, steps: list[_BoundStep], traffic: list[_Traffic], value: torch.Tensor
    ) -> torch.Tensor:
        """``value`` after ``steps``; a result that no step made is ``value`` itself."""
        for step, moved in zip(steps, traffic, strict=True):
            value = step(value, moved)
        return value

    def counts(self, rows: Rows) -> list[int]:
        """The rows of each microbatch among those that this rank reads."""
        return rows.by_microbatch(rows_held(self.plan, self.plan.dst, rows, self.rank))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        owner: RowRedistribution,
        forward: list[_Traffic],
        backward: list[_Traffic],
    ) -> torch.Tensor:
        ctx.owner, ctx.traffic = owner, backward
        result = owner.move(owner.forward_steps, forward, value)
        shares = result.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        return result.clone() if shares else result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        owner: RowRedistribution = ctx.owner
        back = owner.move(owner.backward_steps, ctx.traffic, gradients[0])
        if owner.plan.scale != 1:
            back = back * float(owner.plan.scale)
        return back, None, None, None


@dataclass(frozen=True)
class _Traffic:
    """What one step moves, for the rows at hand: the rows to send, by receiver; how many go to and
    come from each member; where each row that came stands after. None: as they are."""

    send: torch.Tensor | None
    sent: list[int]
    came: list[int]
    order: torch.Tensor | None
    even: bool


class _BoundStep:
    """A step with this rank's group and the pieces of the grid that go to and come from each
    member."""

    def __init__(
        self,
        step: Step,
        groups: Mapping[tuple[int, ...], dist.ProcessGroup],
        rank: int,
        held: Callable[[int], Corners],
    ) -> None:
        if step.adds or step.kind == "all_reduce":
            raise LayoutError(f"a {step.kind} of rows adds: a row has one reader in each replica")
        self.kind, self.rank = step.kind, rank
        self.members = step.group_of(rank) or (rank,)
        self.group = groups[self.members] if len(self.members) > 1 else None
        if self.group is not None:
            # new_group sorts its ranks: positions come from the group itself.
            order = dist.get_process_group_ranks(self.group)
            if tuple(order) != self.members:
                raise LayoutError(f"group {order} does not ascend like the plan's {self.members}")
        self.before = held(rank)
        if step.kind == "all_gather":
            self.outgoing = [self.before] * len(self.members)
            self.incoming = [held(member) for member in self.members]
        else:
            mine, theirs = step.moves.of(src=rank), step.moves.of(dst=rank)
            self.outgoing = [_ends(mine.of(dst=member)) for member in self.members]
            self.incoming = [_ends(theirs.of(src=member)) for member in self.members]

    def traffic(self, cells: Cells, device: torch.device) -> _Traffic:
        """What this step moves of the rows that ``cells`` places."""
        before = cells.inside(self.before)
        out = [cells.inside(corners) for corners in self.outgoing]
        into = [cells.inside(corners) for corners in self.incoming]
        came = np.concatenate(into)
        sent, got = ([len(rows) for rows in side] for side in (out, into))
        even = self.kind == "all_gather" and len(set(got)) == 1
        send = np.searchsorted(before, np.concatenate(out))
        plain = even or np.array_equal(send, np.arange(len(before)))
        order = np.argsort(came, kind="stable")
        return _Traffic(
            None if plain else _on(send, device),
            sent,
            got,
            None if np.array_equal(order, np.arange(len(came))) else _on(order, device),
            even,
        )

    def __call__(self, value: torch.Tensor, moved: _Traffic) -> torch.Tensor:
        sent = value if moved.send is None else value.index_select(0, moved.send)
        if self.group is not None:
            sent = self._exchange(sent.contiguous(), moved, self.group)
        return sent if moved.order is None else sent.index_select(0, moved.order)

    def _exchange(
        self, sent: torch.Tensor, moved: _Traffic, group: dist.ProcessGroup
    ) -> torch.Tensor:
        if self.kind == "send_recv":
            return self._send_recv(sent, moved, group)
        received = sent.new_empty((sum(moved.came), *sent.shape[1:]))
        if moved.even:
            dist.all_gather_into_tensor(received, sent, group=group)
        else:
            dist.all_to_all_single(received, sent, moved.came, moved.sent, group=group)
        return received

    def _send_recv(
        self, sent: torch.Tensor, moved: _Traffic, group: dist.ProcessGroup
    ) -> torch.Tensor:
        """As an all_to_all; a rank's rows to itself stay."""
        width = torch.Size(sent.shape[1:]).numel()
        parts = sent.split(moved.sent)
        own = self.members.index(self.rank)
        away = [i != own for i in range(len(self.members))]
        received = exchange(
            [[part] if far and len(low) else None
             for part, far, (low, _) in zip(parts, away, self.outgoing, strict=True)],
            [count * width if far and len(low) else None
             for count, far, (low, _) in zip(moved.came, away, self.incoming, strict=True)],
            group=group,
            kind="send_recv",
            like=sent,
        )  # fmt: skip
        before = sum(moved.came[:own]) * width
        first, last = received.split([before, received.numel() - before])
        return torch.cat([first, parts[own].reshape(-1), last]).view(-1, *sent.shape[1:])


def _ends(moves: Any) -> Corners:
    return moves.low, moves.high


def _bound(
    steps: tuple[Step, ...],
    start: Holding,
    groups: Mapping[tuple[int, ...], dist.ProcessGroup],
    rank: int,
) -> list[_BoundStep]:
    def held(index: int) -> Callable[[int], Corners]:
        """What a rank holds before step ``index``."""

        def of(rank: int) -> Corners:
            if index == 0:
                return corners_of(start, rank)
            step, before = steps[index - 1], held(index - 1)
            if step.kind != "all_gather":
                return _ends(step.moves.of(dst=rank))
            parts = [before(member) for member in step.group_of(rank) or (rank,)]
            return tuple(np.concatenate([part[side] for part in parts]) for side in (0, 1))  # type: ignore[return-value]

        return of

    return [_BoundStep(step, groups, rank, held(i)) for i, step in enumerate(steps)]


def _on(index: Ids, device: torch.device) -> torch.Tensor:
    """``index`` on the device, without waiting for it."""
    found = torch.from_numpy(np.ascontiguousarray(index))
    if device.type == "cpu":
        return found
    return found.pin_memory().to(device, non_blocking=True)

"""Rows: what encoders return when samples have different numbers of them, and how they move.

A row belongs to a sample and to the position of its placeholder in the reader's sequence. Both are
known on the host, alike on every rank, before anything runs: so are the rows that each rank holds
and needs at every step of a plan, and nothing but rows is ever sent.

Every rank holds its rows in one order, from its encoder's output to its reader's input: by sample,
in the order of the reader, and by position. So a step is an index_select, one collective with
splits, and an index_select. A rank without rows takes part with none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from colocc.errors import LayoutError
from colocc.passes.solve.boxes import pieces
from colocc.passes.solve.plan import Holding, Plan, Step
from colocc.runtime.exchange import exchange

Ids = NDArray[np.int64]
Corners = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Pieces of the grid: (low, high), each [pieces, dims]."""


@dataclass(frozen=True)
class Rows:
    """The rows of one module for all samples of a step.

    Samples are in the reader's order: all microbatches of its replica 0, then of replica 1.

    starts     [samples + 1]: sample i has the rows starts[i] to starts[i + 1]
    position   [rows]: the place of the row's placeholder in the sequence, ascending in a sample
    lengths    [samples]: the length of the sequence
    items      [items]: the rows that the encoder makes of each image or clip, in the same order
    unit       [samples]: the unit of each sample; None for equal parts, as ``units_of`` has them
    """

    replicas: int
    microbatches: int
    starts: Ids
    position: Ids
    lengths: Ids
    items: Ids
    unit: Ids | None = None

    @property
    def samples(self) -> int:
        return len(self.lengths)

    @property
    def counts(self) -> Ids:
        """The rows of each sample."""
        return np.diff(self.starts)

    def joined(self) -> Rows:
        """The same rows where all samples of a replica's microbatch are one sequence."""
        size = self.samples // (self.replicas * self.microbatches)
        before = np.arange(self.samples) % size * self.lengths
        _, owner = self.of_samples(np.arange(self.samples))
        return replace(self, position=self.position + before[owner], lengths=self.lengths * size)

    def place_of(self, sample: int) -> str:
        """What the user calls a sample."""
        per_step = self.samples // self.replicas
        replica, inside = divmod(int(sample), per_step)
        microbatch, place = divmod(inside, per_step // self.microbatches)
        place += replica * (per_step // self.microbatches)
        return f"sample {place} of microbatch {microbatch}"

    def items_of(self, samples: Ids) -> Ids:
        """How many items each of ``samples`` has."""
        ends = np.cumsum(self.items)
        first, last = (
            np.searchsorted(ends, self.starts[samples + side], side="right") for side in (0, 1)
        )
        return last - first

    def units(self, count: int) -> Ids:
        """The unit, of ``count`` in a step, of each sample."""
        return units_of(self.samples, self.replicas, count) if self.unit is None else self.unit

    def microbatch_of(self, samples: Ids) -> Ids:
        """The microbatch of each sample."""
        size = self.samples // (self.replicas * self.microbatches)
        return samples // size % self.microbatches

    def of_samples(self, samples: Ids) -> tuple[Ids, Ids]:
        """All rows of ``samples``, and the sample of each."""
        counts = self.counts[samples]
        owner = np.repeat(samples, counts)
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.starts[owner] + offset, owner

    def by_microbatch(self, rows: Ids) -> list[int]:
        """How many of ``rows`` belong to each microbatch."""
        samples = np.searchsorted(self.starts, rows, side="right") - 1
        found: list[int] = np.bincount(
            self.microbatch_of(samples), minlength=self.microbatches
        ).tolist()
        return found


def units_of(samples: int, replicas: int, units: int) -> Ids:
    """The unit of each sample of a step, in the reader's order.

    Unit u of the U units of a replica with n samples holds its samples floor(u * n / U) to
    floor((u + 1) * n / U): n need not divide by U, and a unit may be empty.
    """
    size, share = samples // replicas, units // replicas
    place = (np.arange(1, size + 1) * share - 1) // size if size else np.arange(0)
    return (np.arange(replicas)[:, None] * share + place).ravel()


def samples_in(units: Sequence[tuple[int, int]], unit_of: Ids) -> Ids:
    """The samples of some units, ascending."""
    inside = np.zeros(len(unit_of), dtype=bool)
    for start, stop in units:
        inside |= (start <= unit_of) & (unit_of < stop)
    return np.flatnonzero(inside)


class Cells:
    """Which rows lie in which cells of a plan's grid."""

    def __init__(self, plan: Plan, rows: Rows) -> None:
        self.plan, self.rows = plan, rows
        unit = rows.units(plan.units)
        self.order = np.argsort(unit, kind="stable")
        self.sorted = unit[self.order]
        self.item_starts = np.concatenate([[0], np.cumsum(rows.items)])

    def inside(self, corners: Corners) -> Ids:
        """The rows in disjoint pieces of the grid, ascending."""
        found = [self._piece(low, high) for low, high in zip(*corners, strict=True)]
        return np.sort(np.concatenate(found)) if found else np.arange(0)

    def _piece(self, low: NDArray[Any], high: NDArray[Any]) -> Ids:
        first, last = np.searchsorted(self.sorted, [low[0], high[0]])
        rows, samples = self.rows.of_samples(self.order[first:last])
        keep = np.ones(len(rows), dtype=bool)
        for dim, name in enumerate(self.plan.dims[1:], 1):
            chunks = self.plan.grid[dim]
            if low[dim] > 0 or high[dim] < chunks:
                chunk = self._chunk(name, rows, samples, chunks)
                keep &= (low[dim] <= chunk) & (chunk < high[dim])
        return rows[keep]

    def _chunk(self, dim: str, rows: Ids, samples: Ids, chunks: int) -> Ids:
        if dim == "position":
            place, length = self.rows.position[rows], self.rows.lengths[samples]
        else:
            item = np.searchsorted(self.item_starts, rows, side="right") - 1
            place, length = rows - self.item_starts[item], self.rows.items[item]
        found: Ids = place * chunks // length
        return found


def rows_held(plan: Plan, holding: Holding, rows: Rows, rank: int) -> Ids:
    """The rows that ``rank`` holds under one side of ``plan``, ascending."""
    return Cells(plan, rows).inside(_corners(holding, rank))


def _corners(holding: Holding, rank: int) -> Corners:
    found = list(pieces(holding.box(rank)))
    low, high = ([piece[side] for piece in found] for side in (0, 1))
    dims = len(holding.parts)
    return np.array(low).reshape(-1, dims), np.array(high).reshape(-1, dims)


def counted(value: torch.Tensor | None, held: Ids, rows: Rows, who: str) -> torch.Tensor | None:
    """What an encoder made, if these are as many rows as ``held``; None where it made none of none.

    A rank whose samples have no rows encodes something all the same, for the collectives in the
    encoder: it is dropped, and its gradient is zero.
    Raises: LayoutError for another number, with a sample whose placeholders do not match.
    """
    made = 0 if value is None else len(value)
    if len(held) == 0:
        return None if value is None else value[:0]
    if made != len(held):
        raise LayoutError(
            f"{who} made {made} rows, the samples that it encodes there have {len(held)} "
            f"placeholders in input_ids{_first_wrong(made, held, rows)}. Give each sample as many "
            "placeholders as its items make rows."
        )
    return value


def _first_wrong(made: int, held: Ids, rows: Rows) -> str:
    """The first sample that does not have as many placeholders as its items make rows, if these
    are equally many of each item; else the first sample."""
    samples = np.unique(np.searchsorted(rows.starts, held, side="right") - 1)
    counts, items = rows.counts[samples], rows.items_of(samples)
    if counts.sum() != len(held):  # Each rank makes a part of every item.
        return ""
    each, rest = divmod(made, int(items.sum()))
    wrong = np.flatnonzero(items * each != counts)
    first = 0 if rest else int(wrong[0])
    text = f": {rows.place_of(samples[first])} has {counts[first]} for {items[first]} items"
    return text if rest else f"{text}, which make {items[first] * each} rows"


class RowRedistribution:
    """A plan bound to this rank and its process groups, for rows that ``rows`` describes.

    Set ``rows`` before each call: every rank the same. The result requires grad if the argument
    does, and its backward runs the plan's backward steps, on all ranks.
    """

    _cells: Cells | None = None

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
        self.forward_steps = _bound(plan.forward, plan.src, groups, rank)
        self.backward_steps = _bound(plan.backward, plan.dst, groups, rank)

    @property
    def rows(self) -> Rows | None:
        """The rows of the step at hand."""
        return None if self._cells is None else self._cells.rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._cells = Cells(self.plan, rows)
        self._held = self._cells.inside(_corners(self.plan.src, self.rank))

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
        moved: torch.Tensor = _Move.apply(  # type: ignore[no-untyped-call]
            value,
            self,
            [step.traffic(cells, value.device) for step in self.forward_steps],
            [step.traffic(cells, value.device) for step in self.backward_steps],
        )
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
                return _corners(start, rank)
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

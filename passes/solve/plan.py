"""What the solver answers for one edge: frozen, printable, free of tensors and process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.solve.boxes import (
    Array,
    Box,
    Counts,
    Intervals,
    distinct,
    length,
    overlap,
    take_rows,
)
from colocc.types import Type

Kind = Literal["narrow", "all_gather", "all_to_all", "send_recv", "all_reduce"]


@dataclass(frozen=True, slots=True)
class Moves:
    """Who gives which cells to whom, sorted by sender, receiver and place.

    Shapes: ``src`` and ``dst`` [n]; ``low`` and ``high`` [n, dims]: move i carries the cells from
    low[i] to high[i], one interval for each dim. A rank keeps cells by a move to itself. In memory
    the ends of all moves in one dim lie next to each other.
    """

    src: Array
    dst: Array
    low: Array
    high: Array

    def __len__(self) -> int:
        return len(self.src)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Moves) and all(
            np.array_equal(mine, theirs)
            for mine, theirs in zip(self.arrays(), other.arrays(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(tuple(array.tobytes() for array in self.arrays()))

    def __repr__(self) -> str:
        rows = [
            f"{src}->{dst} " + ",".join(f"{a}:{b}" for a, b in zip(low, high, strict=True))
            for src, dst, low, high in zip(*(a.tolist() for a in self.arrays()), strict=True)
        ]
        return f"Moves({'; '.join(rows)})"

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """Sender, receiver, low and high."""
        return self.src, self.dst, self.low, self.high

    def cells(self) -> Counts:
        """The number of cells of each move."""
        low, high = self.low.T, self.high.T
        found: Counts = np.subtract(high[0], low[0], dtype=np.int64)
        for first, last in zip(low[1:], high[1:], strict=True):
            found *= last - first
        return found

    def pairs(self) -> tuple[Array, Array]:
        """Each sender and receiver of anything once, in order."""
        src, dst = self.src, self.dst
        first = np.ones(len(src), dtype=bool)
        first[1:] = (src[1:] != src[:-1]) | (dst[1:] != dst[:-1])
        index = np.flatnonzero(first)
        return src.take(index), dst.take(index)

    def select(self, keep: NDArray[np.bool_]) -> Moves:
        """The moves at the true places of ``keep``."""
        return self._take(np.flatnonzero(keep))

    def _take(self, index: Counts) -> Moves:
        return Moves(
            self.src.take(index),
            self.dst.take(index),
            take_rows(self.low, index),
            take_rows(self.high, index),
        )

    def of(self, *, src: int | None = None, dst: int | None = None) -> Moves:
        """The moves from one rank, or to one."""
        keep = np.ones(len(self), dtype=bool)
        if src is not None:
            keep &= self.src == src
        if dst is not None:
            keep &= self.dst == dst
        return self.select(keep)

    @classmethod
    def make(
        cls, src: Counts | Array, dst: Counts | Array, low: Counts | Array, high: Counts | Array
    ) -> Moves:
        """The moves in their order; arrays of any integer dtype."""
        columns = (np.ascontiguousarray(a.T, dtype=np.int32).T for a in (src, dst, low, high))
        found = cls(*columns)
        order = _order(found.src, found.dst, found.low)
        return found if order is None else found._take(order)

    @classmethod
    def none(cls, dims: int) -> Moves:
        empty = np.empty((0, dims), dtype=np.int32)
        return cls(empty[:, 0], empty[:, 0], empty, empty)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan, for all ranks: from what each holds before it to what it holds after.

    narrow      each rank keeps the cells of its moves to itself; nothing is communicated.
    all_gather  every member of a group gets everything that each member holds; a rank in no group
                keeps what it has. It has no moves.
    all_to_all  every rank ends with exactly what is moved to it, by itself or by a member of its
                group, in one collective of the group.
    send_recv   the same, where no rank sends to or receives from more than one other.
    all_reduce  every member of a group ends with the sum of what the members hold, which is the
                same cells. It has no moves.

    ``groups`` are the sets of ranks that communicate, each ascending, in order of their first rank.
    ``adds``: what arrives for one cell from several ranks is summed.
    """

    kind: Kind
    groups: tuple[tuple[int, ...], ...] = ()
    moves: Moves = field(default_factory=lambda: Moves.none(1))
    adds: bool = False

    def group_of(self, rank: int) -> tuple[int, ...] | None:
        return next((group for group in self.groups if rank in group), None)


@dataclass(frozen=True, slots=True)
class Part:
    """How one dim is cut: ``cuts[i]`` are the cells of the ranks whose coordinates on ``axes`` make
    the number i, the first axis counting fastest. No axes: every rank has ``cuts[0]``."""

    axes: tuple[str, ...]
    cuts: tuple[Intervals, ...]

    def index(self, layout: Layout) -> Counts:
        """The number i of every rank."""
        found = np.zeros(layout.size, dtype=np.int64)
        scale = 1
        for axis in self.axes:
            found += scale * layout.coordinates(axis)
            scale *= layout.sizes[axis]
        return found


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds which cells: the product of ``parts``, one for each dim, on ranks of ``stages``.

    ``stages`` are the pipeline coordinates that hold them, None for all; every rank of another
    stage holds nothing. ``partial`` are axes whose ranks hold the same cells, and each a summand of
    their gradient.
    """

    module: str
    layout: Layout
    parts: tuple[Part, ...]
    stages: tuple[int, ...] | None = None
    partial: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[Intervals, ...]:
        """The units of each dp coordinate."""
        return self.parts[0].cuts

    def holds(self) -> NDArray[np.bool_]:
        """Whether each rank is on a stage that holds anything."""
        if self.stages is None:
            return np.ones(self.layout.size, dtype=bool)
        return np.isin(self.layout.coordinates("pp"), self.stages)

    def boxes(self) -> list[Box]:
        """The box of every rank, () for a rank that holds nothing."""
        indices = [part.index(self.layout).tolist() for part in self.parts]
        return [
            tuple(part.cuts[i] for part, i in zip(self.parts, place, strict=True)) if holds else ()
            for holds, *place in zip(self.holds().tolist(), *indices, strict=True)
        ]

    def box(self, rank: int) -> Box:
        """The box of one rank."""
        if not self.holds()[rank]:
            return ()
        return tuple(part.cuts[int(part.index(self.layout)[rank])] for part in self.parts)

    def units(self) -> tuple[Intervals, ...]:
        """The units of samples that each rank holds."""
        return tuple(box[0] if box else () for box in self.boxes())

    def cells(self) -> Counts:
        """The number of cells that each rank holds."""
        count = np.ones(self.layout.size, dtype=np.int64)
        for part in self.parts:
            sizes = [length(cut) for cut in part.cuts]
            if min(sizes) == max(sizes):
                count *= sizes[0]
            else:
                count *= np.array(sizes, dtype=np.int64)[part.index(self.layout)]
        found: Counts = np.where(self.holds(), count, 0)
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """How one value gets from ``src`` to ``dst``, and its gradient back.

    ``grid`` is the number of cells in each of ``dims``. ``scale`` multiplies the gradient on its
    way back: the modules' own gradient reductions differ (an average over another number of
    replicas, or a sum), and the product must be one. ``where`` are the solved relations between the
    coordinates of both sides. ``value`` is the type of the source's value, where it is known.
    ``reasons`` say why a direction takes more than one collective, or more bytes than its bound.
    ``ranks_per_node`` are the nodes that it spares, None where it was solved without.
    """

    src: Holding
    dst: Holding
    dims: tuple[str, ...]
    grid: tuple[int, ...]
    kind: Literal["fan_in", "fan_out", "equal"]
    ratio: Fraction
    where: tuple[str, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    scale: Fraction = Fraction(1)
    value: Type | None = None
    reasons: tuple[str, ...] = ()
    ranks_per_node: int | None = None

    @property
    def units(self) -> int:
        return self.grid[0]

    @property
    def moves(self) -> bool:
        """Whether anything is left to do: a plan without steps and scale is no redistribution."""
        return bool(self.forward or self.backward or self.scale != 1)

    def member_lists(self) -> tuple[tuple[int, ...], ...]:
        """Every set of ranks that communicates, in the order of first use."""
        steps = self.forward + self.backward
        return tuple(dict.fromkeys(group for step in steps for group in step.groups))

    def received_cells(self) -> tuple[Counts, Counts]:
        """Cells that each rank receives from other ranks, forward and backward.

        An all_reduce of n ranks counts as the best known: 2 * (n - 1) / n of what is reduced,
        rounded up.
        """
        return received(self.forward, self.src), received(self.backward, self.dst)

    def bound_cells(self) -> tuple[Counts, Counts]:
        """The least that each rank must receive, |need minus have| in cells, forward and backward.

        A cell whose gradient has summands on other ranks must be received once at least, even by a
        rank that has a summand of its own.
        """
        return _missing(self.src, self.dst), _missing(self.dst, self.src)

    def received(self) -> tuple[list[int], list[int]]:
        """Bytes that each rank receives for one step's batch of the type's size, forward and
        backward.

        Raises: LayoutError if the plan was solved for no type of known size.
        """
        forward, backward = self.received_cells()
        return self._bytes(forward), self._bytes(backward)

    def bound(self) -> tuple[list[int], list[int]]:
        """The lower bound of ``received``, in bytes."""
        forward, backward = self.bound_cells()
        return self._bytes(forward), self._bytes(backward)

    def cell_bytes(self) -> Fraction | None:
        """Bytes of a cell of the value, None where its size is not known.

        With the dim position, the mean: how many rows a chunk has is for the batch to say.
        """
        value = self.value
        if value is None or value.batch is None or value.bytes_per_sample() is None:
            return None
        total = (value.bytes_per_sample() or 0) * value.dims[value.batch].samples
        return Fraction(total, prod(self.grid))

    def _bytes(self, cells: Counts) -> list[int]:
        size = self.cell_bytes()
        if size is None:
            raise LayoutError(
                f"the bytes of {self.src.module} -> {self.dst.module} depend on the size of its "
                "value, which is not known: solve it for a type such as bf16[8@dp,576,4096]"
            )
        return [int(count * size) for count in cells.tolist()]

    def simulate(
        self,
        shards: Sequence[np.ndarray],
        *,
        backward: bool = False,
        tensor_dims: tuple[int, ...] | None = None,
    ) -> list[np.ndarray]:
        """What every rank ends with, from what every rank holds (see simulate.py)."""
        from colocc.passes.solve.simulate import simulate

        return simulate(self, shards, backward=backward, tensor_dims=tensor_dims)


def _order(src: Array, dst: Array, low: Array) -> Counts | None:
    """The order by sender, receiver and place, None where that is theirs; one key where it fits
    into 63 bits, which sorts much faster."""
    keys = [src, dst, *low.T]
    sizes = [int(key.max(initial=0)) + 1 for key in keys]
    if prod(sizes) >= 1 << 62:
        return np.lexsort(keys[::-1])
    key = src.astype(np.int64)
    for part, size in zip(keys[1:], sizes[1:], strict=True):
        key *= size
        key += part
    if (key[1:] >= key[:-1]).all():
        return None
    return key.argsort(kind="stable")


def received(steps: tuple[Step, ...], start: Holding) -> Counts:
    """Cells that each rank receives from other ranks in ``steps``, from what ``start`` says."""
    have = start.cells()
    got = np.zeros(len(have), dtype=np.int64)
    for step in steps:
        if step.kind in ("all_gather", "all_reduce"):
            for group in step.groups:
                members = np.array(group)
                total, size = int(have[members].sum()), len(group)
                if step.kind == "all_gather":
                    got[members] += total - have[members]
                    have[members] = total
                else:
                    got[members] += -(-2 * (size - 1) * have[members] // size)
            continue
        cells, moves = step.moves.cells(), step.moves
        after = np.zeros(len(have), dtype=np.int64)
        np.add.at(after, moves.dst, cells)
        other = moves.src != moves.dst
        np.add.at(got, moves.dst[other], cells[other])
        have = after
    return got


def _missing(have: Holding, need: Holding) -> Counts:
    """|need minus have| of every rank: the volume of its need less what it has of it."""
    common = np.ones(need.layout.size, dtype=np.int64)
    for left, right in zip(have.parts, need.parts, strict=True):
        pairs, where = distinct(left.index(have.layout), right.index(need.layout))
        shared = [overlap(left.cuts[i], right.cuts[j]) for i, j in pairs.T.tolist()]
        common *= np.array(shared, dtype=np.int64)[where]
    alone = prod(have.layout.sizes[axis] for axis in have.partial) == 1
    own = have.holds() & alone
    return np.where(need.holds(), need.cells() - np.where(own, common, 0), 0)

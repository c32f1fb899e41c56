"""What every rank holds at either end of a plan, from the definition of its layout.

Written apart from the planner: ranks are counted here, the sequence is cut here, and a plan's own
words about its ends are only compared with the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import gcd, lcm, prod

import numpy as np
from numpy.typing import NDArray

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes.solve.boxes import Array, Intervals
from colocc.passes.solve.plan import Holding, Part

Ints = NDArray[np.int64]
CUT = {
    "sequence": (True, True),
    "row": (True, False),
    "position": (False, True),
    "slice": (False, False),
}
"""Whether the source's and the reader's layout cut a dim."""
ALL_DIMS = (
    ("sample",),
    ("sample", "sequence"),
    ("sample", "position"),
    ("sample", "row", "position"),
)


@lru_cache(maxsize=4096)
def coordinate(layout: Layout, axis: str) -> Ints:
    """The coordinate of every rank on ``axis``: the first axis of the order turns fastest."""
    found: Ints = np.arange(layout.size) // _stride(layout, axis) % getattr(layout, axis)
    found.flags.writeable = False
    return found


def _stride(layout: Layout, axis: str) -> int:
    faster = layout.order.split("-")[: layout.order.split("-").index(axis)]
    return prod(getattr(layout, name) for name in faster if name != "ep")


@lru_cache(maxsize=4096)
def sequence(layout: Layout) -> tuple[int, tuple[Intervals, ...]]:
    """The fewest equal chunks that show every border of the layout's cut, and the chunks of each
    part; part tp + lanes * cp is held at these coordinates, lanes being tp where it cuts, else 1.

    By definition: rank c of cp has the c-th of cp equal chunks, with zigzag the chunks c and
    2 * cp - 1 - c of 2 * cp; with sp, rank t of tp has the t-th of tp equal shares of that.
    """
    lanes = layout.tp if layout.sp else 1
    # Half a share is the smallest piece that can occur: a chunk of 2 * cp holds ``lanes`` of them.
    total = 2 * layout.cp * lanes
    parts = []
    for cp in range(layout.cp):
        pair = (2 * cp, 2 * cp + 1)
        if layout.zigzag:
            pair = (cp, 2 * layout.cp - 1 - cp)
        held = [lanes * chunk + i for chunk in pair for i in range(lanes)]
        parts += [_runs(held[2 * tp : 2 * tp + 2]) for tp in range(lanes)]
    unit = gcd(total, *(edge for part in parts for run in part for edge in run))
    shrunk = tuple(tuple((a // unit, b // unit) for a, b in part) for part in parts)
    return total // unit, shrunk


def _runs(numbers: list[int]) -> Intervals:
    """Ascending numbers as intervals."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    listed = [[number for _, number in run] for _, run in runs]
    return tuple((run[0], run[-1] + 1) for run in listed)


@lru_cache(maxsize=4096)
def cutting_axes(layout: Layout) -> tuple[str, ...]:
    """The axes over which the sequence is cut, fastest first."""
    over = {"tp": layout.sp and layout.tp > 1, "cp": layout.cp > 1}
    return tuple(axis for axis, cuts in over.items() if cuts)


def expected_grid(src: Layout, dst: Layout, sink: Layout, dims: tuple[str, ...]) -> tuple[int, ...]:
    """The coarsest grid that both ends, and the order of the sink's samples, can be cut from."""
    grid = [lcm(src.dp, dst.dp, sink.dp)]
    for dim in dims[1:]:
        sides = zip((src, dst), CUT[dim], strict=True)
        grid.append(lcm(*(sequence(layout)[0] for layout, cuts in sides if cuts)))
    return tuple(grid)


def check_holding(
    holding: Holding, side: int, dims: tuple[str, ...], grid: tuple[int, ...], *, ordered: bool
) -> None:
    """Raise VerifyError unless ``holding``, at ``side`` 0 (source) or 1 (reader), says what its
    layout says. The slots of samples are free where they are not ``ordered``, but equally long."""
    try:
        _check_holding(holding, side, dims, grid, ordered=ordered)
    except VerifyError as error:
        raise VerifyError(f"{holding.module} ({holding.layout}) {error}") from error


def _check_holding(
    holding: Holding, side: int, dims: tuple[str, ...], grid: tuple[int, ...], *, ordered: bool
) -> None:
    layout = holding.layout
    if len(holding.parts) != len(dims):
        raise VerifyError(f"has parts for {len(holding.parts)} dims of {list(dims)}")
    _check_slots(holding.parts[0], layout.dp, grid[0], ordered=ordered)
    for dim, cells, part in zip(dims[1:], grid[1:], holding.parts[1:], strict=True):
        want = _expected(layout, cells) if CUT[dim][side] else _whole(cells)
        if part != want:
            raise VerifyError(f"is said to hold of {dim} {part}, its layout says {want}")
    stages = (0,) if side == 1 and layout.pp > 1 else None
    if holding.stages != stages:
        raise VerifyError(f"is said to be held by stages {holding.stages}, not {stages}")
    whole = side == 1 and layout.cp > 1 and not {"sequence", "position"} & set(dims)
    if holding.partial != (("cp",) if whole else ()):
        raise VerifyError(f"is said to have partial gradients over {holding.partial}")


@lru_cache(maxsize=1024)
def _expected(layout: Layout, cells: int) -> Part:
    """How a layout cuts a dim of ``cells``."""
    if not cutting_axes(layout):
        return _whole(cells)
    chunks, cuts = sequence(layout)
    scale = cells // chunks
    return Part(
        cutting_axes(layout),
        tuple([tuple([(a * scale, b * scale) for a, b in cut]) for cut in cuts]),
    )


def _whole(cells: int) -> Part:
    return Part((), (((0, cells),),))


def _check_slots(part: Part, dp: int, units: int, *, ordered: bool) -> None:
    if part.axes != ("dp",) or len(part.cuts) != dp:
        raise VerifyError(f"has {len(part.cuts)} slots over {part.axes}, not {dp} over dp")
    size = units // dp
    slot, low, high = _runs_of(part)
    order = low.argsort(kind="stable")
    begin, end = [*low[order].tolist(), units], [0, *high[order].tolist()]
    if begin != end or (low >= high).any():
        raise VerifyError(f"has slots that do not cut the units 0 to {units - 1}")
    if (np.bincount(slot, high - low, dp) != size).any():
        raise VerifyError(f"has slots that are not {dp} times {size} units")
    # Runs of one slot ascend with a gap between them, so each slot has one spelling.
    if ((slot[1:] == slot[:-1]) & (low[1:] <= high[:-1])).any():
        raise VerifyError("has a slot whose runs are not in ascending order, joined")
    if ordered and low.tolist() != [slot * size for slot in range(dp)]:
        raise VerifyError(f"orders the samples, and its slots are {part.cuts}")


@dataclass(frozen=True, slots=True)
class End:
    """What the ranks hold at one end.

    Rank r holds the pieces of box ``place[r]``, nothing where that is -1. Piece i belongs to the
    box ``owner[i]`` and reaches from ``low[i]`` to ``high[i]``; pieces come by owner. Of the
    gradient, rank r has summand ``summand[r]`` of ``summands``. ``lane[r]`` is how many ranks r
    lies behind the one that has coordinate 0 on all axes over which the value is replicated.

    Shapes: place, summand, lane [ranks]; owner [pieces]; low, high [pieces, dims].
    """

    place: Ints
    owner: Ints
    low: Array
    high: Array
    summand: Ints
    summands: int
    lane: Ints

    @classmethod
    def of(cls, holding: Holding) -> End:
        """The end that a holding describes whose parts are those of its layout."""
        places = _places(
            holding.layout,
            tuple([(part.axes, len(part.cuts)) for part in holding.parts]),
            holding.stages,
            holding.partial,
        )
        runs = [_runs_of(part) for part in holding.parts]
        sizes = [len(index) for index, _, _ in runs]
        owner = np.zeros(prod(sizes), dtype=np.int64)
        low, high = np.empty((2, len(runs), len(owner)), dtype=np.int32)
        row, boxes = np.arange(len(owner)), 1
        for dim, (index, first, last) in enumerate(runs):
            # The first dim turns fastest, as the numbers of boxes do.
            turn = row % sizes[dim]
            owner += boxes * index[turn]
            low[dim], high[dim] = first[turn], last[turn]
            row, boxes = row // sizes[dim], boxes * len(holding.parts[dim].cuts)
        order = owner.argsort(kind="stable")
        return cls(
            place=places.place,
            owner=owner[order],
            low=low[:, order].T,
            high=high[:, order].T,
            summand=places.summand,
            summands=places.summands,
            lane=places.lane,
        )


def _runs_of(part: Part) -> tuple[Ints, Ints, Ints]:
    """Every run of a dim, by cut: the number of the cut, start and stop."""
    rows = [(index, *run) for index, cut in enumerate(part.cuts) for run in cut]
    index, first, last = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return index, first, last


@dataclass(frozen=True, slots=True)
class _Places:
    """What End says of ranks, whatever their boxes are."""

    place: Ints
    summand: Ints
    summands: int
    lane: Ints


@lru_cache(maxsize=512)
def _places(
    layout: Layout,
    parts: tuple[tuple[tuple[str, ...], int], ...],
    stages: tuple[int, ...] | None,
    partial: tuple[str, ...],
) -> _Places:
    """The places on a layout of parts over these axes, of so many cuts."""
    place = np.zeros(layout.size, dtype=np.int64)
    boxes = 1
    for axes, cuts in parts:
        place += boxes * number(layout, axes)
        boxes *= cuts
    if stages is not None:
        place[~np.isin(coordinate(layout, "pp"), stages)] = -1
    used = {axis for axes, _ in parts for axis in axes} | set(partial)
    used |= {"pp"} if stages is not None else set()
    found = _Places(
        place,
        number(layout, partial),
        prod(getattr(layout, axis) for axis in partial),
        _offset(layout, {"tp", "cp", "pp", "dp"} - used),
    )
    for array in (found.place, found.summand, found.lane):
        array.flags.writeable = False
    return found


def _offset(layout: Layout, axes: set[str]) -> Ints:
    found = np.zeros(layout.size, dtype=np.int64)
    for axis in axes:
        found += _stride(layout, axis) * coordinate(layout, axis)
    return found


def number(layout: Layout, axes: tuple[str, ...]) -> Ints:
    """One number for the coordinates of every rank on ``axes``, the first counting fastest."""
    found = np.zeros(layout.size, dtype=np.int64)
    scale = 1
    for axis in axes:
        found += scale * coordinate(layout, axis)
        scale *= getattr(layout, axis)
    return found

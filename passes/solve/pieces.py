"""What moves on an edge: pieces that each have one owner and one reader; and the places of ranks.

Places depend on axes alone, so they are kept from one edge to the next.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from colocc.layout import Layout
from colocc.passes.solve.boxes import Array, Counts
from colocc.passes.solve.plan import Holding, Part


@lru_cache(maxsize=256)
def elementary(left: Part, right: Part) -> tuple[Counts, Counts, Counts, Counts]:
    """One dim cut at all borders of both sides: low, high, owner on the left and on the right."""
    (starts, ends, owner), (more, _, reader) = _runs(left), _runs(right)
    # Runs lie next to each other, so a border is where one starts, or the end of the last.
    low = np.union1d(starts, more)
    return (
        low,
        np.append(low[1:], ends[-1:]),
        owner[starts.searchsorted(low, side="right") - 1],
        reader[more.searchsorted(low, side="right") - 1],
    )


def _runs(part: Part) -> tuple[Counts, Counts, Counts]:
    """Every run of a dim in order: start, stop, and whose it is."""
    rows = sorted([(a, b, index) for index, cut in enumerate(part.cuts) for a, b in cut])
    starts, stops, owner = np.array(rows, dtype=np.int64).T
    return starts, stops, owner


@dataclass(frozen=True, slots=True)
class Pieces:
    """The product of the elementary intervals of all dims, each with its owner among those who have
    it and its reader among those who need it.

    Shapes: low, high [n, dims]; owner, reader [n].
    """

    low: Array
    high: Array
    owner: Counts
    reader: Counts

    def turned(self) -> Pieces:
        """The same pieces on their way back."""
        return Pieces(self.low, self.high, self.reader, self.owner)


def pieces_of(have: Holding, need: Holding) -> Pieces:
    """The pieces that go from ``have`` to ``need``."""
    dims = [elementary(*parts) for parts in zip(have.parts, need.parts, strict=True)]
    sizes = [len(low) for low, _, _, _ in dims]
    low, high = np.empty((2, len(dims), *sizes), dtype=np.int32)
    owner, reader = np.zeros((2, *sizes), dtype=np.int64)
    left_scale = right_scale = 1
    for dim, (starts, stops, left, right) in enumerate(dims):
        # The last dim turns fastest.
        across = (-1, *(1 for _ in sizes[dim + 1 :]))
        low[dim], high[dim] = starts.reshape(across), stops.reshape(across)
        owner += left_scale * left.reshape(across)
        reader += right_scale * right.reshape(across)
        left_scale *= len(have.parts[dim].cuts)
        right_scale *= len(need.parts[dim].cuts)
    rows = (len(dims), -1)
    return Pieces(low.reshape(rows).T, high.reshape(rows).T, owner.ravel(), reader.ravel())


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a holding are, whatever their cuts.

    ``index`` is one number for the place of each rank in the product of the parts, ``holds``
    whether its stage holds anything. The rank that has what place i has, on the lane of reader r,
    is base[i] + lane[r]: the coordinates of i on the axes of the parts, the reader's own on all
    others; a stage that holds nothing stands for the first that does.
    """

    index: Counts
    holds: NDArray[np.bool_]
    base: Counts
    lane: Counts


def places_of(holding: Holding) -> Places:
    axes = tuple([part.axes for part in holding.parts])
    return _places_on(holding.layout, axes, holding.stages, holding.partial)


@lru_cache(maxsize=512)
def _places_on(
    layout: Layout,
    parts: tuple[tuple[str, ...], ...],
    stages: tuple[int, ...] | None,
    partial: tuple[str, ...],
) -> Places:
    index = np.zeros(layout.size, dtype=np.int64)
    lane = np.zeros(layout.size, dtype=np.int64)
    base = np.zeros(1, dtype=np.int64)
    holds = np.ones(layout.size, dtype=bool)
    if stages is not None:
        holds = np.isin(layout.coordinates("pp"), stages)
    for axis in itertools.chain(*parts):
        # The first axis turns fastest, in a part and among the parts.
        index += len(base) * layout.coordinates(axis)
        steps = np.arange(layout.sizes[axis]) * layout.stride(axis)
        base = np.add.outer(steps, base).ravel()
    for axis in set(layout.sizes) - {*itertools.chain(*parts), *partial}:
        coordinate = layout.coordinates(axis)
        if axis == "pp" and stages is not None:
            coordinate = np.where(holds, coordinate, stages[0])
        lane += coordinate * layout.stride(axis)
    return Places(index, holds, base, lane)

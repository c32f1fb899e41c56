"""Which cells each owner has, as a list of *pieces*: boxes of one interval for each dim.

Two lists of boxes are the same function (how often is each cell held?) exactly if the signed
corners of one are those of the other: the corners of a box are its function differentiated once in
every dim. So "each cell once" is one comparison of sorted corners, whatever way the cells came.
Where few borders cut the boxes, their parts between borders are fewer, and tell the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np
from numpy.typing import NDArray

from colocc.errors import VerifyError
from colocc.passes.solve.boxes import take_rows
from colocc.passes.solve.ends import Ints

Ends = NDArray[np.integer]
Side = tuple[Ints, Sequence[Ends], Sequence[Ends]]
"""The owners of pieces, and by dim two numbers of each: low and high, or low and length."""
# Rows that are met at a time: their columns stay in a core's cache.
BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Pieces:
    """Boxes: piece i belongs to ``owner[i]`` and reaches from ``low[i]`` to ``high[i]``.

    Shapes: owner [n]; low, high [n, dims], of any integer dtype. Work goes by dim, so the ends of
    all pieces in one dim lie next to each other in memory.
    """

    owner: Ints
    low: Ends
    high: Ends

    def cells(self) -> Ints:
        """The cells of each piece."""
        return cells_of(self.low, self.high)

    def total(self, owners: int) -> Ints:
        """The cells of each owner."""
        return added(self.owner, self.cells(), owners)

    def take(self, index: Ints, owner: Ints) -> Pieces:
        """The pieces at ``index``, given to other owners."""
        return Pieces(owner, take_rows(self.low, index), take_rows(self.high, index))

    def of(self, owner: int) -> Pieces:
        keep = np.flatnonzero(self.owner == owner)
        return self.take(keep, self.owner[keep])

    def first_dims(self, dims: int) -> Pieces:
        """The same pieces in their first dims."""
        return Pieces(self.owner, self.low[:, :dims], self.high[:, :dims])


def cells_of(low: Ends, high: Ends) -> Ints:
    """The cells of boxes from ``low`` to ``high``, each [n, dims]."""
    found: Ints = np.subtract(high[:, 0], low[:, 0], dtype=np.int64)
    for first, last in zip(low.T[1:], high.T[1:], strict=True):
        found *= last - first
    return found


def with_summands(pieces: Pieces, first: Ints | int, last: Ints | int) -> Pieces:
    """The same pieces with summands from first to last; arrays give these of each owner."""
    rows, dims = pieces.low.shape
    low, high = np.empty((2, dims + 1, rows), dtype=np.int64)
    low[:dims], high[:dims] = pieces.low.T, pieces.high.T
    low[dims] = first if isinstance(first, int) else first[pieces.owner]
    high[dims] = last if isinstance(last, int) else last[pieces.owner]
    return Pieces(pieces.owner, low.T, high.T)


def join(keys: Ints, owner: Ints) -> tuple[Ints, Ints]:
    """All (i, j) with keys[i] == owner[j], by i, then j; ``owner`` ascends."""
    first, count = _ranges(keys, owner)
    return _pairs(first, count)


def _ranges(keys: Ints, owner: Ints) -> tuple[Ints, Ints]:
    """Where the rows of each key begin in ``owner``, and how many they are."""
    # Keys are numbers of ranks: many rows, few values, and each value is searched once.
    lowest = int(keys.min(initial=0))
    bounds = owner.searchsorted(np.arange(lowest, int(keys.max(initial=-1)) + 2))
    place = keys - lowest if lowest else keys
    return bounds.take(place), (bounds[1:] - bounds[:-1]).take(place)


def _pairs(first: Ints, count: Ends) -> tuple[Ints, Ints]:
    """The rows i, each ``count[i]`` times, and the rows from first[i] on beside them."""
    each = int(count.max(initial=0))
    if (count == each).all():
        left = np.arange(len(count)).repeat(each)
        return left, np.add.outer(np.arange(each), first).ravel(order="F")
    left = np.arange(len(count)).repeat(count)
    right = np.arange(len(left)) + (first - count.cumsum() + count).repeat(count)
    return left, right


def meet(left: Pieces, right: Pieces) -> tuple[Ints, Pieces]:
    """The intersections of the pieces of ``left`` with those of ``right`` of the same owner, and
    the index of the left one; ``right`` comes by owner."""
    first, count = _ranges(left.owner, right.owner)
    rows, inside = np.arange(len(first)), True
    places, lows, highs = [], [], []
    for begin in range(0, max(1, len(first)), BLOCK):
        block = slice(begin, begin + BLOCK)
        index, low, high = _meet(left, right, block, _pairs(first[block], count[block]))
        places.append(index)
        lows.append(low)
        highs.append(high)
        found, whole = (index, low, high), (rows, left.low.T, left.high.T)
        inside = inside and all(
            np.array_equal(a, b[..., block]) for a, b in zip(found, whole, strict=True)
        )
    if inside:
        # Each piece lies in one other, and so is its own only intersection.
        return rows, left
    index = np.concatenate(places)
    low, high = np.concatenate(lows, axis=1), np.concatenate(highs, axis=1)
    return index, Pieces(left.owner.take(index), low.T, high.T)


def _meet(
    left: Pieces, right: Pieces, block: slice, pairs: tuple[Ints, Ints]
) -> tuple[Ints, Ends, Ends]:
    """The index, low and high of the intersections of ``pairs``, counted from the block's start;
    low and high by dim, then piece."""
    i, j = pairs
    low = np.maximum(left.low.T[:, block].take(i, axis=1), right.low.T.take(j, axis=1))
    high = np.minimum(left.high.T[:, block].take(i, axis=1), right.high.T.take(j, axis=1))
    keep = (low < high).all(axis=0)
    if not keep.all():
        kept = np.flatnonzero(keep)
        i, low, high = i.take(kept), low.take(kept, axis=1), high.take(kept, axis=1)
    return i + block.start, low, high


def differs(left: Pieces, right: Pieces, owners: int) -> int | None:
    """The first owner that does not hold each cell as often in ``left`` as in ``right``."""
    dims = _telling(left, right)
    sides = [_side(pieces, dims) for pieces in (left, right)]
    sizes = [owners]
    for columns in zip(*(highs for _, _, highs in sides), strict=True):
        sizes.append(max(int(column.max(initial=0)) for column in columns) + 1)
    _check_sizes(sizes)
    parts = _parts(sides, sizes)
    if parts is None:
        # The even corners of one side and the odd ones of the other add, the others take away.
        (even, odd), (other, rest) = (_corners(side, sizes) for side in sides)
        parts = [np.concatenate([*even, *rest]), np.concatenate([*odd, *other])]
    plus, minus = parts
    plus.sort()
    minus.sort()
    if len(plus) == len(minus):
        differ = plus != minus
        if not differ.any():
            return None
        first = differ.argmax()
        place = min(plus[first], minus[first])
    else:
        found, counts = np.unique(plus, return_counts=True)
        less, less_counts = np.unique(minus, return_counts=True)
        both = np.concatenate([found, less])
        sums = np.concatenate([counts, -less_counts])
        unique, where = np.unique(both, return_inverse=True)
        place = unique[np.flatnonzero(np.bincount(where, sums))[0]]
    return int(place // prod(sizes[1:]))


def _telling(left: Pieces, right: Pieces) -> list[int]:
    """The dims in which not all pieces of both sides reach over the same cells."""
    dims = range(left.low.shape[1])
    if not len(left.owner) or not len(right.owner):
        return list(dims)
    ends = ((left.low, left.high), (right.low, right.high))
    return [
        dim
        for dim in dims
        if any((a[:, dim] != left.low[0, dim]).any() for a, _ in ends)
        or any((b[:, dim] != left.high[0, dim]).any() for _, b in ends)
    ]


def _side(pieces: Pieces, dims: list[int]) -> Side:
    low, high = pieces.low.T, pieces.high.T
    return pieces.owner, [low[dim] for dim in dims], [high[dim] for dim in dims]


def _parts(sides: list[Side], sizes: list[int]) -> list[Ints] | None:
    """The pieces of each side cut at all borders of both, as ``keys``. So cut, two of them are the
    same or have nothing in common, and the low ends tell them. None where corners are fewer, or
    where a piece is no box."""
    numbers = []
    for dim, size in enumerate(sizes[1:]):
        borders = np.zeros(size, dtype=bool)
        for _, lows, highs in sides:
            if (lows[dim] < 0).any() or (lows[dim] > highs[dim]).any():
                return None
            borders[lows[dim]] = borders[highs[dim]] = True
        numbers.append(borders.cumsum(dtype=np.int32))
    cut, parts, corners = list[Side](), 0, 0
    for owner, *ends in sides:
        first, last = (
            [number.take(column) for number, column in zip(numbers, columns, strict=True)]
            for columns in ends
        )
        spans = [np.subtract(b, a, out=b) for a, b in zip(first, last, strict=True)]
        cut.append((owner, first, spans))
        several = [span.astype(np.int64) for span in spans if (span != 1).any()]
        parts += int(reduce(np.multiply, several).sum()) if several else len(owner)
        corners += len(owner) << len(numbers)
    return None if parts > corners else [_cut(side, sizes) for side in cut]


def _cut(side: Side, sizes: list[int]) -> Ints:
    """The keys of the parts of pieces that have so many of them in each dim."""
    owner, firsts, spans = side
    found, piece = owner.copy(), None
    for first, span, size in zip(firsts, spans, sizes[1:], strict=True):
        if piece is not None:
            first, span = first.take(piece), span.take(piece)
        found *= size
        found += first
        if (span != 1).any():
            index, found = _pairs(found, span)
            piece = index if piece is None else piece.take(index)
    return found


def _corners(side: Side, sizes: list[int]) -> tuple[list[Ints], list[Ints]]:
    """The corners of the pieces as ``keys``: those with an even number of high ends, and the odd
    ones."""
    even, odd = [side[0]], list[Ints]()
    for low, high, size in zip(*side[1:], sizes[1:], strict=True):
        even, odd = [key * size for key in even], [key * size for key in odd]
        even, odd = (
            [key + low for key in even] + [key + high for key in odd],
            [key + high for key in even] + [key + low for key in odd],
        )
    return even, odd


def _check_sizes(sizes: list[int]) -> None:
    if prod(sizes) >= 1 << 63:
        raise VerifyError(f"a grid of {sizes} is too large to check")


def keys(columns: Sequence[NDArray[np.integer]], sizes: list[int]) -> Ints:
    """One ascending number for each row of ``columns``, the last turning fastest."""
    _check_sizes(sizes)
    found = columns[0].astype(np.int64)
    for column, size in zip(columns[1:], sizes[1:], strict=True):
        found *= size
        found += column
    return found


def added(index: NDArray[np.integer], amounts: Ints, size: int) -> Ints:
    """The amounts of each index, added."""
    # Sums of whole numbers below 2**53 are exact in floats.
    return np.bincount(index, amounts, size).astype(np.int64)

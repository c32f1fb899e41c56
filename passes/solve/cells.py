"""Which cells each owner has, as a list of *pieces*: boxes of one interval for each dim.

Two lists of boxes are the same function (how often is each cell held?) exactly if the signed
corners of one are those of the other: the corners of a box are its function differentiated once in
every dim. So "each cell once" is one comparison of sorted corners, whatever way the cells came.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from colocc.errors import VerifyError
from colocc.passes.solve.ends import Ints

BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Pieces:
    """Boxes: piece i belongs to ``owner[i]`` and reaches from ``low[i]`` to ``high[i]``.

    Shapes: owner [n]; low, high [n, dims].
    """

    owner: Ints
    low: Ints
    high: Ints

    def cells(self) -> Ints:
        """The cells of each piece."""
        low, high = self.low.T, self.high.T
        found: Ints = high[0] - low[0]
        for first, last in zip(low[1:], high[1:], strict=True):
            found *= last - first
        return found

    def total(self, owners: int) -> Ints:
        """The cells of each owner."""
        return added(self.owner, self.cells(), owners)

    def take(self, index: Ints | NDArray[np.bool_], owner: Ints) -> Pieces:
        """The pieces at ``index``, given to other owners."""
        return Pieces(owner, self.low[index], self.high[index])

    def of(self, owner: int) -> Pieces:
        keep = self.owner == owner
        return self.take(keep, self.owner[keep])

    def of_dims(self, dims: list[int]) -> Pieces:
        """The same pieces in some of their dims."""
        return Pieces(self.owner, self.low[:, dims], self.high[:, dims])

    def without_summands(self) -> Pieces:
        return self.of_dims(list(range(self.low.shape[1] - 1)))


def with_summands(pieces: Pieces, first: Ints | int, last: Ints | int) -> Pieces:
    """The same pieces with summands from first to last; arrays give these of each owner."""
    rows, dims = pieces.low.shape
    low, high = np.empty((2, rows, dims + 1), dtype=np.int64)
    low[:, :dims], high[:, :dims] = pieces.low, pieces.high
    low[:, dims] = first if isinstance(first, int) else first[pieces.owner]
    high[:, dims] = last if isinstance(last, int) else last[pieces.owner]
    return Pieces(pieces.owner, low, high)


def join(keys: Ints, owner: Ints) -> tuple[Ints, Ints]:
    """All (i, j) with keys[i] == owner[j], by i, then j; ``owner`` ascends."""
    first = owner.searchsorted(keys, side="left")
    count = owner.searchsorted(keys, side="right") - first
    left = np.arange(len(keys)).repeat(count)
    right = np.arange(len(left)) + (first - count.cumsum() + count).repeat(count)
    return left, right


def meet(left: Pieces, right: Pieces) -> tuple[Ints, Pieces]:
    """The intersections of the pieces of ``left`` with those of ``right`` of the same owner, and
    the index of the left one; ``right`` comes by owner."""
    places, lows, highs = [], [], []
    for begin in range(0, max(1, len(left.owner)), BLOCK):
        i, j = join(left.owner[begin : begin + BLOCK], right.owner)
        i += begin
        low = np.maximum(left.low[i], right.low[j])
        high = np.minimum(left.high[i], right.high[j])
        keep = low[:, 0] < high[:, 0]
        for dim in range(1, low.shape[1]):
            keep &= low[:, dim] < high[:, dim]
        if not keep.all():
            i, low, high = i[keep], low[keep], high[keep]
        places.append(i)
        lows.append(low)
        highs.append(high)
    if len(places) == 1:
        return places[0], Pieces(left.owner[places[0]], lows[0], highs[0])
    index = np.concatenate(places)
    return index, Pieces(left.owner[index], np.concatenate(lows), np.concatenate(highs))


def differs(left: Pieces, right: Pieces, owners: int) -> int | None:
    """The first owner that does not hold each cell as often in ``left`` as in ``right``."""
    # A dim in which all pieces reach over the same cells tells none from another.
    used = _telling(left, right)
    left, right = left.of_dims(used), right.of_dims(used)
    top = np.maximum(left.high.max(axis=0, initial=0), right.high.max(axis=0, initial=0)) + 1
    sizes = [owners, *top.tolist()]
    # The even corners of one side and the odd ones of the other add, the others take away.
    (even, odd), (other, rest) = _corners(left, sizes), _corners(right, sizes)
    plus, minus = np.concatenate([*even, *rest]), np.concatenate([*odd, *other])
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
    return int(place // prod(int(size) for size in sizes[1:]))


def _telling(left: Pieces, right: Pieces) -> list[int]:
    """The dims in which not all pieces of both sides reach over the same cells."""
    if not len(left.owner) or not len(right.owner):
        return list(range(left.low.shape[1]))
    low, high = left.low[0], left.high[0]
    same = [(pieces.low == low) & (pieces.high == high) for pieces in (left, right)]
    alike = same[0].all(axis=0) & same[1].all(axis=0)
    return [dim for dim, is_alike in enumerate(alike.tolist()) if not is_alike]


def _corners(pieces: Pieces, sizes: list[int]) -> tuple[list[Ints], list[Ints]]:
    """The corners of the pieces as ``keys``: those with an even number of high ends, and the odd
    ones."""
    _check_sizes(sizes)
    even, odd = [pieces.owner], list[Ints]()
    for dim, size in enumerate(sizes[1:]):
        low, high = pieces.low[:, dim], pieces.high[:, dim]
        even, odd = [key * size for key in even], [key * size for key in odd]
        even, odd = (
            [key + low for key in even] + [key + high for key in odd],
            [key + high for key in even] + [key + low for key in odd],
        )
    return even, odd


def _check_sizes(sizes: list[int]) -> None:
    if prod(sizes) >= 1 << 63:
        raise VerifyError(f"a grid of {sizes} is too large to check")


def keys(columns: list[Ints], sizes: list[int]) -> Ints:
    """One ascending number for each row of ``columns``, the last turning fastest."""
    _check_sizes(sizes)
    found = columns[0].astype(np.int64)
    for column, size in zip(columns[1:], sizes[1:], strict=True):
        found = found * size + column
    return found


def added(index: NDArray[np.integer], amounts: Ints, size: int) -> Ints:
    """The amounts of each index, added."""
    # Sums of whole numbers below 2**53 are exact in floats.
    return np.bincount(index, amounts, size).astype(np.int64)

"""The cells of an edge, and boxes of them.

The global tensor is a grid of *cells*. Its dims are named:

sample      the samples of one training step, in ``units``: the smallest runs of samples that the
            plan moves as a whole. They are in the order of the reading module: all of its first dp
            replica, microbatch by microbatch, then all of its second, and so on.
sequence    equal chunks of the sequence, where a layout cuts it (cp, sp).
row         equal chunks of the rows that the source made of one sample, where the source cuts them
            and the reader counts by position
position    chunks of the reader's sequence, to which the rows of a sample belong by the position of
            their placeholder: as many rows as the batch says, possibly none
slice       equal chunks of the last dim of the tensor, where a plan has two levels

A *box* is a part of the grid: a list of ascending intervals for each dim, and their product. So a
plan holds for every batch, whatever the samples per unit and the rows per cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

Interval = tuple[int, int]
"""A half-open run of cells: (start, stop)."""
Intervals = tuple[Interval, ...]
Box = tuple[Intervals, ...]
"""The product of ascending interval lists, one for each dim; () for nothing at all."""
Array = NDArray[np.int32]
Counts = NDArray[np.int64]


def length(intervals: Intervals) -> int:
    """The number of cells in ``intervals``."""
    return sum([stop - start for start, stop in intervals])


def volume(box: Box) -> int:
    """The number of cells in ``box``."""
    return prod(length(intervals) for intervals in box) if box else 0


def overlap(left: Intervals, right: Intervals) -> int:
    """The number of cells in both."""
    return sum(max(0, min(b, d) - max(a, c)) for a, b in left for c, d in right)


def pieces(box: Box) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The corners (low, high) of the products of single intervals that make up ``box``, in order of
    place, the last dim turning fastest."""
    if not box:
        return
    stack: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for intervals in box:
        stack = [((*low, a), (*high, b)) for low, high in stack for a, b in intervals]
    yield from stack


def by_rank(ranks: NDArray[np.integer]) -> Counts:
    """The order by rank, in which equal ranks keep theirs."""
    # Numbers of 16 bits are sorted by radix, many times faster.
    if ranks.min(initial=0) >= 0 and ranks.max(initial=0) < 1 << 16:
        ranks = ranks.astype(np.uint16)
    return ranks.argsort(kind="stable")


def take_rows[Integer: np.integer](array: NDArray[Integer], index: Counts) -> NDArray[Integer]:
    """The rows of ``array`` at ``index``, column after column in memory: whoever works on one
    column then reads nothing else."""
    return array.T.take(index, axis=1).T


def distinct(left: Counts, right: Counts) -> tuple[Counts, Counts]:
    """The pairs that stand at the same place of both, [2, n] and ascending, and which one stands at
    each place; numbers are not negative."""
    scale = int(right.max(initial=0)) + 1
    keys, where = np.unique(left * scale + right, return_inverse=True)
    return np.stack([keys // scale, keys % scale]), where

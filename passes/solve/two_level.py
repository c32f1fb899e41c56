"""Cross the slow links once: between nodes first, each byte to one rank, then inside the node.

Readers on one node that need the same piece from another node would each fetch a copy of it over
the network. Here each fetches a slice of the last dim, and then all of them exchange slices inside
the node:

    one level     node 0  a b c d           node 1  0: abcd  1: abcd       8 slices cross
    two levels    node 0  a b c d  ->       node 1  0: ab..  1: ..cd       4 slices cross
                                    then            0: abcd  1: abcd

A rank still receives each slice that it lacks exactly once, so the bytes of every rank stay at
their bound, and a node receives exactly what none of its ranks has.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from colocc.passes.solve.boxes import Array, Counts
from colocc.passes.solve.plan import Moves


def copies(moves: Moves, ranks_per_node: int) -> int:
    """The most ranks of one node that fetch the same piece from other nodes."""
    far = _far(moves, ranks_per_node)
    if not far.any():
        return 1
    keys = np.column_stack([moves.dst[far] // ranks_per_node, moves.low[far], moves.high[far]])
    _, counts = np.unique(keys, axis=0, return_counts=True)
    return int(counts.max())


def split(moves: Moves, slices: int, ranks_per_node: int) -> tuple[Moves, Moves]:
    """``moves`` over a grid whose last dim has ``slices`` cells, in two levels.

    ``moves`` go over whole slices. The first level crosses nodes and keeps what the second, which
    stays inside them, gives away.
    """
    far = _far(moves, ranks_per_node)
    near, remote = moves.select(~far), moves.select(far)
    keys = np.column_stack([remote.dst // ranks_per_node, remote.low, remote.high])
    _, piece = np.unique(keys, axis=0, return_inverse=True)
    piece = piece.ravel()
    order = np.lexsort((remote.dst, piece))
    first = np.r_[True, np.diff(piece[order]) > 0]
    starts = np.flatnonzero(first)
    count = np.diff(np.r_[starts, len(order)])
    place = np.arange(len(order)) - np.repeat(starts, count)
    share = np.repeat(count, count)
    # The k-th of n readers of a piece fetches the k-th of n runs of slices.
    low, high = place * slices // share, (place + 1) * slices // share
    fetched = _sliced(remote, order, low, high)
    fetched = fetched.select(fetched.high[:, -1] > fetched.low[:, -1])
    inside = _exchange(remote, order, starts, count, slices)
    given = _unique(near)
    across = _join(fetched, given)
    return across, _join(near, inside)


def _far(moves: Moves, ranks_per_node: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = moves.src // ranks_per_node != moves.dst // ranks_per_node
    return found


def _sliced(moves: Moves, order: Counts, low: Counts, high: Counts) -> Moves:
    """The moves in ``order``, each cut to its run of slices."""
    lows, highs = moves.low[order].astype(np.int64), moves.high[order].astype(np.int64)
    lows[:, -1], highs[:, -1] = low, high
    return Moves.make(moves.src[order], moves.dst[order], lows, highs)


def _exchange(moves: Moves, order: Counts, starts: Counts, count: Counts, slices: int) -> Moves:
    """Inside the node: every reader of a piece gets every run of slices from the reader that
    fetched it, its own from itself."""
    readers: list[Array] = []
    sources: list[Array] = []
    rows: list[Counts] = []
    low: list[Counts] = []
    high: list[Counts] = []
    for size in np.unique(count).tolist():
        group = starts[count == size]
        for k in range(size):
            a, b = k * slices // size, (k + 1) * slices // size
            if a == b:
                continue
            for j in range(size):
                rows.append(order[group + j])
                readers.append(moves.dst[order[group + j]])
                sources.append(moves.dst[order[group + k]])
                low.append(np.full(len(group), a))
                high.append(np.full(len(group), b))
    place = np.concatenate(rows)
    lows, highs = moves.low[place].astype(np.int64), moves.high[place].astype(np.int64)
    lows[:, -1], highs[:, -1] = np.concatenate(low), np.concatenate(high)
    return Moves.make(np.concatenate(sources), np.concatenate(readers), lows, highs)


def _unique(moves: Moves) -> Moves:
    """What the senders of ``moves`` must keep: each piece once, to itself."""
    rows = np.column_stack([moves.src, moves.low, moves.high]).astype(np.int64)
    rows = np.unique(rows, axis=0)
    dims = moves.low.shape[1]
    low, high = rows[:, 1 : 1 + dims], rows[:, 1 + dims :]
    return Moves.make(rows[:, 0], rows[:, 0], low, high)


def _join(left: Moves, right: Moves) -> Moves:
    pairs = zip(left.arrays(), right.arrays(), strict=True)
    src, dst, low, high = (np.concatenate([a, b]).astype(np.int64) for a, b in pairs)
    return Moves.make(src, dst, low, high)

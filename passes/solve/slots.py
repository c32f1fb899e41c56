"""Choose which samples each encoder slot holds.

Any bijection trains the same model, so the one is chosen that moves fewest bytes. The step is cut
into lcm(dp of the source, dp of the reader) equal units. A transport table says how many units slot
s takes from replica d of the reader: its rows sum to units / dp of the source, its columns to
units / dp of the reader. An entry saves as many bytes as there are ranks that are in slot s and
read replica d, each weighted by the share of the sequence that it both has and needs.

Where the axes of both layouts nest, slots and replicas that share ranks form blocks in which every
pair does, and a slot (or a replica) saves alike with all of its block: any table inside the blocks
saves most, and filling them from the corner gives one. Otherwise (3:2, orders that cross) a
transport problem is solved; its vertices are whole numbers.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from colocc.layout import Layout
from colocc.passes.solve.boxes import Counts, Interval, Intervals
from colocc.sequence import axes_of, cuts, part_of

# A table with more entries is solved over the pairs of slot and replica that share a rank.
DENSE = 1 << 14


@lru_cache(maxsize=4096)
def slots_of(src: Layout, dst: Layout) -> tuple[int, tuple[Intervals, ...]]:
    """The units of a whole step, and those that each dp slot of ``src`` holds.

    Units are in the order of the reader ``dst``: all of replica 0, then all of replica 1.
    """
    units = lcm(src.dp, dst.dp)
    slot, replica, amount = _table(src, dst, units)
    found: list[list[Interval]] = [[] for _ in range(src.dp)]
    start = 0
    for index in np.lexsort((slot, replica)).tolist():
        stop = start + int(amount[index])
        runs = found[int(slot[index])]
        if stop > start and runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        elif stop > start:
            runs.append((start, stop))
        start = stop
    return units, tuple(tuple(runs) for runs in found)


@lru_cache(maxsize=1024)
def replicas(dp: int, units: int) -> tuple[Intervals, ...]:
    """The units of each replica of the reader."""
    size = units // dp
    return tuple(((index * size, (index + 1) * size),) for index in range(dp))


def savings(src: Layout, dst: Layout) -> Counts:
    """What a sample saves if slot s of ``src`` holds it for replica d: the ranks that have it and
    need it, each weighted by the share of the sequence. Shape: [slots, replicas]."""
    found = np.zeros((src.dp, dst.dp), dtype=np.int64)
    np.add.at(found, (src.coordinates("dp"), dst.coordinates("dp")), _weights(src, dst))
    return found


def _table(src: Layout, dst: Layout, units: int) -> tuple[Counts, Counts, Counts]:
    """The entries of the transport table: slot, replica, units."""
    places = src.coordinates("dp") * dst.dp + dst.coordinates("dp")
    pairs, where, ranks = np.unique(places, return_inverse=True, return_counts=True)
    saves = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(saves, where, _weights(src, dst))
    slot, replica = pairs // dst.dp, pairs % dst.dp
    if _alike(saves, slot) or _alike(saves, replica):
        filled = _fill(slot, replica, src.dp, dst.dp, units)
        if filled is not None:
            return filled
    return _solve(slot, replica, ranks, saves, (src.dp, dst.dp), units)


def _weights(src: Layout, dst: Layout) -> Counts:
    """How much each rank both has and needs of a sample that its slot holds and its replica reads:
    common chunks where both sides cut the sequence, otherwise one for every reader."""
    reads = dst.coordinates("pp") == 0 if dst.pp > 1 else np.ones(dst.size, dtype=bool)
    if not axes_of(src) or not axes_of(dst):
        return reads.astype(np.int64)
    whole = lcm(cuts(src)[0], cuts(dst)[0])
    left, right = (np.repeat(of, whole // len(of)) for of in map(_part_of_chunk, (src, dst)))
    scale = int(right.max()) + 1
    pairs, shared = np.unique(left * scale + right, return_counts=True)
    asked = part_of(src) * scale + part_of(dst)
    place = np.minimum(pairs.searchsorted(asked), len(pairs) - 1)
    return np.where(reads & (pairs[place] == asked), shared[place], 0)


@lru_cache(maxsize=1024)
def _part_of_chunk(layout: Layout) -> Counts:
    """The part of the sequence that each chunk belongs to."""
    chunks, parts = cuts(layout)
    found = np.empty(chunks, dtype=np.int64)
    for index, part in enumerate(parts):
        for start, stop in part:
            found[start:stop] = index
    found.flags.writeable = False
    return found


def refine(intervals: Intervals, factor: int) -> Intervals:
    """``intervals`` in cells that are ``factor`` times smaller."""
    if factor == 1:
        return intervals
    return tuple([(start * factor, stop * factor) for start, stop in intervals])


def _alike(values: Counts, owners: Counts) -> bool:
    """Whether all ``values`` of one owner are equal."""
    low = np.full(int(owners.max()) + 1, np.iinfo(np.int64).max)
    high = np.full(int(owners.max()) + 1, np.iinfo(np.int64).min)
    np.minimum.at(low, owners, values)
    np.maximum.at(high, owners, values)
    return bool((low[owners] == high[owners]).all())


def _fill(
    slot: Counts, replica: Counts, slots: int, replicas: int, units: int
) -> tuple[Counts, Counts, Counts] | None:
    """The table that fills each block from its corner; None where blocks are not full or do not
    balance."""
    # Pairs come sorted by slot; the slots of a block meet the same replicas.
    meets: dict[tuple[int, ...], list[int]] = {}
    for index, group in enumerate(np.split(replica, np.flatnonzero(np.diff(slot)) + 1)):
        meets.setdefault(tuple(group.tolist()), []).append(index)
    if sum(map(len, meets)) != replicas:
        return None
    entries: list[tuple[int, int, int]] = []
    for columns, rows in meets.items():
        if len(rows) * replicas != len(columns) * slots:
            return None
        place, row_size, column_size = 0, units // slots, units // replicas
        while place < len(rows) * row_size:
            row, column = place // row_size, place // column_size
            stop = min((row + 1) * row_size, (column + 1) * column_size)
            entries.append((rows[row], columns[column], stop - place))
            place = stop
    table = np.array(entries, dtype=np.int64)
    return table[:, 0], table[:, 1], table[:, 2]


def _solve(
    slot: Counts, replica: Counts, ranks: Counts, saves: Counts, sizes: tuple[int, int], units: int
) -> tuple[Counts, Counts, Counts]:
    """The table that saves most; among equals, one whose slots share most ranks with what they
    hold."""
    # One rank more never outweighs a saving.
    value = saves * (int(ranks.sum()) * units + 1) + ranks
    return _vertex(slot.tobytes(), replica.tobytes(), value.tobytes(), sizes, units)


@lru_cache(maxsize=1024)
def _vertex(
    slots: bytes, replicas: bytes, values: bytes, sizes: tuple[int, int], units: int
) -> tuple[Counts, Counts, Counts]:
    """The table of most value; the arguments are int64 arrays as bytes, since layouts that differ
    only in what no table sees come to one problem."""
    slot, replica, value = (np.frombuffer(a, np.int64) for a in (slots, replicas, values))
    if sizes[0] * sizes[1] <= DENSE:
        full = np.zeros(sizes, dtype=np.int64)
        full[slot, replica] = value
        slot, replica = (index.ravel() for index in np.indices(sizes))
        value = full.ravel()
    entries = np.arange(len(value))
    ones = np.ones(2 * len(value))
    sums = coo_array((ones, (np.r_[slot, sizes[0] + replica], np.r_[entries, entries])))
    totals = np.r_[np.full(sizes[0], units // sizes[0]), np.full(sizes[1], units // sizes[1])]
    found = linprog(-value / value.max(), A_eq=sums, b_eq=totals, method="highs-ds")
    amount = np.rint(found.x).astype(np.int64)
    rows, columns = np.bincount(slot, amount), np.bincount(replica, amount)
    # A vertex of a transport problem with whole sums is whole.
    if not np.array_equal(np.r_[rows, columns], totals):
        raise AssertionError(f"the transport problem of dp {sizes} has no whole solution")
    keep = amount > 0
    return slot[keep], replica[keep], amount[keep]

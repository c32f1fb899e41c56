"""Choose the slot of each sample so that slots have equal work.

A step's samples lie in units, in the reader's order (slots.py). A sample may lie in any slot that
holds a unit of its replica: none comes to a slot that its replica does not use. Each rank still
receives just what it needs and lacks. How much that is in total stays the same where all slots of a
replica save alike; where they do not (slots on a pipeline stage that does not read, 3:2) it is more
in one step and less in another, since work, not bytes, decides.

Replicas that share a slot are a *block*; blocks do not see each other. Inside a block the samples
are dealt longest first, each to the slot that has least so far, its own if it can be. Where that
does not lower the block's most loaded slot, every sample stays.

Source: R. L. Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from colocc.layout import Layout
from colocc.passes.solve.boxes import Counts
from colocc.passes.solve.slots import slots_of


@dataclass(frozen=True, eq=False)
class Units:
    """Where the units of a step lie, for an encoder's layout and its reader's.

    slot      [units]: the slot that holds each unit
    replica   [units]: the replica that reads it
    block     [replicas]: the block of each replica
    """

    slot: Counts
    replica: Counts
    block: Counts


@lru_cache(maxsize=256)
def units_between(src: Layout, dst: Layout) -> Units:
    """The units that the slots of ``src`` hold for the replicas of ``dst``."""
    units, slots = slots_of(src, dst)
    slot = np.zeros(units, dtype=np.int64)
    for index, runs in enumerate(slots):
        for start, stop in runs:
            slot[start:stop] = index
    replica = np.arange(units) // (units // dst.dp)
    edges = coo_array((np.ones(units), (replica, dst.dp + slot)), shape=(dst.dp + src.dp,) * 2)
    _, block = connected_components(edges, directed=False)
    return Units(slot, replica, block[: dst.dp].astype(np.int64))


def balanced(units: Units, work: Counts, unit: Counts) -> Counts:
    """The unit of each sample, from those in ``unit``, so that slots have equal ``work``.

    Shapes: all [samples]. A sample keeps its replica; in each block, the most loaded slot has no
    more work than before.
    """
    found = unit.copy()
    block = units.block[units.replica[unit]]
    for index in np.unique(block[work > 0]):
        _deal(units, work, np.flatnonzero((block == index) & (work > 0)), found)
    return found


def _deal(units: Units, work: Counts, samples: Counts, unit: Counts) -> None:
    """Deal the ``samples`` of one block, if that helps: it sets their ``unit``."""
    before = loads(units, work[samples], unit[samples])
    if before.max() == work[samples].max():
        return  # Some slot has the largest sample.
    total = np.zeros_like(before)
    dealt = np.zeros_like(samples)
    replica = units.replica[unit[samples]]
    offered = {index: _one_of_each_slot(units, int(index)) for index in np.unique(replica)}
    for place in np.argsort(-work[samples], kind="stable"):
        choice, own = offered[replica[place]], unit[samples[place]]
        least = choice[np.argmin(total[units.slot[choice]])]
        if total[units.slot[own]] == total[units.slot[least]]:
            least = own
        dealt[place] = least
        total[units.slot[least]] += work[samples[place]]
    if total.max() < before.max():
        unit[samples] = dealt


def _one_of_each_slot(units: Units, replica: int) -> Counts:
    """One unit of ``replica`` in each slot that holds any."""
    mine = np.flatnonzero(units.replica == replica)
    return mine[np.unique(units.slot[mine], return_index=True)[1]]


def loads(units: Units, work: Counts, unit: Counts) -> Counts:
    """The work of each slot. Shape: [slots]."""
    found: Counts = np.zeros(int(units.slot.max()) + 1, dtype=work.dtype)
    np.add.at(found, units.slot[unit], work)
    return found


def imbalance(load: Counts) -> float:
    """The most work of a slot over the mean; 1 where there is none."""
    return float(load.max() / load.mean()) if load.any() else 1.0

"""Covers passes/solve/balance.py: a bijection, inside replicas, never worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocc.layout import Layout
from colocc.passes.solve.balance import balanced, imbalance, loads, units_between
from colocc.passes.solve.boxes import Counts
from colocc.passes.solve.slots import savings, slots_of
from colocc.runtime.rows import units_of

PAIRS = {
    "fan_in": (Layout(dp=8), Layout(tp=4, dp=2)),
    "fan_in tp": (Layout(tp=2, dp=4), Layout(tp=4, dp=2)),
    "fan_out": (Layout(tp=8), Layout(tp=2, dp=4)),
    "equal": (Layout(tp=4, dp=2), Layout(tp=4, dp=2)),
    "pp": (Layout(dp=8), Layout(tp=2, pp=2, dp=2)),
    "pp by order": (Layout(dp=8), Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp")),
    "3:2": (Layout(tp=2, dp=3), Layout(tp=3, dp=2)),
    "cp": (Layout(dp=8), Layout(cp=2, tp=2, dp=2, zigzag=True)),
    "64": (Layout(dp=64), Layout(tp=4, pp=2, dp=8)),
}
pairs = pytest.mark.parametrize(("src", "dst"), PAIRS.values(), ids=list(PAIRS))


def saved(src: Layout, dst: Layout, work: Counts, unit: Counts) -> int:
    """The work that ranks have and need, all together."""
    units = units_between(src, dst)
    return int((savings(src, dst)[units.slot[unit], units.replica[unit]] * work).sum())


def alike(src: Layout, dst: Layout) -> bool:
    """Whether the slots of each replica save alike of it."""
    units, saves = units_between(src, dst), savings(src, dst)
    return all(len(np.unique(saves[units.slot[units.replica == d], d])) == 1 for d in range(dst.dp))


@pairs
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_samples_move_inside_their_replica_and_no_slot_gets_more(
    src: Layout, dst: Layout, data: st.DataObject
) -> None:
    where, units = units_between(src, dst), slots_of(src, dst)[0]
    each = data.draw(st.integers(1, 3 * units // dst.dp), label="samples of a replica")
    draw = st.lists(st.integers(0, 40), min_size=each * dst.dp, max_size=each * dst.dp)
    work = np.array(data.draw(draw), dtype=np.int64)
    before = units_of(len(work), dst.dp, units)
    after = balanced(where, work, before)
    assert np.array_equal(balanced(where, work.copy(), before.copy()), after)
    # The reader of each sample is the one that it had, and one slot holds it.
    assert np.array_equal(after // (units // dst.dp), np.arange(len(work)) // each)
    if alike(src, dst):
        assert saved(src, dst, work, after) == saved(src, dst, work, before)
    had, has = loads(where, work, before), loads(where, work, after)
    assert has.sum() == had.sum() == work.sum()
    assert has.max() <= had.max()
    # No better than the bounds that any assignment has; greedy is within 4/3 of the best one.
    for replica in range(dst.dp) if src.dp % dst.dp == 0 else ():
        mine = work[replica * each : (replica + 1) * each]
        used = np.unique(where.slot[np.arange(units) // (units // dst.dp) == replica])
        assert has[used].max() >= max(mine.max(), mine.sum() / len(used))


@pairs
def test_equal_samples_stay(src: Layout, dst: Layout) -> None:
    units = slots_of(src, dst)[0]
    for each in (units // dst.dp, 3 * units // dst.dp):
        before = units_of(each * dst.dp, dst.dp, units)
        work = np.full(each * dst.dp, 7)
        assert np.array_equal(balanced(units_between(src, dst), work, before), before)


def test_the_longest_is_dealt_first() -> None:
    """One replica, two slots: 1 2 3 | 9 4 5 becomes 5 4 3 | 9 2 1; 9 and the 3, in doubt, stay."""
    where = units_between(Layout(dp=2), Layout(tp=2))
    work, before = np.array([1, 2, 3, 9, 4, 5]), np.array([0, 0, 0, 1, 1, 1])
    after = balanced(where, work, before)
    assert loads(where, work, before).tolist() == [6, 18]
    assert loads(where, work, after).tolist() == [12, 12]
    assert after.tolist() == [1, 1, 0, 1, 0, 0]


def test_where_slots_save_alike() -> None:
    """Otherwise bytes are traded for balance: a stage that does not read, slots of two replicas."""
    assert {name for name, pair in PAIRS.items() if not alike(*pair)} == {
        "pp",
        "pp by order",
        "3:2",
        "64",
    }


def test_a_slot_of_two_replicas_takes_from_both() -> None:
    """3:2: slots 0 and 1 hold replica 0, slots 1 and 2 replica 1."""
    src, dst = PAIRS["3:2"]
    units, before = units_between(src, dst), units_of(6, 2, 6)
    work = np.array([8, 2, 2, 2, 2, 8])
    assert loads(units, work, before).tolist() == [10, 4, 10]
    after = balanced(units, work, before)
    assert loads(units, work, after).tolist() == [8, 8, 8]
    assert units.replica[after].tolist() == [0, 0, 0, 1, 1, 1]


def test_blocks_do_not_see_each_other() -> None:
    """The first replica is dealt anew, the second has nothing to gain and stays."""
    where = units_between(Layout(dp=4), Layout(tp=2, dp=2))
    before = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    after = balanced(where, np.array([5, 5, 1, 1, 2, 3, 4, 1]), before)
    assert after.tolist() == [0, 1, 1, 0, 2, 2, 3, 3]


def test_imbalance_is_the_most_over_the_mean() -> None:
    assert imbalance(np.array([6, 2])) == 1.5
    assert imbalance(np.zeros(3, dtype=np.int64)) == 1.0

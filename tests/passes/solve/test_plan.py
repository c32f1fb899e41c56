"""Plans: what they say of themselves."""

from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocc.layout import Layout
from colocc.passes.solve.plan import Holding, Plan, Step, length, overlap
from colocc.passes.solve.solver import solve

intervals = st.lists(st.integers(0, 40), max_size=8, unique=True).map(
    lambda ends: tuple(zip(*[iter(sorted(ends)[: len(ends) // 2 * 2])] * 2, strict=True))
)


@given(intervals, intervals)
def test_length_and_overlap_count_units(
    left: tuple[tuple[int, int], ...], right: tuple[tuple[int, int], ...]
) -> None:
    a = {unit for start, stop in left for unit in range(start, stop)}
    b = {unit for start, stop in right for unit in range(start, stop)}
    assert length(left) == len(a)
    assert overlap(left, right) == overlap(right, left) == len(a & b)


def test_a_holding_gives_each_rank_the_units_of_its_slot_and_stage() -> None:
    layout = Layout(tp=2, pp=2, dp=2)
    holding = Holding("language", layout, (((0, 1),), ((1, 2),)), (0,))
    assert holding.units() == (((0, 1),),) * 2 + (((1, 2),),) * 2 + ((),) * 4
    everywhere = Holding("language", layout, holding.slots)
    assert everywhere.units() == (((0, 1),), ((0, 1),), ((1, 2),), ((1, 2),)) * 2


def test_the_group_of_a_rank() -> None:
    step = Step("all_gather", ((0, 2), (1, 3)))
    assert [step.group_of(rank) for rank in range(5)] == [(0, 2), (1, 3), (0, 2), (1, 3), None]
    assert Step("narrow", keeps=(((0, 1),),)).group_of(0) is None


def plan_of(src: Layout, dst: Layout, scale: Fraction = Fraction(1)) -> Plan:
    return solve(("images", src), ("language", dst), scale=scale)


def test_received_counts_what_comes_from_others() -> None:
    plan = plan_of(Layout(tp=2, dp=4), Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp"))
    # Ranks 0 and 1 hold a quarter, need a half; ranks 2 and 3 are of another stage.
    assert plan.received() == ((1, 1, 0, 0) * 2, (0, 0, 1, 1) * 2)
    assert plan.bound() == plan.received()


def test_received_sees_a_plan_that_moves_too_much() -> None:
    src = Holding("images", Layout(tp=1, dp=2), (((0, 1),), ((1, 2),)))
    gather = Step("all_gather", ((0, 1),))
    narrow = Step("narrow", keeps=(((0, 1),), ((1, 2),)))
    plan = Plan(src, src, 2, "equal", 1, "", (gather, narrow), ())
    assert plan.received() == ((1, 1), (0, 0))
    assert plan.bound() == ((0, 0), (0, 0))


def test_member_lists_name_each_set_of_ranks_once_in_order_of_use() -> None:
    plan = plan_of(Layout(tp=4, dp=2), Layout(tp=2, pp=2, dp=2))
    expected = tuple(dict.fromkeys(g for s in plan.forward + plan.backward for g in s.groups))
    assert plan.member_lists() == expected
    assert plan.member_lists() == ((0, 4), (1, 5), (2, 6), (3, 7), (0, 2, 4, 6), (1, 3, 5, 7))


def test_a_plan_moves_if_anything_is_left_to_do() -> None:
    layout = Layout(tp=2, dp=2)
    assert not plan_of(layout, layout).moves
    assert plan_of(layout, layout, Fraction(2)).moves
    assert plan_of(layout, Layout(tp=4, dp=1)).moves


def test_a_plan_is_frozen_and_equal_by_value() -> None:
    left, right = (plan_of(Layout(tp=2, dp=4), Layout(tp=4, dp=2)) for _ in range(2))
    assert left == right
    assert repr(left) == repr(right)
    assert hash(left) == hash(right)
    with pytest.raises(FrozenInstanceError):
        left.units = 3  # type: ignore[misc]

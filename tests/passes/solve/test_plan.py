"""Plans: what they say of themselves."""

from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.solve.plan import Holding, Moves, Part, Plan, Step
from colocc.passes.solve.solver import solve
from colocc.types import Type


def moves(*rows: tuple[int, int, int, int]) -> Moves:
    src, dst, low, high = np.array(rows).T
    return Moves.make(src, dst, low[:, None], high[:, None])


def test_moves_are_put_in_order_of_sender_receiver_and_place() -> None:
    found = moves((1, 0, 2, 3), (0, 1, 4, 5), (0, 1, 1, 2), (0, 0, 0, 1))
    assert repr(found) == "Moves(0->0 0:1; 0->1 1:2; 0->1 4:5; 1->0 2:3)"
    assert found.cells().tolist() == [1, 1, 1, 1]
    assert repr(found.of(src=0, dst=1)) == "Moves(0->1 1:2; 0->1 4:5)"
    assert repr(found.of(dst=0)) == "Moves(0->0 0:1; 1->0 2:3)"


def test_moves_are_equal_by_value() -> None:
    left, right = moves((0, 1, 0, 1), (1, 0, 1, 2)), moves((1, 0, 1, 2), (0, 1, 0, 1))
    assert left == right
    assert hash(left) == hash(right)
    assert left != moves((0, 1, 0, 1), (1, 0, 1, 3))
    assert len(Moves.none(2)) == 0
    assert Moves.none(2).low.shape == (0, 2)


SEQUENCE = Part(("tp", "cp"), (((0, 1),), ((1, 2),), ((2, 3),), ((3, 4),)))


def test_a_holding_gives_each_rank_the_product_of_its_parts() -> None:
    layout = Layout(tp=2, cp=2, pp=2, sp=True)
    holding = Holding("language", layout, (Part(("dp",), (((0, 2),),)), SEQUENCE), (0,))
    first = [(((0, 2),), ((i, i + 1),)) for i in range(4)]
    assert holding.boxes() == [*first, (), (), (), ()]
    assert [holding.box(rank) for rank in range(8)] == holding.boxes()
    assert holding.cells().tolist() == [2] * 4 + [0] * 4
    assert holding.units() == (((0, 2),),) * 4 + ((),) * 4
    assert holding.slots == (((0, 2),),)


def test_the_first_axis_of_a_part_counts_fastest() -> None:
    # cp turns faster than tp among the ranks, but not in the number of the part.
    layout = Layout(tp=2, cp=2, order="cp-tp")
    assert SEQUENCE.index(layout).tolist() == [0, 2, 1, 3]


def test_the_group_of_a_rank() -> None:
    step = Step("all_gather", ((0, 2), (1, 3)))
    assert [step.group_of(rank) for rank in range(5)] == [(0, 2), (1, 3), (0, 2), (1, 3), None]
    assert Step("narrow").group_of(0) is None


def plan_of(src: Layout, dst: Layout, text: str = "") -> Plan:
    value = Type.parse(text, "images", src) if text else None
    return solve(("images", src), ("language", dst), value=value)


def counts(plan: Plan) -> list[list[int]]:
    return [found.tolist() for found in (*plan.received_cells(), *plan.bound_cells())]


def test_received_counts_what_comes_from_others() -> None:
    plan = plan_of(Layout(tp=2, dp=4), Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp"))
    # Ranks 0 and 1 hold a quarter, need a half; ranks 2 and 3 are of another stage.
    assert counts(plan) == [[1, 1, 0, 0] * 2, [0, 0, 1, 1] * 2] * 2


def test_received_sees_a_plan_that_moves_too_much() -> None:
    src = Holding("images", Layout(dp=2), (Part(("dp",), (((0, 1),), ((1, 2),))),))
    gather = Step("all_gather", ((0, 1),))
    narrow = Step("narrow", moves=moves((0, 0, 0, 1), (1, 1, 1, 2)))
    plan = Plan(src, src, ("sample",), (2,), "equal", Fraction(1), (), (gather, narrow), ())
    assert counts(plan) == [[1, 1], [0, 0], [0, 0], [0, 0]]


def test_an_all_reduce_costs_what_the_best_known_does() -> None:
    plan = plan_of(Layout(tp=8), Layout(tp=2, cp=4))
    assert [step.kind for step in plan.backward] == ["all_reduce"]
    # 2 * (4 - 1) / 4 of one unit, rounded up; the bound counts it once.
    assert counts(plan)[1] == [2] * 8
    assert counts(plan)[3] == [1] * 8


def test_bytes_are_those_of_the_type() -> None:
    plan = plan_of(Layout(tp=2, dp=4), Layout(tp=4, dp=2), "bf16[8@dp,576,4096]")
    sample = 576 * 4096 * 2
    assert plan.cell_bytes() == 2 * sample
    assert plan.received() == ([2 * sample] * 8, [0] * 8)
    assert plan.bound() == plan.received()


@pytest.mark.parametrize("text", ["", "?[B@dp,...]"])
def test_bytes_of_an_unknown_size_are_refused(text: str) -> None:
    plan = plan_of(Layout(tp=2, dp=4), Layout(tp=4, dp=2), text)
    assert plan.cell_bytes() is None
    with pytest.raises(LayoutError, match="the bytes of images -> language depend on the size"):
        plan.received()


def test_member_lists_name_each_set_of_ranks_once_in_order_of_use() -> None:
    plan = plan_of(Layout(tp=4, dp=2), Layout(tp=2, pp=2, dp=2))
    expected = tuple(dict.fromkeys(g for s in plan.forward + plan.backward for g in s.groups))
    assert plan.member_lists() == expected
    assert plan.member_lists() == ((2, 6), (3, 7), (0, 2, 4, 6), (1, 3, 5, 7))


def test_a_plan_moves_if_anything_is_left_to_do() -> None:
    layout = Layout(tp=2, dp=2)
    assert not plan_of(layout, layout).moves
    assert solve(("a", layout), ("b", layout), scale=Fraction(2)).moves
    assert plan_of(layout, Layout(tp=4)).moves


def test_a_plan_is_frozen_and_equal_by_value() -> None:
    left, right = (plan_of(Layout(tp=2, dp=3), Layout(tp=3, dp=2)) for _ in range(2))
    assert left == right
    assert repr(left) == repr(right)
    assert hash(left) == hash(right)
    with pytest.raises(FrozenInstanceError):
        left.scale = Fraction(3)  # type: ignore[misc]

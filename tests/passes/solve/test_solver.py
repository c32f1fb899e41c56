"""The solver against brute force.

The oracle is written from the definitions: it counts ranks itself and pushes numbered samples
through the plan, and imports neither the checker nor the rank arithmetic of the layouts.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from colocc.errors import LayoutError
from colocc.layout import DEFAULT_ORDER, Layout
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.solver import check_pair, solve
from tests.passes.solve.pairs import OLD_ORDER, TUPLES, factorings, pairs, tuple_pair

SAMPLES_PER_UNIT = 2
Held = list[list[int]]


def count_ranks(layout: Layout) -> list[dict[str, int]]:
    """The coordinates of each rank, by counting: the first axis of the order turns fastest."""
    axes = [axis for axis in layout.order.split("-") if axis != "ep"]
    turns = product(*(range(getattr(layout, axis)) for axis in reversed(axes)))
    return [dict(zip(reversed(axes), turn, strict=True)) for turn in turns]


def expand(intervals: tuple[tuple[int, int], ...]) -> list[int]:
    """Sample ids of some units, in order."""
    size = SAMPLES_PER_UNIT
    return [sample for a, b in intervals for sample in range(a * size, b * size)]


def push(step: Step, held: Held) -> Held:
    """Run one step the way the collective is defined, on lists of sample ids."""
    size = SAMPLES_PER_UNIT
    if step.kind == "narrow":
        return [
            list(np.concatenate([[], *(np.array(mine)[a * size : b * size] for a, b in keeps)]))
            for mine, keeps in zip(held, step.keeps, strict=True)
        ]
    if step.kind == "all_gather":
        after = [list(mine) for mine in held]
        for group in step.groups:
            assert len({len(held[rank]) for rank in group}) == 1, "all_gather wants equal parts"
            for rank in group:
                after[rank] = [sample for peer in group for sample in held[peer]]
        return after
    # Receive as all_to_all does: for each receiver, its group's senders in group order.
    after = [[] for _ in held]
    groups = {rank: group for group in step.groups for rank in group}
    for receiver in range(len(held)):
        for sender in groups.get(receiver, (receiver,)):
            for peer, a, b in step.sends[sender]:
                assert peer in groups.get(sender, (sender,)), "sent outside the group"
                if peer == receiver:
                    after[receiver] += held[sender][a * size : b * size]
    return after


def agree_with_brute_force(plan: Plan) -> None:
    """What each rank holds before and after, and how much it must receive, from the definitions."""
    src, dst = count_ranks(plan.src.layout), count_ranks(plan.dst.layout)
    total = plan.units * SAMPLES_PER_UNIT
    share = total // plan.dst.layout.dp
    slots = [expand(slot) for slot in plan.src.slots]
    assert sorted(sample for slot in slots for sample in slot) == list(range(total))
    assert {len(slot) for slot in slots} == {total // plan.src.layout.dp}
    have = [slots[place["dp"]] for place in src]
    need = [
        list(range(place["dp"] * share, (place["dp"] + 1) * share)) if place["pp"] == 0 else []
        for place in dst
    ]
    for steps, start, end, received in (
        (plan.forward, have, need, plan.received()[0]),
        (plan.backward, need, have, plan.received()[1]),
    ):
        held = [list(mine) for mine in start]
        for step in steps:
            held = push(step, held)
        assert held == end
        least = [len(set(want) - set(got)) for got, want in zip(start, end, strict=True)]
        assert [SAMPLES_PER_UNIT * units for units in received] == least
    assert plan.received() == plan.bound()


def solve_and_check(src: Layout, dst: Layout) -> Plan:
    plan = solve(("images", src), ("language", dst))
    check(plan)
    agree_with_brute_force(plan)
    return plan


@pytest.mark.parametrize("world", range(1, 17))
def test_every_pair_up_to_16_ranks(world: int) -> None:
    count = 0
    for src, dst in pairs(world):
        plan = solve_and_check(src, dst)
        larger, smaller = max(src.dp, dst.dp), min(src.dp, dst.dp)
        assert plan.ratio * smaller == larger
        assert plan.kind == ("equal" if larger == smaller else _kind(src, dst))
        count += 1
    # tp and dp of the encoder alone give as many pairs with an equal language layout.
    assert count >= len(list(factorings(world, 2)))


def _kind(src: Layout, dst: Layout) -> str:
    return "fan_in" if src.dp > dst.dp else "fan_out"


@pytest.mark.parametrize("order", [DEFAULT_ORDER, OLD_ORDER])
def test_cp_and_ep_of_one_anywhere_in_the_order_change_nothing(order: str) -> None:
    for src, dst in pairs(8):
        spelled = Layout(tp=dst.tp, pp=dst.pp, dp=dst.dp, order=order)
        short = "-".join(axis for axis in order.split("-") if getattr(dst, axis) > 1) or "tp"
        brief = Layout(tp=dst.tp, pp=dst.pp, dp=dst.dp, order=short)
        left = solve_and_check(src, spelled)
        right = solve(("images", src), ("language", brief))
        assert (left.forward, left.backward) == (right.forward, right.backward)


@pytest.mark.parametrize(
    ("src_order", "dst_order"),
    [
        ("dp-pp-ep-cp-tp", DEFAULT_ORDER),
        ("cp-dp-tp-pp-ep", "pp-dp-ep-cp-tp"),
        (DEFAULT_ORDER, "ep-pp-tp-cp-dp"),
    ],
)
def test_odd_orders_with_all_axes_named(src_order: str, dst_order: str) -> None:
    for (tp, dp), (language_tp, pp, language_dp) in TUPLES:
        src = Layout(tp=tp, dp=dp, order=src_order)
        dst = Layout(tp=language_tp, pp=pp, dp=language_dp, order=dst_order)
        plan = solve_and_check(src, dst)
        assert plan.ratio == max(dp, language_dp) // min(dp, language_dp)


@st.composite
def large_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    world = draw(st.integers(17, 64))
    tp, dp = draw(st.sampled_from(list(factorings(world, 2))))
    readers = [f for f in factorings(world, 3) if max(f[2], dp) % min(f[2], dp) == 0]
    language_tp, pp, language_dp = draw(st.sampled_from(readers))
    orders = [draw(st.permutations(("tp", "cp", "ep", "dp", "pp"))) for _ in range(2)]
    return (
        Layout(tp=tp, dp=dp, order="-".join(orders[0])),
        Layout(tp=language_tp, pp=pp, dp=language_dp, order="-".join(orders[1])),
    )


@given(large_pairs())
@settings(max_examples=60, deadline=None)
def test_any_pair_beyond_16_ranks(pair: tuple[Layout, Layout]) -> None:
    solve_and_check(*pair)


def spelled(plan: Plan) -> str:
    lines = [f"{plan.kind} x{plan.ratio} of {plan.units}   where {plan.where}"]
    for name, steps in (("fwd", plan.forward), ("bwd", plan.backward)):
        words = [
            " ".join([step.kind, *(f"[{','.join(map(str, group))}]" for group in step.groups)])
            for step in steps
        ]
        lines.append(f"  {name}  {'; '.join(words) or 'as it is'}")
    return "\n".join(lines)


def pinned(order: str) -> str:
    text = []
    for index in range(len(TUPLES)):
        src, dst = tuple_pair(index, order)
        text += [f"{src} -> {dst}", spelled(solve_and_check(src, dst))]
    return "\n".join(text)


def test_the_tuples_of_the_design_in_the_default_order() -> None:
    assert_expected_inline(
        pinned(DEFAULT_ORDER),
        """\
tp2 dp4 -> tp4 dp2
fan_in x2 of 4   where language.dp = images.dp//2
  fwd  all_gather [0,2] [1,3] [4,6] [5,7]
  bwd  narrow
tp4 dp2 -> tp2 dp4
fan_out x2 of 4   where images.dp = language.dp//2
  fwd  narrow
  bwd  all_gather [0,2] [1,3] [4,6] [5,7]
tp4 dp2 -> tp4 dp2
equal x1 of 2   where language.dp = images.dp
  fwd  as it is
  bwd  as it is
tp2 dp4 -> tp2 pp2 dp2
fan_in x2 of 4   where language.dp = images.dp%2
  fwd  all_to_all [0,4] [1,5] [2,6] [3,7]
  bwd  all_to_all [0,4] [1,5] [2,6] [3,7]
tp4 dp2 -> tp2 pp2 dp2
equal x1 of 4   where images.dp = r//4, language.dp = r//2%2
  fwd  all_to_all [0,4] [1,5] [2,6] [3,7]
  bwd  all_to_all [0,2,4,6] [1,3,5,7]
tp1 dp8 -> tp4 pp2 dp1
fan_in x8 of 8   where language.dp = 0
  fwd  all_to_all [0,1,2,3,4,5,6,7]
  bwd  all_to_all [0,4] [1,5] [2,6] [3,7]
tp4 dp2 -> tp1 pp2 dp4
fan_out x2 of 8   where images.dp = r//4, language.dp = r%4
  fwd  all_to_all [0,4] [1,5] [2,6] [3,7]
  bwd  all_to_all [0,1,2,3,4,5,6,7]
tp1 dp8 -> tp2 pp2 dp2
fan_in x4 of 8   where language.dp = images.dp//2%2
  fwd  all_to_all [0,1,4,5] [2,3,6,7]
  bwd  all_to_all [0,4] [1,5] [2,6] [3,7]
tp8 dp1 -> tp1 dp8
fan_out x8 of 8   where images.dp = 0
  fwd  narrow
  bwd  all_gather [0,1,2,3,4,5,6,7]
tp8 dp1 -> tp2 pp2 dp2
fan_out x2 of 2   where images.dp = 0
  fwd  narrow
  bwd  all_to_all [0,2,4,6] [1,3,5,7]
tp2 dp4 -> tp1 pp4 dp2
fan_in x2 of 8   where images.dp = r//2, language.dp = r%2
  fwd  all_to_all [0,2,4,6] [1,3,5,7]
  bwd  all_to_all [0,1,2,3,4,5,6,7]""",
    )


def test_the_tuples_of_the_design_in_the_old_order() -> None:
    assert_expected_inline(
        pinned(OLD_ORDER),
        """\
tp2 dp4 -> tp4 dp2
fan_in x2 of 4   where language.dp = images.dp//2
  fwd  all_gather [0,2] [1,3] [4,6] [5,7]
  bwd  narrow
tp4 dp2 -> tp2 dp4
fan_out x2 of 4   where images.dp = language.dp//2
  fwd  narrow
  bwd  all_gather [0,2] [1,3] [4,6] [5,7]
tp4 dp2 -> tp4 dp2
equal x1 of 2   where language.dp = images.dp
  fwd  as it is
  bwd  as it is
tp2 dp4 -> tp2 pp2 dp2 order=tp-cp-pp-dp
fan_in x2 of 4   where language.dp = images.dp//2
  fwd  all_to_all [0,2] [1,3] [4,6] [5,7]
  bwd  all_to_all [0,2] [1,3] [4,6] [5,7]
tp4 dp2 -> tp2 pp2 dp2 order=tp-cp-pp-dp
equal x1 of 2   where language.dp = images.dp
  fwd  narrow
  bwd  all_to_all [0,2] [1,3] [4,6] [5,7]
tp1 dp8 -> tp4 pp2 dp1
fan_in x8 of 8   where language.dp = 0
  fwd  all_to_all [0,1,2,3,4,5,6,7]
  bwd  all_to_all [0,4] [1,5] [2,6] [3,7]
tp4 dp2 -> tp1 pp2 dp4 order=tp-cp-pp-dp
fan_out x2 of 4   where images.dp = language.dp//2
  fwd  narrow
  bwd  all_to_all [0,1,2,3] [4,5,6,7]
tp1 dp8 -> tp2 pp2 dp2 order=tp-cp-pp-dp
fan_in x4 of 8   where language.dp = images.dp//4
  fwd  all_to_all [0,1,2,3] [4,5,6,7]
  bwd  all_to_all [0,2] [1,3] [4,6] [5,7]
tp8 dp1 -> tp1 dp8
fan_out x8 of 8   where images.dp = 0
  fwd  narrow
  bwd  all_gather [0,1,2,3,4,5,6,7]
tp8 dp1 -> tp2 pp2 dp2 order=tp-cp-pp-dp
fan_out x2 of 2   where images.dp = 0
  fwd  narrow
  bwd  all_to_all [0,2,4,6] [1,3,5,7]
tp2 dp4 -> tp1 pp4 dp2 order=tp-cp-pp-dp
fan_in x2 of 4   where language.dp = images.dp//2
  fwd  all_to_all [0,2] [4,6]
  bwd  all_to_all [0,1,2,3] [4,5,6,7]""",
    )


def test_fan_out_narrows_without_a_byte_and_gathers_the_gradient_once() -> None:
    plan = solve(("images", Layout(tp=4, dp=2)), ("language", Layout(tp=2, dp=4)))
    assert [step.kind for step in plan.forward] == ["narrow"]
    assert [step.kind for step in plan.backward] == ["all_gather"]
    assert plan.received()[0] == (0,) * 8
    # Not four copies of the gradient added up, one per tp rank: each unit arrives once.
    assert plan.received()[1] == (1,) * 8


def test_equal_grids_need_no_step() -> None:
    layout = Layout(tp=2, dp=4)
    plan = solve(("images", layout), ("language", layout))
    assert not plan.moves
    assert solve(("a", layout), ("b", layout), scale=Fraction(1, 2)).moves


def test_only_the_first_stage_receives() -> None:
    dst = Layout(tp=2, pp=2, dp=2)
    plan = solve(("images", Layout(tp=1, dp=8)), ("language", dst))
    stage = [place["pp"] for place in count_ranks(dst)]
    assert [bool(units) for units in plan.received()[0]] == [s == 0 for s in stage]
    # Each rank of stage 0 holds half of its two eighths: it encoded one itself.
    assert plan.received()[1] == tuple(int(s > 0) * plan.units // 8 for s in stage)


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        (
            Layout(tp=2, dp=4),
            Layout(tp=2, dp=2),
            "images (tp2 dp4) has 8 ranks, language (tp2 dp2) has 4: both must be on the same "
            "ranks. Make the products of the axes equal.",
        ),
        (
            Layout(tp=4, dp=3),
            Layout(tp=3, dp=4),
            "images (tp4 dp3) has 3 dp slots, language (tp3 dp4) has 4: 4 % 3 = 1, neither divides "
            "the other. Give images dp 1 or 2 or 4 or 12.",
        ),
        (
            Layout(tp=2, pp=2, dp=2),
            Layout(tp=4, dp=2),
            "images (tp2 pp2 dp2) feeds language and has pp2: an encoder runs with pp1. "
            "Write tp2 dp4 for images.",
        ),
        (
            Layout(tp=4, dp=2),
            Layout(tp=2, cp=2, dp=2),
            "language (tp2 cp2 dp2) has cp2: redistribution between images and language covers "
            "cp1. Give the ranks of cp to dp or tp.",
        ),
    ],
)
def test_a_pair_outside_the_solver_is_refused(src: Layout, dst: Layout, message: str) -> None:
    with pytest.raises(LayoutError) as info:
        check_pair(("images", src), ("language", dst))
    assert str(info.value) == message
    with pytest.raises(LayoutError):
        solve(("images", src), ("language", dst))

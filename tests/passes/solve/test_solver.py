"""The solver against brute force, and what it answers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import lcm

import numpy as np
import pytest
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from colocc.errors import LayoutError
from colocc.layout import DEFAULT_ORDER, Layout
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.solver import check_pair, solve
from tests.passes.solve.oracle import agrees_with_brute_force, count_ranks, deal, kept
from tests.passes.solve.pairs import (
    OLD_ORDER,
    ROWS,
    SEQUENCE,
    TUPLES,
    WHOLE,
    factorings,
    layout_of,
    layouts,
    pairs,
    tuple_pair,
)


def proved(src: Layout, dst: Layout, dims: tuple[str, ...] = WHOLE) -> Plan:
    plan = solve(("images", src), ("language", dst), dims=dims)
    check(plan)
    agrees_with_brute_force(plan)
    return plan


def test_every_pair_up_to_5_ranks_does_what_brute_force_says() -> None:
    count = 0
    for world in range(1, 6):
        for src, dst, dims in pairs(world):
            plan = proved(src, dst, dims)
            assert plan.ratio == Fraction(max(src.dp, dst.dp), min(src.dp, dst.dp))
            count += 1
    assert count == 3 + 3 * 72 + 1488


@pytest.mark.parametrize(("world", "every"), [(6, 19), (8, 41), (9, 23), (12, 397), (16, 1499)])
def test_larger_pairs_do_what_brute_force_says(world: int, every: int) -> None:
    # A fixed share of all pairs; the stride is prime to how they are counted.
    some = [pair for number, pair in enumerate(pairs(world)) if number % every == 0]
    for pair in some:
        proved(*pair)
    assert len(some) > 20
    assert {dims for _, _, dims in some} == {WHOLE, SEQUENCE, ROWS}


def test_a_wrong_plan_does_not_agree_with_brute_force() -> None:
    plan = solve(("images", Layout(tp=2, dp=4)), ("language", Layout(tp=4, dp=2)))
    step = Step("all_gather", ((0, 4), (1, 5), (2, 6), (3, 7)))
    with pytest.raises(AssertionError):
        agrees_with_brute_force(replace(plan, forward=(step,)))
    with pytest.raises(AssertionError):
        agrees_with_brute_force(replace(plan, backward=()))


def best_kept(src: Layout, dst: Layout, length: int) -> int:
    """The most cells that any bijection lets the ranks keep, over all transport tables.

    Cells are units times ``length`` elements of the sequence; the best table is a vertex of the
    transport polytope, found by linear programming over all pairs of slot and replica.
    """
    units = lcm(src.dp, dst.dp)
    worth = np.zeros((src.dp, dst.dp))
    for left, right in zip(count_ranks(src), count_ranks(dst), strict=True):
        if right["pp"] == 0:
            common = set(deal(length, src, left)) & set(deal(length, dst, right))
            worth[left["dp"], right["dp"]] += len(common)
    rows = [(np.arange(src.dp)[:, None] == i) + np.zeros(worth.shape) for i in range(src.dp)]
    columns = [(np.arange(dst.dp)[None] == i) + np.zeros(worth.shape) for i in range(dst.dp)]
    sums = np.array([table.ravel() for table in rows + columns])
    totals = [units // src.dp] * src.dp + [units // dst.dp] * dst.dp
    return round(-float(linprog(-worth.ravel(), A_eq=sums, b_eq=totals).fun))


@pytest.mark.parametrize(("world", "every"), [(4, 3), (6, 11), (8, 59), (12, 499)])
def test_no_other_choice_of_samples_moves_fewer_bytes(world: int, every: int) -> None:
    found = [pair for pair in pairs(world) if pair[2] == SEQUENCE][::every]
    for src, dst, dims in found:
        plan = solve(("images", src), ("language", dst), dims=dims)
        length = plan.grid[1]
        assert kept(plan) == best_kept(src, dst, length), f"{src} -> {dst}"
    assert len(found) > 20


def test_every_table_of_a_small_pair_is_no_better() -> None:
    # The same by hand: all tables of 3 slots and 2 replicas, without linear programming.
    for order in ("tp-dp", "dp-tp"):
        src, dst = Layout(tp=2, dp=3, order=order), Layout(tp=3, dp=2)
        together = np.zeros((3, 2), dtype=int)
        for left, right in zip(count_ranks(src), count_ranks(dst), strict=True):
            together[left["dp"], right["dp"]] += 1
        tables = [
            np.array([[a, 2 - a], [b, 2 - b], [3 - a - b, a + b - 1]])
            for a, b in product(range(3), repeat=2)
            if 0 <= 3 - a - b <= 2
        ]
        best = max(int((table * together).sum()) for table in tables)
        assert kept(solve(("images", src), ("language", dst))) == best


@st.composite
def any_pair(draw: st.DrawFn, most: int = 96) -> tuple[Layout, Layout, tuple[str, ...]]:
    world = draw(st.integers(1, most))
    found = []
    for axes in (("tp", "cp", "dp"), ("tp", "cp", "pp", "dp")):
        sizes = draw(st.sampled_from(list(factorings(world, len(axes)))))
        order = "-".join(draw(st.permutations(("tp", "cp", "ep", "dp", "pp"))))
        layout = layout_of(dict(zip(axes, sizes, strict=True)), order)
        found.append(replace(layout, sp=draw(st.booleans()), zigzag=draw(st.booleans())))
    return found[0], found[1], draw(st.sampled_from((WHOLE, SEQUENCE, ROWS)))


@given(any_pair())
@settings(max_examples=150, deadline=None)
def test_any_pair_of_up_to_96_ranks_is_right(
    pair: tuple[Layout, Layout, tuple[str, ...]],
) -> None:
    src, dst, dims = pair
    check(solve(("images", src), ("language", dst), dims=dims))


@given(any_pair(24))
@settings(max_examples=60, deadline=None)
def test_any_pair_of_up_to_24_ranks_does_what_brute_force_says(
    pair: tuple[Layout, Layout, tuple[str, ...]],
) -> None:
    proved(*pair)


@given(any_pair(48), any_pair(48), st.sampled_from([1, 2, 3, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_edges_of_one_step_agree_on_the_samples_of_each_module(
    left: tuple[Layout, Layout, tuple[str, ...]],
    right: tuple[Layout, Layout, tuple[str, ...]],
    nodes: int,
) -> None:
    """images -> language, and images -> fusion in the language's order: one choice of samples."""
    (src, dst, dims), (other, _, more) = left, right
    if other.size != src.size:
        other = Layout(dp=src.size)
    sink = ("language", dst)
    to_sink = solve(("images", src), sink, dims=dims, ranks_per_node=nodes)
    aside = solve(("images", src), ("fusion", other), sink=sink, dims=more)
    onward = solve(("fusion", other), sink, dims=dims)
    for plan in (to_sink, aside, onward):
        check(plan, sink=sink)
    agree: dict[str, list[list[tuple[Fraction, Fraction]]]] = {}
    for plan in (to_sink, aside, onward):
        for side in (plan.src, plan.dst):
            slots = [
                [(Fraction(a, plan.units), Fraction(b, plan.units)) for a, b in slot]
                for slot in side.slots
            ]
            assert agree.setdefault(side.module, slots) == slots


@pytest.mark.parametrize(
    ("src", "dst", "nodes"),
    [("dp4", "cp2 pp2 dp1", 2), ("dp44", "tp4 cp11 dp1 order=cp-tp", 2), ("dp8", "tp2 cp4 dp1", 4)],
)
def test_summands_take_one_level_and_come_from_the_nearest_holder(
    src: str, dst: str, nodes: int
) -> None:
    ends = ("images", Layout.parse(src)), ("language", Layout.parse(dst))
    plan = solve(*ends, ranks_per_node=nodes)
    check(plan)
    assert len(plan.backward) == 1
    assert plan.backward[0].adds
    # The same without nodes moves as much, and crosses them as often or more.
    plain = solve(*ends)
    slices = plan.grid[-1] if plan.dims[-1] == "slice" else 1
    assert (plan.received_cells()[1] == plain.received_cells()[1] * slices).all()
    assert crossings(plan, nodes) <= crossings(plain, nodes) * slices


def crossings(plan: Plan, nodes: int) -> int:
    moves = plan.backward[0].moves
    far = moves.src // nodes != moves.dst // nodes
    return int(moves.select(far).cells().sum())


def test_axes_of_one_anywhere_in_the_order_change_nothing() -> None:
    for src in layouts(8, ("tp", "dp")):
        for dst in layouts(8, ("tp", "pp", "dp")):
            used = [axis for axis in dst.order.split("-") if getattr(dst, axis) > 1]
            spelled = Layout(
                tp=dst.tp, pp=dst.pp, dp=dst.dp,
                order="-".join(["cp", "ep", *used, *({"tp", "pp", "dp"} - set(used))]),
            )  # fmt: skip
            left, right = (
                solve(("images", src), ("language", reader)) for reader in (dst, spelled)
            )
            assert (left.forward, left.backward) == (right.forward, right.backward)


def spelled(plan: Plan) -> str:
    lines = [f"{plan.kind} x{plan.ratio} of {plan.units}   where {plan.where[0]}"]
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
        text += [f"{src} -> {dst}", spelled(proved(src, dst))]
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
  fwd  send_recv [0,4] [1,5] [2,6] [3,7]
  bwd  send_recv [0,4] [1,5] [2,6] [3,7]
tp4 dp2 -> tp2 pp2 dp2
equal x1 of 2   where language.dp = images.dp
  fwd  send_recv [2,6] [3,7]
  bwd  all_to_all [0,2,4,6] [1,3,5,7]
tp1 dp8 -> tp4 pp2 dp1
fan_in x8 of 8   where language.dp = 0
  fwd  all_to_all [0,1,2,3,4,5,6,7]
  bwd  send_recv [0,4] [1,5] [2,6] [3,7]
tp4 dp2 -> tp1 pp2 dp4
fan_out x2 of 4   where images.dp = language.dp//2
  fwd  send_recv [2,6] [3,7]
  bwd  all_to_all [0,1,2,3,4,5,6,7]
tp1 dp8 -> tp2 pp2 dp2
fan_in x4 of 8   where language.dp = images.dp//2%2
  fwd  all_to_all [0,1,4,5] [2,3,6,7]
  bwd  send_recv [0,4] [1,5] [2,6] [3,7]
tp8 dp1 -> tp1 dp8
fan_out x8 of 8   where images.dp = 0
  fwd  narrow
  bwd  all_gather [0,1,2,3,4,5,6,7]
tp8 dp1 -> tp2 pp2 dp2
fan_out x2 of 2   where images.dp = 0
  fwd  narrow
  bwd  all_to_all [0,2,4,6] [1,3,5,7]
tp2 dp4 -> tp1 pp4 dp2
fan_in x2 of 4   where language.dp = images.dp//2
  fwd  all_to_all [0,2] [1,5,7]
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
  fwd  send_recv [0,2] [1,3] [4,6] [5,7]
  bwd  send_recv [0,2] [1,3] [4,6] [5,7]
tp4 dp2 -> tp2 pp2 dp2 order=tp-cp-pp-dp
equal x1 of 2   where language.dp = images.dp
  fwd  narrow
  bwd  send_recv [0,2] [1,3] [4,6] [5,7]
tp1 dp8 -> tp4 pp2 dp1
fan_in x8 of 8   where language.dp = 0
  fwd  all_to_all [0,1,2,3,4,5,6,7]
  bwd  send_recv [0,4] [1,5] [2,6] [3,7]
tp4 dp2 -> tp1 pp2 dp4 order=tp-cp-pp-dp
fan_out x2 of 4   where images.dp = language.dp//2
  fwd  narrow
  bwd  all_to_all [0,1,2,3] [4,5,6,7]
tp1 dp8 -> tp2 pp2 dp2 order=tp-cp-pp-dp
fan_in x4 of 8   where language.dp = images.dp//4
  fwd  all_to_all [0,1,2,3] [4,5,6,7]
  bwd  send_recv [0,2] [1,3] [4,6] [5,7]
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
  fwd  send_recv [0,2] [4,6]
  bwd  all_to_all [0,1,2,3] [4,5,6,7]""",
    )


def test_fan_out_narrows_without_a_byte_and_gathers_the_gradient_once() -> None:
    plan = solve(("images", Layout(tp=4, dp=2)), ("language", Layout(tp=2, dp=4)))
    assert [step.kind for step in plan.forward] == ["narrow"]
    assert [step.kind for step in plan.backward] == ["all_gather"]
    forward, backward = (counts.tolist() for counts in plan.received_cells())
    assert forward == [0] * 8
    # Not four copies of the gradient added up, one per tp rank: each unit arrives once.
    assert backward == [1] * 8


def test_equal_grids_need_no_step() -> None:
    layout = Layout(tp=2, dp=4)
    plan = solve(("images", layout), ("language", layout))
    assert not plan.moves
    assert solve(("a", layout), ("b", layout), scale=Fraction(1, 2)).moves


def test_only_the_first_stage_receives() -> None:
    dst = Layout(tp=2, pp=2, dp=2)
    plan = solve(("images", Layout(tp=1, dp=8)), ("language", dst))
    stage = [place["pp"] for place in count_ranks(dst)]
    forward, backward = (counts.tolist() for counts in plan.received_cells())
    assert [count > 0 for count in forward] == [s == 0 for s in stage]
    # Each rank of stage 0 holds half of its two eighths: it encoded one itself.
    assert backward == [int(s > 0) * plan.units // 8 for s in stage]


def test_readers_on_cp_ranks_of_a_whole_value_add_their_gradients() -> None:
    plan = proved(Layout(dp=4), Layout(cp=2, dp=2))
    assert [(step.kind, step.adds) for step in plan.backward] == [("send_recv", True)]
    plan = proved(Layout(tp=4), Layout(tp=2, cp=2))
    assert [step.kind for step in plan.backward] == ["all_reduce"]
    assert plan.backward[0].groups == ((0, 2), (1, 3))
    # Where each reads its own part of the sequence, the parts are put together instead.
    plan = proved(Layout(tp=4), Layout(tp=2, cp=2), SEQUENCE)
    assert [step.kind for step in plan.backward] == ["all_gather"]


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
            Layout(tp=2, pp=2, dp=2),
            Layout(tp=4, dp=2),
            "images (tp2 pp2 dp2) feeds language and has pp2: an encoder runs with pp1. "
            "Write tp2 dp4 for images.",
        ),
    ],
)
def test_a_pair_outside_the_solver_is_refused(src: Layout, dst: Layout, message: str) -> None:
    with pytest.raises(LayoutError) as info:
        check_pair(("images", src), ("language", dst))
    assert str(info.value) == message
    with pytest.raises(LayoutError):
        solve(("images", src), ("language", dst))

"""The enumeration: every pair once, and alike ones really alike."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import pytest

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes.solve import enumerate as room
from colocc.passes.solve.enumerate import (
    DIMS,
    LEAST,
    USUAL,
    Pair,
    Verdict,
    is_another,
    judge,
    layouts,
    pairs,
    shape,
    written,
)
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.solver import solve
from tests.passes.solve.pairs import cut
from tests.passes.solve.pairs import layouts as by_hand

SOURCE = ("tp", "cp", "dp")
ALL = ("tp", "cp", "pp", "dp")


@pytest.mark.parametrize("world", [1, 6, 8, 12])
def test_no_layout_is_left_out(world: int) -> None:
    for axes in (SOURCE, ALL):
        want = {str(layout) for grid in by_hand(world, axes) for layout in cut(grid)}
        found = [str(layout) for layout in layouts(world, axes, None)]
        assert len(found) == len(set(found))
        assert set(found) == want
    grids = {_places(layout) for layout in layouts(world, ALL, None)}
    usual = layouts(world, ALL, USUAL)
    assert {_places(layout) for layout in usual} <= grids
    assert {layout.order.replace("-ep", "") for layout in usual} <= {"tp-cp-dp-pp", "tp-cp-pp-dp"}


def _places(layout: Layout) -> tuple[object, ...]:
    """Where every rank is, and the cut: what a layout is, however its order is written."""
    return layout.sp, layout.zigzag, *(tuple(layout.coordinates(axis).tolist()) for axis in ALL)


@pytest.mark.parametrize("world", [4, 6])
def test_what_is_left_out_differs_in_names_only(world: int) -> None:
    kept: dict[object, set[object]] = defaultdict(set)
    for pair in pairs(world):
        if is_another(pair):
            kept[_ends(pair)].add(_steps(pair))
    left_out = 0
    for src in layouts(world, SOURCE, None):
        for dst in layouts(world, ALL, None):
            for what, least in LEAST.items():
                pair = (src, dst, what)
                if (src.sp or src.cp > 1) + (dst.sp or dst.cp > 1) >= least:
                    assert _steps(pair) in kept[_ends(pair)]
                    left_out += 1
    assert left_out > sum(map(len, kept.values()))


def _ends(pair: Pair) -> object:
    src, dst, what = pair
    return what, shape(src, what, reads=False), shape(dst, what, reads=True)


def _steps(pair: Pair) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    plan = solve(("images", pair[0]), ("language", pair[1]), dims=DIMS[pair[2]])
    return plan.forward, plan.backward


def test_positions_that_one_side_cuts_are_a_sequence() -> None:
    for src, dst in ((Layout(dp=4), Layout(cp=2, dp=2)), (Layout(tp=4, sp=True), Layout(dp=4))):
        left, right = (
            solve(("images", src), ("language", dst), dims=DIMS[what])
            for what in ("sequence", "positions")
        )
        assert left.grid == tuple(size for size in right.grid if size > 1)
        for one, two in zip(
            left.forward + left.backward, right.forward + right.backward, strict=True
        ):
            assert (one.kind, one.groups) == (two.kind, two.groups)
            assert one.moves.src.tolist() == two.moves.src.tolist()
            assert one.moves.cells().tolist() == two.moves.cells().tolist()


def test_counts() -> None:
    # tp2 with and without sp, cp2 with and without zigzag, dp2; and pp2 for readers.
    assert [written(world) for world in (1, 2)] == [1, 5 * 6]
    assert pairs(1) == [(Layout(), Layout(), "whole")]
    assert {what for _, _, what in pairs(2)} == set(DIMS)


def test_shapes_say_what_ranks_are_to_an_edge() -> None:
    layout = Layout(tp=2, cp=2, dp=2)
    assert shape(layout, "whole", reads=False) == (("copies", 4), ("dp", 2))
    assert shape(layout, "whole", reads=True) == (("copies", 2), ("summands", 2), ("dp", 2))
    assert shape(layout, "sequence", reads=True) == (("copies", 2), ("outer", 2), ("dp", 2))
    split = Layout(tp=2, cp=2, dp=2, sp=True)
    assert shape(split, "sequence", reads=True) == (("outer", 4), ("dp", 2))
    folded = Layout(tp=2, cp=2, dp=2, sp=True, zigzag=True)
    assert shape(folded, "sequence", reads=True) == (("inner", 2), ("folds", 2), ("dp", 2))


def test_a_pair_above_its_bound_says_why() -> None:
    assert judge((Layout(tp=2, dp=4), Layout(tp=4, dp=2), "whole")) == Verdict()
    verdict = judge((Layout(dp=8), Layout(cp=4, dp=2), "whole"))
    assert verdict.wrong == ("", "")
    assert verdict.above == (("bwd every cell has 4 summands, one on each cp rank", Fraction(3)),)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_wrong_plan_is_counted_where_it_is_wrong(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plan: Plan) -> None:
        raise VerifyError(f"plan images -> language is wrong: {way}, rank 0 ends with nothing")

    monkeypatch.setattr(room, "check", refuse)
    wrong = judge((Layout(dp=2), Layout(tp=2), "whole")).wrong
    assert [bool(text) for text in wrong] == [way == "forward", way == "backward"]

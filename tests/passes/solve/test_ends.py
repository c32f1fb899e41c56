"""What ranks hold by definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocc import sequence as planner
from colocc.layout import Layout
from colocc.passes.solve.ends import End, coordinate, cutting_axes, expected_grid, sequence
from colocc.passes.solve.solver import solve
from tests.passes.solve.oracle import count_ranks, deal
from tests.passes.solve.pairs import cut, layouts

AXES = ("tp", "cp", "pp", "dp")


def test_the_cut_is_megatrons() -> None:
    assert sequence(Layout(tp=2, cp=2, sp=True)) == (
        4,
        (((0, 1),), ((1, 2),), ((2, 3),), ((3, 4),)),
    )
    assert sequence(Layout(cp=2, zigzag=True)) == (4, (((0, 1), (3, 4)), ((1, 3),)))
    both = Layout(tp=2, cp=2, sp=True, zigzag=True)
    assert sequence(both) == (4, (((0, 1),), ((3, 4),), ((1, 2),), ((2, 3),)))
    thirds = Layout(tp=3, cp=2, sp=True, zigzag=True)
    assert sequence(thirds)[0] == 12
    assert sequence(thirds)[1][:3] == (((0, 2),), ((2, 3), (9, 10)), ((10, 12),))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12])
def test_the_cut_deals_out_every_element(world: int) -> None:
    for grid in layouts(world, ("tp", "cp", "dp")):
        for layout in cut(grid):
            chunks, parts = sequence(layout)
            for place in count_ranks(layout):
                lanes = layout.tp if layout.sp else 1
                number = place["cp"] * lanes + (place["tp"] if layout.sp else 0)
                held = [chunk for a, b in parts[number] for chunk in range(a, b)]
                assert held == deal(chunks, layout, place)


@given(st.integers(1, 6), st.integers(1, 8), st.booleans(), st.booleans())
def test_planner_and_definition_agree_on_the_sequence(
    tp: int, cp: int, sp: bool, zigzag: bool
) -> None:
    layout = Layout(tp=tp, cp=cp, sp=sp, zigzag=zigzag)
    assert planner.cuts(layout) == sequence(layout)
    assert planner.axes_of(layout) == cutting_axes(layout)


@pytest.mark.parametrize("world", [6, 8])
def test_coordinates_are_counted(world: int) -> None:
    for layout in layouts(world, AXES):
        for axis in AXES:
            assert coordinate(layout, axis).tolist() == [p[axis] for p in count_ranks(layout)]


def test_the_grid_is_the_coarsest() -> None:
    src, dst = Layout(tp=2, dp=3, sp=True), Layout(cp=3, dp=2, zigzag=True)
    assert expected_grid(src, dst, dst, ("sample", "sequence")) == (6, 6)
    assert expected_grid(src, dst, dst, ("sample", "row", "position")) == (6, 2, 6)
    assert expected_grid(src, src, Layout(dp=6), ("sample",)) == (6,)


def test_an_end_knows_box_summand_and_lane_of_every_rank() -> None:
    dst = Layout(tp=2, cp=2, pp=2, dp=1)
    plan = solve(("images", Layout(dp=8)), ("language", dst))
    end = End.of(plan.dst)
    assert end.place.tolist() == [0] * 4 + [-1] * 4
    assert end.summand.tolist() == [0, 0, 1, 1] * 2
    assert end.summands == 2
    # tp alone copies: the rank of lane 0 lies one behind.
    assert end.lane.tolist() == [0, 1] * 4
    assert np.array_equal(end.low, [[0]])
    assert np.array_equal(end.high, [[8]])

"""The walk: boxes as functions, joins, and the rules of each step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes.solve import walk
from colocc.passes.solve.ends import End
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.solver import solve
from colocc.passes.solve.walk import Pieces

Box = tuple[int, tuple[int, int], tuple[int, int]]
ranges = st.tuples(st.integers(0, 4), st.integers(1, 4)).map(lambda pair: (pair[0], sum(pair)))
boxes = st.lists(st.tuples(st.integers(0, 2), ranges, ranges), max_size=6)


def pieces(found: list[Box]) -> Pieces:
    rows = sorted(found)
    return Pieces(
        np.array([owner for owner, _, _ in rows], dtype=np.int64),
        np.array([[a, c] for _, (a, _), (c, _) in rows], dtype=np.int64).reshape(-1, 2),
        np.array([[b, d] for _, (_, b), (_, d) in rows], dtype=np.int64).reshape(-1, 2),
    )


def count(found: list[Box]) -> Counter[tuple[int, int, int]]:
    return Counter(
        (owner, x, y) for owner, one, two in found for x, y in product(range(*one), range(*two))
    )


@given(boxes, boxes)
def test_boxes_differ_exactly_where_their_cells_do(left: list[Box], right: list[Box]) -> None:
    cells = [count(side) for side in (left, right)]
    owners = [i for i in range(3) if _of(cells[0], i) != _of(cells[1], i)]
    assert walk.differs(pieces(left), pieces(right), 3) == (owners[0] if owners else None)


def _of(cells: Counter[tuple[int, int, int]], owner: int) -> dict[tuple[int, int, int], int]:
    return {cell: times for cell, times in cells.items() if cell[0] == owner}


@given(boxes)
def test_boxes_do_not_differ_from_the_same_cells_in_other_boxes(found: list[Box]) -> None:
    single = [
        (i, (x, x + 1), (y, y + 1)) for (i, x, y), n in count(found).items() for _ in range(n)
    ]
    assert walk.differs(pieces(found), pieces(single), 3) is None


@given(boxes, boxes)
def test_boxes_meet_in_their_common_cells(left: list[Box], right: list[Box]) -> None:
    index, found = walk.meet(pieces(left), pieces(right))
    cells = [count(side) for side in (left, right)]
    assert found.cells().sum() == sum(n * cells[1][cell] for cell, n in cells[0].items())
    assert (pieces(left).owner[index] == found.owner).all()


def test_a_grid_too_large_to_number_is_refused() -> None:
    with pytest.raises(VerifyError, match="too large to check"):
        walk.keys([np.zeros(1, dtype=np.int64)] * 4, [1 << 20] * 4)


def small() -> Plan:
    return solve(("images", Layout(tp=2, dp=4)), ("language", Layout(tp=4, dp=2)))


def step_of(plan: Plan, step: Step) -> walk.State:
    end = End.of(plan.src)
    return walk.take_step(step, walk.start(end), end, plan.grid)


def test_members_of_an_all_gather_share_one_buffer() -> None:
    plan = small()
    state = step_of(plan, plan.forward[0])
    assert state.buffer[[0, 2]].tolist() == [state.buffer[0]] * 2
    assert len(state.pieces.owner) == 8
    assert state.held().tolist() == [2] * 8


def test_an_all_gather_joins_buffers_that_are_not_shared() -> None:
    plan = small()
    end = End.of(plan.src)
    once = walk.take_step(plan.forward[0], walk.start(end), end, plan.grid)
    with pytest.raises(VerifyError, match="gather what they already share"):
        walk.take_step(plan.forward[0], once, end, plan.grid)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((2, 0),), "not an ascending set"),
        (((0, 1), (1, 2)), "overlap"),
        (((2, 3), (0, 1)), "not in order of their first rank"),
        (((0,),), "all_gather over groups"),
        ((), "all_gather over groups"),
        (((0, 8),), "not an ascending set"),
    ],
)
def test_groups_are_ascending_disjoint_and_in_order(
    groups: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(VerifyError, match=message):
        step_of(small(), Step("all_gather", groups))


def test_a_step_moves_what_the_sender_holds_and_inside_its_group() -> None:
    plan = solve(("images", Layout(dp=6)), ("language", Layout(tp=2, pp=3)))
    step = plan.forward[0]
    for groups, message in (
        (((0, 1, 2, 3, 4), (5,)), "all_to_all over groups"),
        (((0, 1, 2), (3, 4, 5)), "leaves its group"),
    ):
        with pytest.raises(VerifyError, match=message):
            step_of(plan, replace(step, groups=groups))
    moves = step.moves
    greedy = replace(moves, high=np.minimum(moves.high + 1, 6).astype(np.int32))
    with pytest.raises(VerifyError, match="carries cells that the sender does not hold"):
        step_of(plan, replace(step, moves=greedy))


def test_a_group_that_need_not_wait_for_each_other_is_refused() -> None:
    plan = solve(("images", Layout(dp=4)), ("language", Layout(pp=2, dp=2)))
    step = plan.forward[0]
    whole = tuple(sorted(rank for group in step.groups for rank in group))
    assert len(step.groups) == 2
    with pytest.raises(VerifyError, match="holds ranks that exchange nothing"):
        step_of(plan, replace(step, groups=(whole,), kind="all_to_all"))

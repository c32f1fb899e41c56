"""The walk: what a step leaves with every rank, and the rules of each kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes.solve import walk
from colocc.passes.solve.ends import End
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.solver import solve


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

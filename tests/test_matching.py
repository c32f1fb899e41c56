"""The matcher, and the traces of every rank of redistributions matched against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from colocc.layout import Layout
from colocc.passes.solve.plan import Plan, length
from colocc.passes.solve.solver import solve
from colocc.runtime.groups import close_groups, open_groups
from colocc.runtime.redistribution import Redistribution
from tests.matching import Call, Recorder, match, traces
from tests.passes.solve.pairs import OLD_ORDER, SEQUENCE, TUPLES, WHOLE, tuple_pair

EDGES = (
    ("tp2 dp3", "tp3 dp2", WHOLE, None),
    ("tp3 dp2", "tp2 dp3", WHOLE, None),
    ("tp2 dp4", "tp2 cp2 dp2", WHOLE, None),
    ("tp4 dp2", "tp2 cp4 dp1", WHOLE, None),
    ("tp8 dp1", "tp2 cp4 dp1", WHOLE, None),
    ("dp8", "tp2 cp2 dp2 sp zigzag", SEQUENCE, None),
    ("tp2 dp4 sp", "tp4 dp2 sp", SEQUENCE, None),
    ("tp2 dp4 sp", "tp2 cp2 pp2 dp1 zigzag", SEQUENCE, None),
    ("tp2 dp4", "tp8 dp1", WHOLE, 4),
    ("dp16", "tp2 cp2 pp2 dp2 sp zigzag", SEQUENCE, 4),
)


def work_of(plan: Plan, rows: int) -> Callable[[int], Callable[[Recorder], object]]:
    """Forward and backward of a plan on one rank, with ``rows`` rows in a cell."""

    def work(rank: int) -> Callable[[Recorder], object]:
        groups = open_groups(plan.member_lists())
        move = Redistribution(plan, groups, rank)
        box = plan.src.box(rank)
        sides = [length(cut) for cut in box[: 1 + ("sequence" in plan.dims)]]
        shape = [sides[0] * rows, *sides[1:], plan.grid[-1] if "slice" in plan.dims else 3]

        def run(recorder: Recorder) -> None:
            value = torch.ones(shape, requires_grad=True)
            moved = move(value)
            recorder.fence()
            moved.sum().backward()
            close_groups(plan.member_lists())

        return run

    return work


def matched(plan: Plan) -> int:
    """The calls of all ranks match; and they are the same, but for sizes, without any rows."""
    world = plan.src.layout.size
    some = traces(world, work_of(plan, 2))
    none = traces(world, work_of(plan, 0))
    done = match(some)
    assert match(none) == done
    for left, right in zip(some, none, strict=True):
        assert [(c.kind, c.members) for c in left] == [(c.kind, c.members) for c in right]
        assert not any(sum(call.sent) for call in right)
    communicating = [step for step in plan.forward + plan.backward if step.groups]
    assert done == sum(len(step.groups) for step in communicating)
    return done


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", OLD_ORDER])
@pytest.mark.parametrize("index", range(len(TUPLES)))
def test_the_ranks_of_the_designs_tuples_match(index: int, order: str) -> None:
    src, dst = tuple_pair(index, order)
    plan = solve(("images", src), ("language", dst))
    assert (matched(plan) > 0) == (src != dst)


@pytest.mark.parametrize("edge", EDGES)
def test_the_ranks_of_any_pair_match(edge: tuple[str, str, tuple[str, ...], int | None]) -> None:
    src, dst, dims, nodes = edge
    plan = solve(
        ("images", Layout.parse(src)), ("language", Layout.parse(dst)),
        dims=dims, ranks_per_node=nodes,
    )  # fmt: skip
    assert matched(plan) > 0


def test_a_collective_that_one_rank_leaves_out_is_a_deadlock() -> None:
    plan = solve(("images", Layout(tp=2, dp=4)), ("language", Layout(tp=4, dp=2)))
    calls = traces(8, work_of(plan, 1))
    with pytest.raises(AssertionError, match="deadlock"):
        match([[], *calls[1:]])
    with pytest.raises(AssertionError, match="deadlock"):
        match([calls[0] * 2, *calls[1:]])


def test_ranks_that_wait_for_each_other_are_a_deadlock() -> None:
    def call(*members: int) -> Call:
        return Call("all_reduce", members, (1, 1), (1, 1), torch.float32)

    rows = [call(0, 1), call(0, 2)], [call(1, 2), call(0, 1)], [call(0, 2), call(1, 2)]
    with pytest.raises(AssertionError, match="deadlock"):
        match(list(rows))
    assert match([rows[0], rows[1][::-1], rows[2]]) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "all_reduce"},
        {"dtype": torch.float16},
        {"sent": (2, 2)},
        {"received": (2, 2)},
    ],
)
def test_members_that_disagree_are_named(changes: dict[str, object]) -> None:
    mine = Call("all_gather", (0, 1), (1, 1), (1, 1), torch.float32)
    assert match([[mine], [mine]]) == 1
    other = replace(mine, **changes)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="members"):
        match([[mine], [other]])


def test_sends_and_receives_of_one_batch_are_one_call() -> None:
    def work(rank: int) -> Callable[[Recorder], object]:
        group = dist.new_group([0, 1])

        def run(_: Recorder) -> None:
            value, room = torch.ones(3 - rank), torch.empty(2 + rank)
            operations = [
                dist.P2POp(dist.isend, value, group=group, group_peer=1 - rank),
                dist.P2POp(dist.irecv, room, group=group, group_peer=1 - rank),
            ]
            for done in dist.batch_isend_irecv(operations):
                done.wait()

        return run

    found = traces(2, work)
    assert found[0] == [Call("p2p", (0, 1), (0, 3), (0, 2), torch.float32)]
    assert match(found) == 1

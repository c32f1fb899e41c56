"""The matcher, and the traces of every rank of redistributions matched against each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import colocc
from colocc.layout import Layout
from colocc.passes.solve.boxes import length
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.solver import solve
from colocc.runtime import cpu
from colocc.runtime.groups import close_groups, open_groups
from colocc.runtime.redistribution import Redistribution
from tests import mimo
from tests.matching import NONE, Call, match, traces
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


def work_of(plan: Plan, rows: int) -> Callable[[int], Callable[[], object]]:
    """Forward and backward of a plan on one rank, with ``rows`` rows in a cell."""

    def work(rank: int) -> Callable[[], object]:
        groups = open_groups(plan.member_lists())
        move = Redistribution(plan, groups, rank)
        box = plan.src.box(rank)
        sides = [length(cut) for cut in box[: 1 + ("sequence" in plan.dims)]]
        shape = [sides[0] * rows, *sides[1:], plan.grid[-1] if "slice" in plan.dims else 3]

        def run() -> None:
            value = torch.ones(shape, requires_grad=True)
            move(value).sum().backward()
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
        assert not any(max(call.sent) > 0 for call in right)
    steps = [step for step in plan.forward + plan.backward if step.groups]
    assert done == sum(map(calls_of, steps))
    return done


def calls_of(step: Step) -> int:
    """How many collectives or messages a step is."""
    if step.kind != "send_recv":
        return len(step.groups)
    return len({(a, b) for a, b in zip(step.moves.src, step.moves.dst, strict=True) if a != b})


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
    def work(rank: int) -> Callable[[], object]:
        group = dist.new_group([0, 1])

        def run() -> None:
            value, room = torch.ones(3 - rank), torch.empty(2 + rank)
            operations = [
                dist.P2POp(dist.isend, value, group=group, group_peer=1 - rank),
                dist.P2POp(dist.irecv, room, group=group, group_peer=1 - rank),
            ]
            for done in dist.batch_isend_irecv(operations):
                done.wait()

        return run

    found = traces(2, work)
    assert found[0] == [Call("p2p", (0, 1), (NONE, 3), (NONE, 2), torch.float32)]
    assert match(found) == 2


def message(sender: int, receiver: int, *, mine: bool) -> Call:
    amounts = tuple(1 if who == (receiver if mine else sender) else NONE for who in range(3))
    none = (NONE,) * 3
    sent, received = (amounts, none) if mine else (none, amounts)
    return Call("p2p", (0, 1, 2), sent, received, torch.float32)


def test_a_batch_of_messages_meets_several_calls() -> None:
    # Rank 1 receives from 0 and sends to 2 in one call; 0 and 2 know nothing of each other.
    middle = replace(message(0, 1, mine=False), sent=(NONE, NONE, 1))
    assert match([[message(0, 1, mine=True)], [middle], [message(1, 2, mine=False)]]) == 2
    with pytest.raises(AssertionError, match="deadlock"):
        match([[message(0, 1, mine=True)], [middle], []])


def test_two_ranks_that_send_first_are_a_deadlock() -> None:
    there, back = (
        [message(a, b, mine=True), message(b, a, mine=False)] for a, b in ((0, 1), (1, 0))
    )
    with pytest.raises(AssertionError, match="deadlock"):
        match([there, back, []])
    assert match([there, back[::-1], []]) == 2


def step_of(
    layouts: dict[str, Layout], schedule: str, counts: tuple[int, ...]
) -> Callable[[int], Callable[[], object]]:
    """Training steps of a MimoModel on one rank: Megatron's pipeline and what colocc adds."""

    def work(_: int) -> Callable[[], object]:
        stack = contextlib.ExitStack()
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts)
        compiled = colocc.compile(model, layouts, groups=groups, schedule=schedule)
        program = stack.enter_context(compiled)

        def run() -> None:
            with stack:
                for count in counts:
                    program.forward_backward(
                        [mimo.batch(8, seed=i) for i in range(count)],
                        num_microbatches=count, loss_func=mimo.loss_func,
                    )  # fmt: skip

        return run

    return work


@pytest.mark.filterwarnings("ignore")  # Megatron's own, of its defaults
@pytest.mark.parametrize(
    ("images", "language", "schedule"),
    [
        ("tp2 dp4", "tp2 pp2 dp2", "three_phase"),
        ("tp1 dp8", "tp2 pp4 dp1", "three_phase"),
        ("tp1 dp8", "tp2 cp2 pp2 dp1 zigzag", "three_phase"),
        ("tp4 dp2", "tp2 dp4", "lookahead=2"),
    ],
)
def test_whole_steps_match_with_their_pipelines(images: str, language: str, schedule: str) -> None:
    layouts = {"images": Layout.parse(images), "language": Layout.parse(language)}
    found = traces(8, step_of(layouts, schedule, (1, 3, 6)))
    assert match(found) > 0
    sends = sum(call.kind == "p2p" for calls in found for call in calls)
    assert (sends > 0) == (layouts["language"].pp > 1)
    victim = next(call for call in found[5] if len(call.members) > 1)
    with pytest.raises(AssertionError, match=r"deadlock|members|peers"):
        match([*found[:5], [c for c in found[5] if c is not victim], *found[6:]])

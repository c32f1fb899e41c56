"""Covers passes/timeline.py and passes/fill.py: 1F1B, what waits for what, how near to ideal."""

import itertools

import pytest

from colocc.passes.fill import fill
from colocc.passes.timeline import (
    Costs,
    Task,
    Timeline,
    ideal_length,
    one_f_one_b,
    three_phase_length,
)


def costs_of(share: float) -> Costs:
    """A stage's forward takes 1, its backward 2; the encoder ``share`` of that, as portions, one
    for each stage."""
    return Costs(1.0, 2.0, share, 2.0 * share)


def test_one_f_one_b_of_two_stages() -> None:
    def order(stage: int) -> str:
        return " ".join(f"{task.kind[0]}{task.microbatch}" for task in one_f_one_b(stage, 2, 3))

    assert order(0) == "f0 f1 b0 f2 b1 b2"
    assert order(1) == "f0 b0 f1 b1 f2 b2"


def test_fewer_microbatches_than_stages() -> None:
    assert [task.kind for task in one_f_one_b(0, 4, 2)] == ["forward"] * 2 + ["backward"] * 2


def check(timeline: Timeline, stages: int, microbatches: int, portions: int) -> None:
    """Every task once, no stage at two things, nothing before what it waits for."""
    ends = {}
    for stage, spans in enumerate(timeline.stages):
        language = [s.task for s in spans if s.task.kind in ("forward", "backward")]
        assert language == one_f_one_b(stage, stages, microbatches)
        for one, other in itertools.pairwise(spans):
            assert one.end <= other.start
        for span in spans:
            ends[span.task, stage] = span.end
    where = {task: stage for task, stage in ends if task.kind == "encode"}
    assert len(where) == microbatches * portions
    for stage, spans in enumerate(timeline.stages):
        for span in spans:
            task = span.task
            needs: list[tuple[Task, int]] = []
            if task.kind == "forward" and stage == 0:
                parts = [Task("encode", task.microbatch, part) for part in range(portions)]
                needs = [(part, where[part]) for part in parts]
            elif task.kind == "forward":
                needs = [(task, stage - 1)]
            elif task.kind == "backward" and stage == stages - 1:
                needs = [(Task("forward", task.microbatch), stage)]
            elif task.kind == "backward":
                needs = [(task, stage + 1)]
            elif task.kind == "encode_backward":
                assert where[Task("encode", task.microbatch, task.portion)] == stage
                needs = [(Task("backward", task.microbatch), 0)]
            assert all(ends[need] <= span.start for need in needs), span


@pytest.mark.parametrize("share", [0.026, 0.4, 3.0])
@pytest.mark.parametrize("microbatches", [1, 3, 4, 9])
@pytest.mark.parametrize(("stages", "portions"), [(1, 1), (2, 2), (2, 3), (4, 4), (4, 1)])
def test_a_timeline_is_possible(
    stages: int, portions: int, microbatches: int, share: float
) -> None:
    check(fill(stages, microbatches, portions, costs_of(share)), stages, microbatches, portions)


@pytest.mark.parametrize("share", [0.026, 0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize(
    ("stages", "microbatches"), [(4, 16), (4, 64), (8, 16), (8, 32), (16, 16), (16, 32)]
)
def test_greedy_is_within_five_percent_of_ideal(
    stages: int, microbatches: int, share: float
) -> None:
    costs, portions = costs_of(share / 2), 2 * stages
    found = fill(stages, microbatches, portions, costs).length
    best = ideal_length(stages, microbatches, portions, costs)
    # The first microbatch's encoding and the last one's backward have nothing to hide behind.
    exposed = 2 * (costs.encode + costs.encode_backward)
    assert (1 - 1e-9) * best <= found <= 1.05 * best + exposed
    assert found <= three_phase_length(stages, microbatches, portions, costs)


def test_the_window_bounds_what_is_alive() -> None:
    timeline = fill(4, 32, 4, costs_of(0.1), window=5)
    done = sorted(s.end for s in timeline.stages[0] if s.task.kind == "backward")
    for spans in timeline.stages:
        for span in spans:
            if span.task.kind == "encode":
                finished = sum(end <= span.start for end in done)
                assert span.task.microbatch < finished + 5


@pytest.mark.parametrize("share", [0.05, 0.4, 3.0])
@pytest.mark.parametrize(("stages", "portions", "window"), [(2, 1, 4), (2, 2, 3), (4, 4, 6)])
def test_a_stage_holds_its_part_of_the_window(
    stages: int, portions: int, window: int, share: float
) -> None:
    timeline = fill(stages, 24, portions, costs_of(share / portions), window=window)
    for spans in timeline.stages:
        held = most = 0
        for span in spans:
            held += {"encode": 1, "encode_backward": -1}.get(span.task.kind, 0)
            most = max(most, held)
        assert most <= -(-window * portions // stages)


def test_a_stage_goes_back_in_the_order_in_which_it_encoded() -> None:
    for spans in fill(4, 16, 4, costs_of(0.2)).stages:
        for kind in ("encode", "encode_backward"):
            order = [(s.task.microbatch, s.task.portion) for s in spans if s.task.kind == kind]
            assert order == sorted(order)

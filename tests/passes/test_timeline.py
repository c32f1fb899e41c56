"""Covers passes/timeline.py and passes/fill.py: 1F1B, what waits for what, how near to ideal."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import pytest

from colocc.passes.fill import fill, shortest
from colocc.passes.timeline import (
    Costs,
    Task,
    Timeline,
    ideal_length,
    one_f_one_b,
    three_phase_length,
)
from tests.passes.every_cut import every_cut


def costs_of(share: float) -> Costs:
    """A stage's forward takes 1, its backward 2; encoding a microbatch ``share`` of that, and its
    portions a little more."""
    return Costs(1.0, 2.0, share, 2.0 * share, 0.01, 0.02)


def test_a_portion_takes_its_part() -> None:
    costs, cut = Costs(1.0, 2.0, 8.0, 16.0, 0.5, 0.25, (0.5, 1.0)), (1, 4)
    for kind, first, second in (
        ("encode", 8.5, 2.5),
        ("encode_backward", 16.25, 4.25),
        ("forward", 0.5, 0.5),
        ("backward", 1.0, 1.0),
    ):
        tasks = (Task(kind, index) for index in range(2))  # type: ignore[arg-type]
        assert [costs.seconds(task, 0, cut) for task in tasks] == [first, second]
    assert costs.seconds(Task("backward", 0), 1, cut) == 2.0
    assert costs.encoders(cut) == (8.5 + 16.25) + 4 * (2.5 + 4.25)


def test_one_f_one_b_of_two_stages() -> None:
    def order(stage: int) -> str:
        return " ".join(f"{task.kind[0]}{task.microbatch}" for task in one_f_one_b(stage, 2, 3))

    assert order(0) == "f0 f1 b0 f2 b1 b2"
    assert order(1) == "f0 b0 f1 b1 f2 b2"


def test_fewer_microbatches_than_stages() -> None:
    assert [task.kind for task in one_f_one_b(0, 4, 2)] == ["forward"] * 2 + ["backward"] * 2


def check(timeline: Timeline, stages: int, portions: Sequence[int]) -> None:
    """Every task once, no stage at two things, nothing before what it waits for."""
    ends = {}
    for stage, spans in enumerate(timeline.stages):
        language = [s.task for s in spans if s.task.kind in ("forward", "backward")]
        assert language == one_f_one_b(stage, stages, len(portions))
        for one, other in itertools.pairwise(spans):
            assert one.end <= other.start
        for span in spans:
            ends[span.task, stage] = span.end
    where = {task: stage for task, stage in ends if task.kind == "encode"}
    assert len(where) == sum(portions)
    for stage, spans in enumerate(timeline.stages):
        for span in spans:
            task = span.task
            needs: list[tuple[Task, int]] = []
            if task.kind == "forward" and stage == 0:
                count = portions[task.microbatch]
                parts = [Task("encode", task.microbatch, part) for part in range(count)]
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
@pytest.mark.parametrize(
    ("stages", "choices"), [(1, [1]), (2, [2]), (2, [3]), (4, [4]), (4, [1, 2, 3]), (3, [1, 6])]
)
def test_a_timeline_is_possible(
    stages: int, choices: list[int], microbatches: int, share: float
) -> None:
    for portions in every_cut(choices, stages, microbatches):
        check(fill(stages, portions, costs_of(share)), stages, portions)


def test_the_cuts_of_a_step() -> None:
    assert every_cut([1], 2, 3) == [(1, 1, 1)]
    assert every_cut([1, 2, 4], 2, 4) == [
        *[(1, 1, 1, 1), (2, 2, 2, 2), (4, 4, 4, 4)],
        *[(4, 1, 1, 1), (1, 1, 1, 4), (4, 1, 1, 4)],
        *[(4, 2, 2, 2), (2, 2, 2, 4), (4, 2, 2, 4)],
    ]
    # One microbatch is both ends, and of two none is between them.
    assert every_cut([1, 2], 2, 1) == [(1,), (2,)]
    assert every_cut([1, 2], 2, 2) == [(1, 1), (2, 2), (2, 1), (1, 2)]
    assert len(every_cut([1, 2], 2, 8)) == 5
    assert every_cut([1, 2], 2, 9) == [(1,) * 9, (2,) * 9]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("share", [0.1, 1.3, 4.0])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (2, 8), (4, 8)])
def test_hardly_any_cut_is_shorter_than_the_one_that_is_found(
    stages: int, microbatches: int, share: float, apart: bool
) -> None:
    """Ends are tried of the two best counts alone."""
    costs = Costs(1.0, 2.0, share, 2.0 * share, 0.05, 0.1, (1.0,) * (stages - 1) + (1.1,))
    portions, timeline = shortest(stages, [1, 2, 4], microbatches, costs, apart=apart)
    lengths = {
        cut: fill(stages, cut, costs, apart=apart).length
        for cut in every_cut([1, 2, 4], stages, microbatches)
    }
    assert timeline.length == lengths[portions] <= 1.01 * min(lengths.values())


@pytest.mark.parametrize("share", [0.026, 0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize(
    ("stages", "microbatches"), [(4, 16), (4, 64), (8, 16), (8, 32), (16, 16), (16, 32)]
)
def test_greedy_is_within_five_percent_of_ideal(
    stages: int, microbatches: int, share: float
) -> None:
    costs = Costs(1.0, 2.0, share * stages, 2.0 * share * stages)
    portions = (2 * stages,) * microbatches
    found = fill(stages, portions, costs).length
    best = ideal_length(stages, portions, costs)
    # The first microbatch's encoding and the last one's backward have nothing to hide behind.
    exposed = (costs.encode + costs.encode_backward) / stages
    assert (1 - 1e-9) * best <= found <= 1.05 * best + exposed
    assert found <= three_phase_length(stages, portions, costs)


@pytest.mark.parametrize(("stages", "window"), [(4, 5), (2, 3)])
@pytest.mark.parametrize("portions", [(4,) * 31 + (2,), (1,) * 12])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_the_window_bounds_what_is_alive(
    stages: int, window: int, portions: tuple[int, ...], share: float
) -> None:
    timeline = fill(stages, portions, costs_of(share), window=window)
    done = sorted(s.end for s in timeline.stages[0] if s.task.kind == "backward")
    for spans in timeline.stages:
        for span in spans:
            if span.task.kind == "encode":
                finished = sum(end <= span.start for end in done)
                assert span.task.microbatch < finished + window


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.4, 3.0])
@pytest.mark.parametrize(("stages", "portions", "window"), [(2, 1, 4), (2, 2, 3), (4, 4, 6)])
def test_a_stage_holds_its_part_of_the_window(
    stages: int, portions: int, window: int, share: float, apart: bool
) -> None:
    for cut in every_cut([portions, 2 * portions], stages, 8):
        for spans in fill(stages, cut, costs_of(share), window=window, apart=apart).stages:
            held = Fraction()
            for span in spans:
                if span.task.kind == "encode":
                    count = cut[span.task.microbatch]
                    held += Fraction(1, count)
                    # As many portions of its size as reach the stage's part.
                    assert held * count <= ceil(Fraction(window * count, stages))
                elif span.task.kind == "encode_backward":
                    held -= Fraction(1, cut[span.task.microbatch])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.8, 3.0])
@pytest.mark.parametrize(
    ("stages", "portions"), [(2, (1,) * 8 + (2,)), (4, (4,) * 15 + (8,)), (4, (8, *(4,) * 14, 8))]
)
def test_a_stage_goes_back_in_the_order_in_which_it_encoded(
    stages: int, portions: tuple[int, ...], share: float, apart: bool
) -> None:
    for spans in fill(stages, portions, costs_of(share), apart=apart).stages:
        for kind in ("encode", "encode_backward"):
            order = [(s.task.microbatch, s.task.portion) for s in spans if s.task.kind == kind]
            assert order == sorted(order)

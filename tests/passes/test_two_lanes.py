"""Covers passes/two_lanes.py, and passes/fill.py where stages have two lanes."""

import itertools
import math

import pytest

from colocc.passes.fill import fill, interrupted
from colocc.passes.timeline import LANGUAGE, Costs, Task, Timeline, inputs, one_f_one_b
from colocc.passes.two_lanes import Listed, TwoLanes

# Of 2.0B + 1.3B on two H200, in ms: the last stage has the logits, too.
LARGE = Costs(13.3, 26.7, 17.0, 35.0, loads=(0.825, 1.0))


def pipeline(stages: int, microbatches: int) -> list[list[Task]]:
    return [one_f_one_b(stage, stages, microbatches) for stage in range(stages)]


def text(timeline: Timeline, stage: int) -> str:
    letters = {"forward": "F", "backward": "B", "encode": "e", "encode_backward": "g"}
    return " ".join(
        f"{letters[span.task.kind]}{span.task.microbatch}:{span.start:g}-{span.end:g}"
        for span in timeline.stages[stage]
    )


def three_microbatches() -> Timeline:
    """The first is encoded on the first stage, the others on the second, each in five forwards."""
    orders = [
        [Task("encode", 0), Task("encode_backward", 0)],
        [*(Task("encode", i) for i in (1, 2)), *(Task("encode_backward", i) for i in (1, 2))],
    ]
    return TwoLanes(pipeline(2, 3), Listed(orders), 1, Costs(1.0, 2.0, 5.0, 10.0)).play()


def test_the_pipeline_interrupts_an_encoder() -> None:
    played = three_microbatches()
    assert text(played, 0) == ("e0:0-5 F0:5-6 F1:6-7 B0:9-11 g0:11-26 F2:16-17 B1:17-19 B2:20-22")
    assert text(played, 1) == (
        "e1:0-5 e2:5-16 F0:6-7 B0:7-9 F1:9-10 B1:10-12 F2:17-18 B2:18-20 g1:20-30 g2:30-40"
    )


def check(timeline: Timeline, stages: int, microbatches: int, portions: int, costs: Costs) -> None:
    """Every task once, after what it waits for, on two lanes of which one goes first."""
    where = {
        span.task: stage
        for stage, spans in enumerate(timeline.stages)
        for span in spans
        if span.task.kind == "encode"
    }
    assert len(where) == microbatches * portions
    ends = {(s.task, stage): s.end for stage, spans in enumerate(timeline.stages) for s in spans}
    for stage, spans in enumerate(timeline.stages):
        assert [span.start for span in spans] == sorted(span.start for span in spans)
        language = [span for span in spans if span.task.kind in LANGUAGE]
        assert [span.task for span in language] == one_f_one_b(stage, stages, microbatches)
        encoder = [span for span in spans if span.task.kind not in LANGUAGE]
        for lane in (language, encoder):
            for one, other in itertools.pairwise(lane):
                assert one.end <= other.start
        for span in encoder:
            inside = [one for one in language if span.start <= one.start and one.end <= span.end]
            taken = sum(one.end - one.start for one in inside)
            own = costs.seconds(span.task.kind, stage)
            assert span.end - span.start == pytest.approx(own + taken)
        for span in spans:
            if span.task.kind == "encode_backward":
                assert where[Task("encode", span.task.microbatch, span.task.portion)] == stage
            for need, at in inputs(span.task, stage, stages, portions):
                assert ends[need, where[need] if at is None else at] <= span.start


def runs_in_any_case(timeline: Timeline, stages: int, portions: int) -> bool:
    """Whether the lists end if each stage waits at the first task whose inputs are not there."""
    lists = [[span.task for span in spans] for spans in timeline.stages]
    where = {t: s for s, tasks in enumerate(lists) for t in tasks if t.kind == "encode"}
    done: set[tuple[Task, int]] = set()
    moved = True
    while moved:
        moved = False
        for stage, tasks in enumerate(lists):
            while tasks and all(
                (need, where[need] if at is None else at) in done
                for need, at in inputs(tasks[0], stage, stages, portions)
            ):
                done.add((tasks.pop(0), stage))
                moved = True
    return not any(lists)


@pytest.mark.parametrize("share", [0.026, 0.4, 3.0])
@pytest.mark.parametrize("microbatches", [1, 3, 4, 9])
@pytest.mark.parametrize(("stages", "portions"), [(1, 1), (2, 2), (2, 3), (4, 4), (4, 1)])
def test_a_timeline_on_two_lanes_is_possible(
    stages: int, portions: int, microbatches: int, share: float
) -> None:
    loads = tuple(1.0 + 0.1 * stage for stage in range(stages))
    costs = Costs(1.0, 2.0, share, 2.0 * share, loads)
    timeline = fill(stages, microbatches, portions, costs, apart=True)
    check(timeline, stages, microbatches, portions, costs)
    assert runs_in_any_case(timeline, stages, portions)


@pytest.mark.parametrize("share", [0.05, 0.4, 3.0])
@pytest.mark.parametrize(("stages", "portions", "window"), [(2, 1, 4), (2, 2, 3), (4, 4, 6)])
def test_a_stage_holds_its_part_of_the_window(
    stages: int, portions: int, window: int, share: float
) -> None:
    costs = Costs(1.0, 2.0, share / portions, 2.0 * share / portions)
    for spans in fill(stages, 24, portions, costs, window=window, apart=True).stages:
        held = most = 0
        for span in spans:
            held += {"encode": 1, "encode_backward": -1}.get(span.task.kind, 0)
            most = max(most, held)
        assert most <= math.ceil(window * portions / stages)


@pytest.mark.parametrize("share", [0.05, 0.4, 3.0])
@pytest.mark.parametrize(("stages", "microbatches", "portions"), [(2, 9, 1), (4, 16, 4)])
def test_a_stage_goes_back_in_the_order_in_which_it_encoded(
    stages: int, microbatches: int, portions: int, share: float
) -> None:
    costs = Costs(1.0, 2.0, share / portions, 2.0 * share / portions)
    for spans in fill(stages, microbatches, portions, costs, apart=True).stages:
        for kind in ("encode", "encode_backward"):
            order = [(s.task.microbatch, s.task.portion) for s in spans if s.task.kind == kind]
            assert order == sorted(order)


class Split:
    """One microbatch after the other, each on a stage that is given."""

    def __init__(self, stages: tuple[int, ...], *, back_first: bool) -> None:
        self.todo = [[i for i, at in enumerate(stages) if at == stage] for stage in range(2)]
        self.mine: list[list[int]] = [[], []]
        self.back_first, self.returned = back_first, set[int]()

    def next(self, stage: int) -> Task | None:
        encode = [Task("encode", index) for index in self.todo[stage][:1]]
        back = [Task("encode_backward", i) for i in self.mine[stage] if i in self.returned]
        return next(iter(back + encode if self.back_first else encode + back), None)

    def start(self, stage: int, task: Task) -> None:
        (self.todo if task.kind == "encode" else self.mine)[stage].remove(task.microbatch)

    def end(self, stage: int, task: Task) -> None:
        if task.kind == "encode":
            self.mine[stage].append(task.microbatch)
        elif task.kind == "backward" and stage == 0:
            self.returned.add(task.microbatch)


def test_no_split_of_four_microbatches_is_shorter() -> None:
    found = fill(2, 4, 1, LARGE, apart=True)
    lengths = [
        TwoLanes(pipeline(2, 4), Split(split, back_first=back), 1, LARGE).play().length
        for split in itertools.product(range(2), repeat=4)
        for back in (False, True)
    ]
    assert found.length <= min(lengths) + 1e-9
    # What one lane would choose takes 4 % longer.
    alone = [[span.task for span in spans] for spans in fill(2, 4, 1, LARGE).stages]
    assert TwoLanes(pipeline(2, 4), Listed(alone), 1, LARGE).play().length > 1.04 * found.length


def test_of_steps_as_short_the_one_that_interrupts_least() -> None:
    # Stage 0: F2, B1 and B2 behind g0; stage 1: F0, B0, F1 and B1 behind e2.
    assert interrupted(three_microbatches()) == (1 + 2 + 2) + (1 + 2 + 1 + 2)
    # So small an encoder finds room in the bubbles.
    small = fill(2, 8, 1, Costs(1.0, 2.0, 0.05, 0.1), apart=True)
    assert interrupted(small) == 0.0
    costs = Costs(1.0, 2.0, 2.0, 4.0, loads=(1.0, 1.1))
    with pytest.MonkeyPatch.context() as patch:
        careful = fill(2, 8, 2, costs, apart=True)
        patch.setattr("colocc.passes.fill.interrupted", lambda timeline: 0.0)
        careless = fill(2, 8, 2, costs, apart=True)
    assert careful.length == pytest.approx(careless.length)
    assert interrupted(careful) < 0.7 * interrupted(careless)


def test_more_lists_than_those_of_one_lane_are_tried() -> None:
    costs = Costs(1.0, 2.0, 0.15, 0.3, (1.0,) * 7 + (1.08,))
    alone = [[span.task for span in spans] for spans in fill(8, 64, 4, costs).stages]
    played = TwoLanes(pipeline(8, 64), Listed(alone), 4, costs).play()
    assert fill(8, 64, 4, costs, apart=True).length < 0.98 * played.length

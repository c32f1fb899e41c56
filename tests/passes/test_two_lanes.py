"""Covers passes/two_lanes.py, and passes/fill.py where stages have two lanes."""

import itertools
from collections.abc import Iterator, Sequence

import pytest

from colocc.passes.fill import fill, interrupted
from colocc.passes.timeline import LANGUAGE, Costs, Task, Timeline, inputs, one_f_one_b
from colocc.passes.two_lanes import LANGUAGE_SHARE, Listed, TwoLanes
from tests.passes.every_cut import every_cut

# Of 2.0B + 1.3B on two H200, in ms: the last stage has the logits, too.
LARGE = Costs(13.3, 26.7, 15.0, 31.0, 2.0, 4.0, (0.825, 1.0))


def pipeline(stages: int, microbatches: int) -> list[list[Task]]:
    return [one_f_one_b(stage, stages, microbatches) for stage in range(stages)]


def text(timeline: Timeline, stage: int) -> str:
    letters = {"forward": "F", "backward": "B", "encode": "e", "encode_backward": "g"}
    return " ".join(
        f"{letters[span.task.kind]}{span.task.microbatch}:{span.start:g}-{span.end:g}"
        for span in timeline.stages[stage]
    )


def three_microbatches() -> Timeline:
    """The first is encoded on the first stage, the others on the second."""
    orders = [
        [Task("encode", 0), Task("encode_backward", 0)],
        [*(Task("encode", i) for i in (1, 2)), *(Task("encode_backward", i) for i in (1, 2))],
    ]
    return TwoLanes(pipeline(2, 3), Listed(orders), (1, 1, 1), Costs(0.6, 1.2, 5.0, 10.0)).play()


def test_lanes_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colocc.passes.two_lanes.LANGUAGE_SHARE", 0.6)
    played = three_microbatches()
    # Beside an encoder's task, F takes 1 s and B 2 s; it takes 2.5 times as long beside them.
    assert text(played, 0) == (
        "e0:0-5 F0:5-5.6 F1:5.6-6.2 B0:8.6-9.8 g0:9.8-22.8 F2:13.6-14.6 B1:14.6-16.6 B2:16.6-18.6"
    )
    assert text(played, 1) == (
        "e1:0-5 e2:5-13.6 F0:5.6-6.6 B0:6.6-8.6 F1:8.6-9.6 B1:9.6-11.6 F2:14.6-15.2 "
        "B2:15.2-16.4 g1:16.6-26.6 g2:26.6-36.6"
    )


def test_what_was_measured_beside_an_encoder() -> None:
    """Language tasks took 1.2 times as long in the mean; e2 is beside F0 on the second stage."""
    spans = {span.task: span for span in three_microbatches().stages[1]}
    first, beside = spans[Task("forward", 0)], spans[Task("encode", 2)]
    assert beside.start <= first.start
    assert first.end <= beside.end
    assert first.end - first.start == pytest.approx(1.2 * 0.6, rel=0.01)


def check(timeline: Timeline, stages: int, portions: Sequence[int], costs: Costs) -> None:
    """Every task once, after what it waits for, on two lanes that share a GPU."""
    where = {
        span.task: stage
        for stage, spans in enumerate(timeline.stages)
        for span in spans
        if span.task.kind == "encode"
    }
    assert len(where) == sum(portions)
    ends = {(s.task, stage): s.end for stage, spans in enumerate(timeline.stages) for s in spans}
    for stage, spans in enumerate(timeline.stages):
        assert [span.start for span in spans] == sorted(span.start for span in spans)
        language = [span for span in spans if span.task.kind in LANGUAGE]
        assert [span.task for span in language] == one_f_one_b(stage, stages, len(portions))
        encoder = [span for span in spans if span.task.kind not in LANGUAGE]
        for lane in (language, encoder):
            for one, other in itertools.pairwise(lane):
                assert one.end <= other.start
        for lane, beside_it, given in (
            (language, encoder, LANGUAGE_SHARE),
            (encoder, language, 1 - LANGUAGE_SHARE),
        ):
            for span in lane:
                beside = sum(
                    max(0.0, min(span.end, one.end) - max(span.start, one.start))
                    for one in beside_it
                )
                done = span.end - span.start - beside + given * beside
                assert done == pytest.approx(costs.seconds(span.task, stage, portions))
        for span in spans:
            if span.task.kind == "encode_backward":
                assert where[Task("encode", span.task.microbatch, span.task.portion)] == stage
            for need, at in inputs(span.task, stage, stages, portions):
                assert ends[need, where[need] if at is None else at] <= span.start


def runs_in_any_case(timeline: Timeline, stages: int, portions: Sequence[int]) -> bool:
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
@pytest.mark.parametrize(
    ("stages", "choices"), [(1, [1]), (2, [2]), (2, [1, 3]), (4, [4]), (4, [1, 2]), (3, [1, 6])]
)
def test_a_timeline_on_two_lanes_is_possible(
    stages: int, choices: list[int], microbatches: int, share: float
) -> None:
    loads = tuple(1.0 + 0.1 * stage for stage in range(stages))
    costs = Costs(1.0, 2.0, share, 2.0 * share, 0.01, 0.02, loads)
    for portions in every_cut(choices, stages, microbatches):
        timeline = fill(stages, portions, costs, apart=True)
        check(timeline, stages, portions, costs)
        assert runs_in_any_case(timeline, stages, portions)


class Split:
    """One portion after the other, each on a stage that is given."""

    def __init__(self, stages: dict[Task, int], *, back_first: bool) -> None:
        self.todo = [[task for task, at in stages.items() if at == stage] for stage in range(2)]
        self.mine: list[list[Task]] = [[], []]
        self.back_first, self.returned = back_first, set[int]()

    def next(self, stage: int) -> Task | None:
        encode = self.todo[stage][:1]
        back = [
            Task("encode_backward", task.microbatch, task.portion)
            for task in self.mine[stage]
            if task.microbatch in self.returned
        ]
        return next(iter(back + encode if self.back_first else encode + back), None)

    def start(self, stage: int, task: Task) -> None:
        if task.kind == "encode":
            self.todo[stage].remove(task)
        else:
            self.mine[stage].remove(Task("encode", task.microbatch, task.portion))

    def end(self, stage: int, task: Task) -> None:
        if task.kind == "encode":
            self.mine[stage].append(task)
        elif task.kind == "backward" and stage == 0:
            self.returned.add(task.microbatch)


def splits_of(cut: Sequence[int]) -> Iterator[float]:
    """How long a step takes with every way to deal the portions to two stages."""
    portions = [Task("encode", index, part) for index, n in enumerate(cut) for part in range(n)]
    for stages in itertools.product(range(2), repeat=len(portions)):
        for back in (False, True):
            split = Split(dict(zip(portions, stages, strict=True)), back_first=back)
            yield TwoLanes(pipeline(2, len(cut)), split, cut, LARGE).play().length


def test_hardly_any_split_of_four_microbatches_is_shorter() -> None:
    tried = every_cut([1, 2], 2, 4)
    found = {cut: fill(2, cut, LARGE, apart=True).length for cut in tried}
    shortest = min(found.values())
    assert shortest <= 1.01 * min(min(splits_of(cut)) for cut in tried)


def test_portions_of_their_own_size_at_the_ends() -> None:
    whole, halves, *uneven = every_cut([1, 2], 2, 8)
    alike = min(fill(2, cut, LARGE, apart=True).length for cut in (whole, halves))
    found = min(fill(2, cut, LARGE, apart=True).length for cut in uneven)
    assert found < 0.97 * alike


def test_of_steps_as_short_the_one_that_interrupts_least() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("colocc.passes.two_lanes.LANGUAGE_SHARE", 0.6)
        # Stage 0: F2, B1 and B2 behind g0; stage 1: F0, B0, F1 and B1 behind e2.
        assert interrupted(three_microbatches()) == pytest.approx((1 + 2 + 2) + (1 + 2 + 1 + 2))
    # So small an encoder finds room in the bubbles.
    small = fill(2, (1,) * 8, Costs(1.0, 2.0, 0.05, 0.1), apart=True)
    assert interrupted(small) == 0.0
    costs = Costs(1.0, 2.0, 4.0, 8.0, loads=(1.0, 1.1))
    with pytest.MonkeyPatch.context() as patch:
        careful = fill(2, (2,) * 8, costs, apart=True)
        patch.setattr("colocc.passes.fill.interrupted", lambda timeline: 0.0)
        careless = fill(2, (2,) * 8, costs, apart=True)
    assert careful.length == pytest.approx(careless.length)
    assert interrupted(careful) < 0.7 * interrupted(careless)


def test_more_lists_than_those_of_one_lane_are_tried() -> None:
    costs = Costs(1.0, 2.0, 0.6, 1.2, loads=(1.0,) * 7 + (1.08,))
    portions = (2,) * 32
    alone = [[span.task for span in spans] for spans in fill(8, portions, costs).stages]
    played = TwoLanes(pipeline(8, 32), Listed(alone), portions, costs).play()
    assert fill(8, portions, costs, apart=True).length < 0.99 * played.length

"""Covers passes/places.py."""

import itertools
from collections.abc import Sequence

import pytest

from colocc.passes.fill import fill
from colocc.passes.places import Ask, Places, places_of, places_of_forwards
from colocc.passes.timeline import LANGUAGE, Costs, Span, Task, Timeline, inputs
from tests.passes.kit import every_cut


def spans(text: str) -> tuple[Span, ...]:
    """Such as "e0 0-2, F0 2-3": encode, forward, backward, and g for an encoder's backward."""
    kinds = {"e": "encode", "F": "forward", "B": "backward", "g": "encode_backward"}
    found = []
    for part in text.split(", "):
        name, _, times = part.partition(" ")
        start, _, end = times.partition("-")
        task = Task(kinds[name[0]], int(name[1:]))  # type: ignore[arg-type]
        found.append(Span(task, float(start), float(end)))
    return tuple(found)


def names(lists: Sequence[Sequence[Task | Ask]]) -> str:
    """The lists with bars between; ? before what is asked for."""
    letters = {"forward": "F", "backward": "B", "encode": "e", "encode_backward": "g"}

    def name(step: Task | Ask) -> str:
        if isinstance(step, Ask):
            return "?" + name(step.task)
        return letters[step.kind] + str(step.microbatch)

    return " | ".join(" ".join(map(name, each)) for each in lists)


TWO = Timeline(
    (
        spans("e0 0-2, F0 2-3, F1 3-4, B0 6-8, F2 9-10, g0 9-17, B1 12-14, B2 14-16"),
        spans(
            "e1 0-2, e2 2-9, F0 3-4, B0 4-6, F1 6-7, B1 7-9, F2 10-11, B2 11-13, g1 14-18, g2 18-22"
        ),
    )
)


def test_what_a_stage_does_and_asks_for() -> None:
    first = places_of(TWO, 0, (1, 1, 1))
    # e0 and e1 are made at 2, when F0 starts. B0 of the other stage ends at 6, when it starts here,
    # and goes back at 8; B1 and e2 are made at 9, with F2; B2 at 13, while g0 and B1 run.
    assert names(first.before) == "e0 ?e0 ?e1 |  | ?B0 | ?g0 ?e2 ?B1 | g0 | ?B2 | "
    last = places_of(TWO, 1, (1, 1, 1))
    # F1 is sent at 4, when B0 starts; B1 has gone back at 14 and B2 at 16, behind all of them.
    assert names(last.before) == "e1 e2 ?F0 | ?F1 |  |  | ?F2 |  | ?g1 g1 ?g2 g2"
    assert first.stage_of == last.stage_of == {(0, 0): 0, (1, 0): 1, (2, 0): 1}
    assert first.last_backward() is None
    assert last.last_backward() == Task("encode_backward", 2)


def test_forwards_alone() -> None:
    first = places_of_forwards(TWO, 0, (1, 1, 1))
    assert names(first.before) == "e0 |  |  | "
    assert names(places_of_forwards(TWO, 1, (1, 1, 1)).before) == " | e1 | e2 | "


def test_the_portions_of_a_forward_are_in_order() -> None:
    cut = (1, 4, 2)
    timeline = fill(2, cut, Costs(1.0, 2.0, 1.0, 2.0))
    several = 0
    for stage in range(2):
        places = places_of_forwards(timeline, stage, cut)
        for microbatch, steps in enumerate(places.before[:-1]):
            tasks = [step for step in steps if isinstance(step, Task)]
            assert tasks == steps
            assert [task.microbatch for task in tasks] == [microbatch] * len(tasks)
            found = [task.portion for task in tasks]
            assert found == sorted(found)
            several += len(found) > 1
    # As they are asked for: a sender's messages have no names.
    assert several


def listed(places: Places, timeline: Timeline, stage: int) -> list[Task | Ask]:
    """What the host of ``stage`` does, in order, with the language tasks."""
    language = [span.task for span in timeline.stages[stage] if span.task.kind in LANGUAGE]
    found: list[Task | Ask] = []
    for steps, task in itertools.zip_longest(places.before, language):
        found += steps
        found += [task] if task is not None else []
    return found


@pytest.mark.parametrize("share", [0.1, 0.8, 3.0])
@pytest.mark.parametrize(
    ("stages", "microbatches", "apart"), [(2, 6, True), (4, 9, True), (3, 7, False)]
)
def test_messages_are_asked_for_when_they_are_sent(
    stages: int, microbatches: int, apart: bool, share: float
) -> None:
    costs = Costs(1.0, 2.0, share, 2.0 * share, 0.01, 0.02, (1.0,) * (stages - 1) + (1.1,))
    for portions in every_cut([1, 2], stages, microbatches):
        timeline = fill(stages, portions, costs, apart=apart)
        spans_of = {
            (span.task, stage): span for stage, each in enumerate(timeline.stages) for span in each
        }
        for stage in range(stages):
            places = places_of(timeline, stage, portions)
            order = listed(places, timeline, stage)
            tasks = [step for step in order if isinstance(step, Task)]
            assert tasks == [span.task for span in timeline.stages[stage]]
            asked = [step.task for step in order if isinstance(step, Ask)]
            assert len(asked) == len(set(asked))
            wanted = set()
            for task in tasks:
                for need, at in inputs(task, stage, stages, portions):
                    sender = places.stage_of[need.microbatch, need.portion] if at is None else at
                    # The first stage asks for all embeddings, its own replica's or not.
                    if at is None:
                        wanted.add(need)
                        ask = need
                    elif task.kind == "encode_backward" or at != stage:
                        wanted.add(task)
                        ask = task
                    else:
                        continue
                    place, sent = order.index(Ask(ask)), spans_of[need, sender].end
                    assert place < order.index(task)
                    # Behind all that starts before it is sent, and before all that starts later.
                    for index, step in enumerate(order):
                        if isinstance(step, Task):
                            assert (spans_of[step, stage].start < sent) == (index < place)
            assert set(asked) == wanted
            # Those of one sender and kind are asked for in its order: they have no names.
            for kind in ("forward", "backward", "encode_backward"):
                mine = [task for task in asked if task.kind == kind]
                assert mine == sorted(mine, key=lambda task: (task.microbatch, task.portion))
            for sender in range(stages):
                theirs = [
                    task
                    for task in asked
                    if task.kind == "encode"
                    and places.stage_of[task.microbatch, task.portion] == sender
                ]
                made = [s.task for s in timeline.stages[sender] if s.task.kind == "encode"]
                assert theirs == (made if stage == 0 else [])

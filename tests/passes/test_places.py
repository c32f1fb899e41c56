"""Covers passes/places.py."""

import pytest

from colocc.passes.fill import cuts, fill
from colocc.passes.places import Places, places_of, places_of_forwards
from colocc.passes.timeline import LANGUAGE, Costs, Span, Task, Timeline


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


def names(lists: list[list[Task]]) -> str:
    letters = {"forward": "F", "backward": "B", "encode": "e", "encode_backward": "g"}
    return " | ".join(" ".join(letters[t.kind] + str(t.microbatch) for t in each) for each in lists)


TWO = Timeline(
    (
        spans("e0 0-2, F0 2-3, F1 3-4, B0 6-8, F2 9-10, g0 9-17, B1 12-14, B2 14-16"),
        spans(
            "e1 0-2, e2 2-9, F0 3-4, B0 4-6, F1 6-7, B1 7-9, F2 10-11, B2 11-13, g1 14-18, g2 18-22"
        ),
    )
)


def test_what_a_stage_does_and_what_is_on_its_way() -> None:
    first = places_of(TWO, 0, (1, 1, 1))
    assert names(first.before) == "e0 |  |  |  | g0 |  | "
    # e0 and e1 are made at 2, when F0 starts; B0 has gone back at 8, and e2 is made at 9, with F2.
    assert names(first.coming) == "e0 e1 |  |  | g0 e2 |  |  | "
    last = places_of(TWO, 1, (1, 1, 1))
    assert names(last.before) == "e1 e2 |  |  |  |  |  | g1 g2"
    # B1 has gone back at 14 and B2 at 16, when no language task is left.
    assert names(last.coming) == " |  |  |  |  |  | g1 g2"
    assert first.stage_of == last.stage_of == {(0, 0): 0, (1, 0): 1, (2, 0): 1}


def test_forwards_alone() -> None:
    first = places_of_forwards(TWO, 0, (1, 1, 1))
    assert names(first.before) == "e0 |  |  | "
    assert names(places_of_forwards(TWO, 1, (1, 1, 1)).before) == " | e1 | e2 | "
    assert names(first.coming) == " |  |  | "


def test_the_portions_of_a_forward_are_in_order() -> None:
    cut = (1, 4, 2)
    timeline = fill(2, cut, Costs(1.0, 2.0, 1.0, 2.0))
    several = 0
    for stage in range(2):
        places = places_of_forwards(timeline, stage, cut)
        for microbatch, tasks in enumerate(places.before[:-1]):
            assert [task.microbatch for task in tasks] == [microbatch] * len(tasks)
            found = [task.portion for task in tasks]
            assert found == sorted(found)
            several += len(found) > 1
    # As they are asked for: a sender's messages have no names.
    assert several


def uses(places: Places, timeline: Timeline, stage: int) -> dict[Task, int]:
    """By what must have come, the place where it is needed."""
    language = [span.task for span in timeline.stages[stage] if span.task.kind in LANGUAGE]
    found = {
        Task("encode", task.microbatch, portion): place
        for place, task in enumerate(language)
        if stage == 0 and task.kind == "forward"
        for portion in range(places.portions[task.microbatch])
    }
    for place, tasks in enumerate(places.before):
        found |= dict.fromkeys([t for t in tasks if t.kind == "encode_backward"], place)
    return found


@pytest.mark.parametrize("share", [0.1, 0.8, 3.0])
@pytest.mark.parametrize(
    ("stages", "microbatches", "apart"), [(2, 6, True), (4, 9, True), (3, 7, False)]
)
def test_messages_come_when_they_are_sent_and_before_they_are_used(
    stages: int, microbatches: int, apart: bool, share: float
) -> None:
    costs = Costs(1.0, 2.0, share, 2.0 * share, 0.01, 0.02, (1.0,) * (stages - 1) + (1.1,))
    for portions in cuts([1, 2], stages, microbatches):
        timeline = fill(stages, portions, costs, apart=apart)
        ends = {
            (span.task, stage): span.end
            for stage, each in enumerate(timeline.stages)
            for span in each
        }
        orders = [[span.task for span in each] for each in timeline.stages]
        for stage in range(stages):
            places = places_of(timeline, stage, portions)
            came = {task: place for place, each in enumerate(places.coming) for task in each}
            needed = uses(places, timeline, stage)
            assert came.keys() == needed.keys()
            assert sum(map(len, places.coming)) == len(came)
            language = [span for span in timeline.stages[stage] if span.task.kind in LANGUAGE]
            for task, place in came.items():
                assert place <= needed[task]
                if task.kind == "encode":
                    sent = ends[task, places.stage_of[task.microbatch, task.portion]]
                else:
                    sent = ends[Task("backward", task.microbatch), 0]
                # Behind no task that starts when, or after, it was sent; and behind all others.
                assert all(span.start < sent for span in language[:place])
                assert place == len(language) or language[place].start >= sent
            # Those of one sender come in its order.
            for sender in range(stages):
                theirs = [
                    task
                    for each in places.coming
                    for task in each
                    if task.kind == "encode"
                    and places.stage_of[task.microbatch, task.portion] == sender
                ]
                if stage == 0:
                    assert theirs == [task for task in orders[sender] if task.kind == "encode"]
            gradients = [t for each in places.coming for t in each if t.kind == "encode_backward"]
            assert gradients == sorted(gradients, key=lambda t: (t.microbatch, t.portion))

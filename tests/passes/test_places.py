"""Covers passes/places.py."""

import itertools
from collections.abc import Sequence

import pytest

from colocc.passes.fill import fill
from colocc.passes.places import Ask, Places, Send, Step, places_of, places_of_forwards
from colocc.passes.timeline import LANGUAGE, Costs, Span, Task, Timeline, inputs
from tests.passes.every_cut import every_cut


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


def names(lists: Sequence[Sequence[Step]]) -> str:
    """The lists with bars between; ? before what is asked for, ! before what is sent."""
    letters = {"forward": "F", "backward": "B", "encode": "e", "encode_backward": "g"}

    def name(step: Step) -> str:
        if not isinstance(step, Task):
            return ("?" if isinstance(step, Ask) else "!") + name(step.task)
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
    assert (
        names(first.before)
        == "e0 !e0 ?e0 ?e1 | !F0 | !F1 ?B0 | !B0 ?g0 ?e2 ?B1 | g0 !F2 | ?B2 !B1 | !B2"
    )
    last = places_of(TWO, 1, (1, 1, 1))
    # F1 is sent at 4, when B0 starts; e2 at 9, behind what starts beside it; B1 has gone back at 14
    # and B2 at 16, behind all of them.
    assert (
        names(last.before)
        == "e1 !e1 e2 ?F0 | ?F1 !F0 | !B0 | !F1 | !e2 !B1 ?F2 | !F2 | !B2 ?g1 g1 ?g2 g2"
    )
    assert first.stage_of == last.stage_of == {(0, 0): 0, (1, 0): 1, (2, 0): 1}
    assert first.last_backward() is None
    assert last.last_backward() == Task("encode_backward", 2)


def test_forwards_alone() -> None:
    first = places_of_forwards(TWO, 0, (1, 1, 1))
    assert names(first.before) == "e0 !e0 | !F0 | !F1 | !F2"
    assert names(places_of_forwards(TWO, 1, (1, 1, 1)).before) == " | !F0 e1 !e1 | !F1 e2 !e2 | !F2"


def test_the_portions_of_a_forward_are_in_order() -> None:
    cut = (1, 4, 2)
    timeline = fill(2, cut, Costs(1.0, 2.0, 1.0, 2.0))
    several = 0
    for stage in range(2):
        places = places_of_forwards(timeline, stage, cut)
        for microbatch, steps in enumerate(places.before[:-1]):
            tasks = [step for step in steps if isinstance(step, Task)]
            sent = [step.task for step in steps if isinstance(step, Send)]
            assert sent[:1] == ([Task("forward", microbatch - 1)] if microbatch else sent[:1])
            assert sent[bool(microbatch) :] == tasks
            assert len(steps) == len(tasks) + len(sent)
            assert [task.microbatch for task in tasks] == [microbatch] * len(tasks)
            found = [task.portion for task in tasks]
            assert found == sorted(found)
            several += len(found) > 1
    # As they are asked for: a sender's messages have no names.
    assert several


def listed(places: Places, timeline: Timeline, stage: int) -> list[Step]:
    """What the host of ``stage`` does, in order, with the language tasks."""
    language = [span.task for span in timeline.stages[stage] if span.task.kind in LANGUAGE]
    found: list[Step] = []
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


def test_a_message_is_sent_behind_its_task_and_before_what_starts_later() -> None:
    costs = Costs(1.0, 2.0, 3.0, 6.0, 0.01, 0.02, (1.0, 1.0, 1.0, 1.1))
    portions, beside = (1,) * 9, 0
    timeline = fill(4, portions, costs, apart=True)
    for stage, each in enumerate(timeline.stages):
        span_of = {span.task: span for span in each}
        order = listed(places_of(timeline, stage, portions), timeline, stage)
        made = [span.task for span in each if span.task.kind != "encode_backward"]
        sent = {step.task: place for place, step in enumerate(order) if isinstance(step, Send)}
        assert sorted(sent, key=made.index) == made
        for task, place in sent.items():
            for index, step in enumerate(order):
                if isinstance(step, Task):
                    assert (span_of[step].start < span_of[task].end) == (index < place)
            between = order[order.index(task) + 1 : place]
            beside += any(isinstance(step, Task) for step in between)
    # Language tasks that start while an encoder's runs beside them.
    assert beside


def stand_still(timeline: Timeline, portions: tuple[int, ...]) -> list[Step]:
    """What stages are at when none goes on, if each waits after every step for all that it has
    launched: a send and what asks for it end together."""
    stages = range(len(timeline.stages))
    orders = [listed(places_of(timeline, stage, portions), timeline, stage) for stage in stages]
    place_of = [{step: place for place, step in enumerate(order)} for order in orders]
    stage_of = places_of(timeline, 0, portions).stage_of
    at = [0] * len(orders)

    def peers(step: Ask | Send, stage: int) -> list[tuple[int, Step]]:
        task, here = step.task, isinstance(step, Send)
        found: list[tuple[int, Step]]
        if task.kind == "encode":
            maker = stage_of[task.microbatch, task.portion]
            found = [(0, Ask(task))] if here else [(maker, Send(task))]
        elif task.kind == "encode_backward":
            found = [(0, Send(Task("backward", task.microbatch)))]
        else:
            step_to = 1 if (task.kind == "forward") == here else -1
            found = [(stage + step_to, Ask(task) if here else Send(task))]
        if here and task == Task("backward", task.microbatch) and stage == 0:
            back = [
                Task("encode_backward", task.microbatch, i)
                for i in range(portions[task.microbatch])
            ]
            found += [(stage_of[one.microbatch, one.portion], Ask(one)) for one in back]
        return [(peer, other) for peer, other in found if peer != stage and peer in stages]

    def passes(stage: int, step: Step) -> bool:
        if isinstance(step, Task):
            return all(
                at[stage_of[need.microbatch, need.portion] if of is None else of]
                > place_of[stage_of[need.microbatch, need.portion] if of is None else of][need]
                for need, of in inputs(step, stage, len(orders), portions)
            )
        return all(at[peer] >= place_of[peer][other] for peer, other in peers(step, stage))

    moving = True
    while moving:
        moving = False
        for stage, order in enumerate(orders):
            while at[stage] < len(order) and passes(stage, order[at[stage]]):
                at[stage] += 1
                moving = True
    return [order[place] for order, place in zip(orders, at, strict=True) if place < len(order)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("portions", [(1,), (1, 2), (2, 1, 3, 1, 2), (1,) * 8])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_hosts_that_wait_for_all_that_they_launched_go_on(
    stages: int, portions: tuple[int, ...], apart: bool
) -> None:
    some = (0.5,) + (1.0,) * (stages - 1)
    for loads in ((), some, (0.0, *some[1:]), (*some[1:], 0.0), (0.0,) * stages):
        for encode in (0.0, 0.1, 1.0, 4.0):
            for back in (0.0, encode):
                costs = Costs(1.0, 2.0, encode, back, 0.0, 0.0, loads)
                timeline = fill(stages, portions, costs, apart=apart)
                assert stand_still(timeline, portions) == []

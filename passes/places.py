"""Read a timeline as what one stage does before each of its language tasks, and after the last."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from colocc.passes.timeline import LANGUAGE, Task, Timeline


@dataclass(frozen=True)
class Places:
    """What one stage does before each of its language tasks, and after the last.

    ``before``: the encoders' tasks. ``coming``: the messages that are under way by then, each as
    the task that makes it, if it encodes, or that waits for it, if it is a backward. ``stage_of``:
    the stage that encodes each (microbatch, portion); ``portions``: how many a microbatch has.
    """

    before: list[list[Task]]
    coming: list[list[Task]]
    stage_of: dict[tuple[int, int], int]
    portions: tuple[int, ...]


def places_of(timeline: Timeline, stage: int, portions: tuple[int, ...]) -> Places:
    """The places of ``stage`` in a step that trains.

    A message is asked for when its sender is done with it. Between GPUs it is a kernel on both,
    which takes their multiprocessors as long as it spins for the other. It is behind the language
    tasks that have started by then: these wait for no task that does, so all still come to an end.
    """
    starts: list[float] = []
    before: list[list[Task]] = [[]]
    for span in timeline.stages[stage]:
        if span.task.kind in LANGUAGE:
            starts.append(span.start)
            before.append([])
        else:
            before[-1].append(span.task)
    coming: list[list[Task]] = [[] for _ in before]
    for sent, task in sorted(_messages(timeline, stage), key=lambda found: found[0]):
        coming[bisect_left(starts, sent)].append(task)
    return Places(before, coming, _stage_of(timeline), portions)


def _messages(timeline: Timeline, stage: int) -> list[tuple[float, Task]]:
    """What ``stage`` may get, with the time from which it can; of one time, in order."""
    found = []
    if stage == 0:
        found += [
            (span.end, span.task)
            for spans in timeline.stages
            for span in spans
            if span.task.kind == "encode"
        ]
    returned = {
        span.task.microbatch: span.end
        for span in timeline.stages[0]
        if span.task.kind == "backward"
    }
    mine = [span.task for span in timeline.stages[stage] if span.task.kind == "encode_backward"]
    in_order = sorted(mine, key=lambda task: (task.microbatch, task.portion))
    return found + [(returned[task.microbatch], task) for task in in_order]


def places_of_forwards(timeline: Timeline, stage: int, portions: tuple[int, ...]) -> Places:
    """The places of ``stage`` in a step of forwards alone: each behind the portions of its own
    microbatch, with messages asked for where they are needed."""
    stage_of = _stage_of(timeline)
    before = [
        [
            Task("encode", microbatch, portion)
            for portion in range(count)
            if stage_of[microbatch, portion] == stage
        ]
        for microbatch, count in enumerate(portions)
    ]
    return Places([*before, []], [[] for _ in (*before, None)], stage_of, portions)


def _stage_of(timeline: Timeline) -> dict[tuple[int, int], int]:
    return {
        (span.task.microbatch, span.task.portion): stage
        for stage, spans in enumerate(timeline.stages)
        for span in spans
        if span.task.kind == "encode"
    }

"""Read a timeline as what one stage does before each of its language tasks, and after the last."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass

from colocc.passes.timeline import LANGUAGE, Task, Timeline, inputs


@dataclass(frozen=True, slots=True)
class Ask:
    """Have peers' messages come: what ``task`` makes, if it encodes, else what it waits for."""

    task: Task


@dataclass(frozen=True, slots=True)
class Send:
    """Have what ``task`` of this stage made go to peers."""

    task: Task


Step = Task | Ask | Send


@dataclass(frozen=True)
class Places:
    """What one stage does before each of its language tasks, and after the last.

    ``before``: the encoders' tasks, and the messages to send and to ask for. ``stage_of``: the
    stage that encodes each (microbatch, portion); ``portions``: how many a microbatch has.
    """

    before: list[list[Step]]
    stage_of: dict[tuple[int, int], int]
    portions: tuple[int, ...]

    def last_backward(self) -> Task | None:
        """The last task of the step, if it is an encoder's backward."""
        tasks = [step for step in self.before[-1] if isinstance(step, Task)]
        return tasks[-1] if tasks else None


def places_of(timeline: Timeline, stage: int, portions: tuple[int, ...]) -> Places:
    """The places of ``stage`` in a step that trains.

    A message is sent, and asked for, when what makes it ends: between GPUs it is a kernel on both,
    which takes their multiprocessors as long as it spins for the other. So both ends are behind all
    tasks that start earlier, which do not wait for it, and before all that start later. Starts and
    ends have one order on all stages, and what comes first in it waits for nothing that its hosts
    have yet to launch: so also hosts that wait for their GPUs, as CUDA may have them do, go on.
    """
    before: list[list[Step]] = [[]]
    stage_of = _stage_of(timeline)
    for event in _in_order(timeline, stage_of, portions):
        if event.at == stage and event.starts:
            if event.task.kind in LANGUAGE:
                before.append([])
            else:
                before[-1].append(event.task)
        elif not event.starts:
            before[-1] += _messages(event, stage, stage_of, portions)
    return Places(before, stage_of, portions)


@dataclass(frozen=True, slots=True)
class _Event:
    """The start or the end of ``task`` on stage ``at``."""

    task: Task
    at: int
    starts: bool


def _in_order(
    timeline: Timeline, stage_of: dict[tuple[int, int], int], portions: tuple[int, ...]
) -> list[_Event]:
    """All starts and ends in the order of their times; of those at one time, ends are first, but
    nothing before what it waits for: a task may take no time."""
    times: dict[_Event, tuple[float, bool, int, int]] = {}
    waits: dict[_Event, int] = {}
    then: dict[_Event, list[_Event]] = defaultdict(list)
    for at, spans in enumerate(timeline.stages):
        previous: list[_Event] = []
        for index, span in enumerate(spans):
            start, end = (_Event(span.task, at, starts) for starts in (True, False))
            times[start], times[end] = (span.start, True, at, index), (span.end, False, at, index)
            needs = previous + [
                _Event(need, stage_of[need.microbatch, need.portion] if of is None else of, False)
                for need, of in inputs(span.task, at, len(timeline.stages), portions)
            ]
            for event, wanted in ((start, needs), (end, [start])):
                waits[event] = len(wanted)
                for need in wanted:
                    then[need].append(event)
            previous = [start]
    ready = [(times[event], event) for event, count in waits.items() if not count]
    heapq.heapify(ready)
    found = []
    while ready:
        _, event = heapq.heappop(ready)
        found.append(event)
        for other in then[event]:
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, (times[other], other))
    return found


def _messages(
    event: _Event, stage: int, stage_of: dict[tuple[int, int], int], portions: tuple[int, ...]
) -> list[Step]:
    """What ``stage`` sends and may get at the end of a task."""
    task, at = event.task, event.at
    found: list[Step] = []
    if at == stage and task.kind != "encode_backward":
        found.append(Send(task))
    if task.kind == "encode" and stage == 0:
        found.append(Ask(task))
    if (task.kind, at) in (("forward", stage - 1), ("backward", stage + 1)):
        found.append(Ask(task))
    if task.kind == "backward" and at == 0:
        found += [
            Ask(Task("encode_backward", task.microbatch, portion))
            for portion in range(portions[task.microbatch])
            if stage_of[task.microbatch, portion] == stage
        ]
    return found


def places_of_forwards(timeline: Timeline, stage: int, portions: tuple[int, ...]) -> Places:
    """The places of ``stage`` in a step of forwards alone: each behind the portions of its own
    microbatch, with messages asked for where they are needed."""
    stage_of = _stage_of(timeline)
    before: list[list[Step]] = [[]]
    for microbatch, count in enumerate(portions):
        for portion in range(count):
            if stage_of[microbatch, portion] == stage:
                task = Task("encode", microbatch, portion)
                before[-1] += [task, Send(task)]
        before.append([Send(Task("forward", microbatch))])
    return Places(before, stage_of, portions)


def _stage_of(timeline: Timeline) -> dict[tuple[int, int], int]:
    return {
        (span.task.microbatch, span.task.portion): stage
        for stage, spans in enumerate(timeline.stages)
        for span in spans
        if span.task.kind == "encode"
    }

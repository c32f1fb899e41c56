"""Read a timeline as what one stage does before each of its language tasks, and after the last."""

from __future__ import annotations

from dataclasses import dataclass

from colocc.passes.timeline import LANGUAGE, Task, Timeline, inputs


@dataclass(frozen=True, slots=True)
class Ask:
    """Have peers' messages come: what ``task`` makes, if it encodes, else what it waits for."""

    task: Task


@dataclass(frozen=True)
class Places:
    """What one stage does before each of its language tasks, and after the last.

    ``before``: the encoders' tasks, and the messages to ask for. ``stage_of``: the stage that
    encodes each (microbatch, portion); ``portions``: how many a microbatch has.
    """

    before: list[list[Task | Ask]]
    stage_of: dict[tuple[int, int], int]
    portions: tuple[int, ...]

    def last_backward(self) -> Task | None:
        """The last task of the step, if it is an encoder's backward."""
        tasks = [step for step in self.before[-1] if isinstance(step, Task)]
        return tasks[-1] if tasks else None


def places_of(timeline: Timeline, stage: int, portions: tuple[int, ...]) -> Places:
    """The places of ``stage`` in a step that trains.

    A message is asked for when its sender is done with it: between GPUs it is a kernel on both,
    which takes their multiprocessors as long as it spins for the other. So it is behind all tasks
    that start earlier, which do not wait for it, and before all that start later. What its sender
    needs of this stage has been launched by then: also a host that waits for the message, as CUDA
    may have it do, does not wait for itself.
    """
    steps: list[tuple[float, int, Task | Ask]] = [
        *((sent, 0, Ask(task)) for sent, task in _messages(timeline, stage, portions)),
        *((span.start, 1, span.task) for span in timeline.stages[stage]),
    ]
    before: list[list[Task | Ask]] = [[]]
    for _, _, step in sorted(steps, key=lambda found: found[:2]):
        if isinstance(step, Task) and step.kind in LANGUAGE:
            before.append([])
        else:
            before[-1].append(step)
    return Places(before, _stage_of(timeline), portions)


def _messages(
    timeline: Timeline, stage: int, portions: tuple[int, ...]
) -> list[tuple[float, Task]]:
    """What ``stage`` may get, with the time when it is sent; those of a kind in order."""
    ends = {(span.task, at): span.end for at, spans in enumerate(timeline.stages) for span in spans}
    stages, found = len(timeline.stages), []
    if stage == 0:
        found += [(end, task) for (task, _), end in ends.items() if task.kind == "encode"]
    for task in (span.task for span in timeline.stages[stage]):
        if task.kind in LANGUAGE:
            needs = inputs(task, stage, stages, portions)
            found += [(ends[need, at], task) for need, at in needs if at not in (None, stage)]
    mine = [span.task for span in timeline.stages[stage] if span.task.kind == "encode_backward"]
    return found + [
        (ends[Task("backward", task.microbatch), 0], task)
        for task in sorted(mine, key=lambda task: (task.microbatch, task.portion))
    ]


def places_of_forwards(timeline: Timeline, stage: int, portions: tuple[int, ...]) -> Places:
    """The places of ``stage`` in a step of forwards alone: each behind the portions of its own
    microbatch, with messages asked for where they are needed."""
    stage_of = _stage_of(timeline)
    before: list[list[Task | Ask]] = [
        [
            Task("encode", microbatch, portion)
            for portion in range(count)
            if stage_of[microbatch, portion] == stage
        ]
        for microbatch, count in enumerate(portions)
    ]
    return Places([*before, []], stage_of, portions)


def _stage_of(timeline: Timeline) -> dict[tuple[int, int], int]:
    return {
        (span.task.microbatch, span.task.portion): stage
        for stage, spans in enumerate(timeline.stages)
        for span in spans
        if span.task.kind == "encode"
    }

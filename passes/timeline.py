"""The tasks of a step on the stages of a pipeline, what they wait for, and what they take.

The language pipeline runs 1F1B. A microbatch's samples are encoded in portions, each on one stage,
which also runs its backward; every microbatch has its own number of them. What must wait for what:

    forward j on stage s       forward j on stage s - 1; on stage 0 all portions of j
    backward j on stage s      backward j on stage s + 1; on the last stage forward j
    backward of a portion      backward j on stage 0

A timeline is also a proof. Read as one list of tasks for each stage, in which sends do not wait and
a task waits for its own inputs alone, it is a network that one order of execution finishes, and so
every order does, whatever the tasks really take: none can deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward", "encode", "encode_backward"]
LANGUAGE: tuple[Kind, Kind] = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one microbatch on one stage: of the language module, and of all its samples in the
    encoder.

    A portion takes its part of these, and ``portion`` and ``portion_backward`` whatever its size.
    ``loads``: the language work of each stage as a part of what is given; 1 where there are none.
    """

    forward: float
    backward: float
    encode: float
    encode_backward: float
    portion: float = 0.0
    portion_backward: float = 0.0
    loads: tuple[float, ...] = ()

    def seconds(self, task: Task, stage: int, portions: Sequence[int]) -> float:
        """What ``task`` takes on ``stage``, if the microbatches are cut into ``portions``."""
        whole: float = getattr(self, task.kind)
        if task.kind in LANGUAGE:
            return whole * self.loads[stage] if self.loads else whole
        fixed = self.portion if task.kind == "encode" else self.portion_backward
        return whole / portions[task.microbatch] + fixed

    def encoders(self, portions: Sequence[int]) -> float:
        """What all portions take, on one stage."""
        both = len(portions) * (self.encode + self.encode_backward)
        return both + sum(portions) * (self.portion + self.portion_backward)


@dataclass(frozen=True, slots=True)
class Task:
    """Work on one stage; ``portion`` counts the parts of a microbatch that are encoded apart."""

    kind: Kind
    microbatch: int
    portion: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """A task with its start and end in seconds."""

    task: Task
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What each stage does, in order."""

    stages: tuple[tuple[Span, ...], ...]

    @property
    def length(self) -> float:
        """Seconds from the first start to the last end."""
        return max(span.end for spans in self.stages for span in spans)


def one_f_one_b(stage: int, stages: int, microbatches: int) -> list[Task]:
    """The language tasks of ``stage`` in the order of Megatron's schedule."""
    warm = min(stages - stage - 1, microbatches)
    tasks = [Task("forward", index) for index in range(warm)]
    for index in range(microbatches - warm):
        tasks += [Task("forward", warm + index), Task("backward", index)]
    return tasks + [Task("backward", index) for index in range(microbatches - warm, microbatches)]


def inputs(
    task: Task, stage: int, stages: int, portions: Sequence[int]
) -> list[tuple[Task, int | None]]:
    """What ``task`` on ``stage`` waits for: tasks, each with its stage, None: where it is
    encoded."""
    index, last = task.microbatch, stages - 1
    if task.kind == "forward" and stage == 0:
        return [(Task("encode", index, portion), None) for portion in range(portions[index])]
    if task.kind == "forward":
        return [(task, stage - 1)]
    if task.kind == "backward":
        return [(Task("forward", index), last) if stage == last else (task, stage + 1)]
    return [(Task("backward", index), 0)] if task.kind == "encode_backward" else []


def three_phase_length(stages: int, portions: Sequence[int], costs: Costs) -> float:
    """Seconds of a step that encodes first and goes back last, spread evenly over the stages."""
    language = (len(portions) + stages - 1) * (costs.forward + costs.backward)
    return language + costs.encoders(portions) / stages


def ideal_length(stages: int, portions: Sequence[int], costs: Costs) -> float:
    """Seconds below which no step is: the pipeline alone, or all work on stages never idle."""
    both, encoders = costs.forward + costs.backward, costs.encoders(portions) / stages
    return max((len(portions) + stages - 1) * both, len(portions) * both + encoders)

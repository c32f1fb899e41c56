"""Predict a step's timeline, and fill the pipeline's bubbles with the encoders' work.

The language pipeline runs 1F1B. A microbatch's samples are encoded in portions, each on one stage,
which also runs its backward. What must wait for what:

    forward j on stage s       forward j on stage s - 1; on stage 0 all portions of j
    backward j on stage s      backward j on stage s + 1; on the last stage forward j
    backward of a portion      backward j on stage 0

``fill`` is list scheduling: a stage whose next language task is not ready takes a portion of the
earliest microbatch that is not encoded, or the backward of one of its own. What an idle stage
takes, no other stage must: so the split over stages comes out uneven, as the bubbles are. The
policies below differ in what to prefer; all are tried and the shortest step is kept.

A timeline is also a proof. Read as one list of tasks for each stage, in which sends do not wait and
a task waits for its own inputs alone, it is a network that one order of execution finishes, and so
every order does, whatever the tasks really take: none can deadlock.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

Kind = Literal["forward", "backward", "encode", "encode_backward"]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one microbatch on one stage, and of one portion of a microbatch's samples."""

    forward: float
    backward: float
    encode: float
    encode_backward: float


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


@dataclass(frozen=True, slots=True)
class Policy:
    """``patient``: a stage rather idles than lets the language task wait that is known to come.
    ``share``: no stage encodes more than this much of an even split. ``window``: microbatches
    encoded and not yet backward."""

    patient: bool
    share: float
    window: int


def one_f_one_b(stage: int, stages: int, microbatches: int) -> list[Task]:
    """The language tasks of ``stage`` in the order of Megatron's schedule."""
    warm = min(stages - stage - 1, microbatches)
    tasks = [Task("forward", index) for index in range(warm)]
    for index in range(microbatches - warm):
        tasks += [Task("forward", warm + index), Task("backward", index)]
    return tasks + [Task("backward", index) for index in range(microbatches - warm, microbatches)]


def fill(
    stages: int, microbatches: int, portions: int, costs: Costs, *, window: int | None = None
) -> Timeline:
    """Return the shortest timeline of all policies, with ``portions`` to encode a microbatch.

    ``window`` bounds the microbatches whose encoder activations are alive. It is at least
    ``stages``, since 1F1B needs as many; three times that if not given.
    """
    limit = max(stages, 3 * stages if window is None else window)
    windows = sorted({min(limit, 2 * stages), limit})
    policies = itertools.product((False, True), (1.0, 1.15, 1.3), windows)
    timelines = [
        _Run(stages, microbatches, portions, costs, Policy(*policy)).finish() for policy in policies
    ]
    return min(timelines, key=lambda timeline: timeline.length)


def three_phase_length(stages: int, microbatches: int, portions: int, costs: Costs) -> float:
    """Seconds of a step that encodes first and goes back last, spread evenly over the stages."""
    language = (microbatches + stages - 1) * (costs.forward + costs.backward)
    encoder = microbatches * portions * (costs.encode + costs.encode_backward) / stages
    return language + encoder


def ideal_length(stages: int, microbatches: int, portions: int, costs: Costs) -> float:
    """Seconds below which no step is: the pipeline alone, or all work on stages never idle."""
    both = costs.forward + costs.backward
    encoder = microbatches * portions * (costs.encode + costs.encode_backward) / stages
    return max((microbatches + stages - 1) * both, microbatches * both + encoder)


@dataclass
class _Run:
    """One simulation: stages take tasks as they become free."""

    stages: int
    microbatches: int
    portions: int
    costs: Costs
    policy: Policy
    now: float = 0.0
    ends: dict[tuple[Kind, int, int], float] = field(default_factory=dict)
    encoded: dict[int, int] = field(default_factory=dict)
    running: dict[int, Span] = field(default_factory=dict)

    def __post_init__(self) -> None:
        every = range(self.stages)
        self.language = [one_f_one_b(s, self.stages, self.microbatches) for s in every]
        self.todo = [
            Task("encode", index, portion)
            for index in range(self.microbatches)
            for portion in range(self.portions)
        ]
        self.taken = [0] * self.stages
        self.mine: list[list[Task]] = [[] for _ in every]
        self.done: list[list[Span]] = [[] for _ in every]

    def finish(self) -> Timeline:
        """Run to the end."""
        while True:
            for stage in range(self.stages):
                if stage not in self.running and (task := self._next(stage)) is not None:
                    self._start(stage, task)
            if not self.running:
                break
            self.now = min(span.end for span in self.running.values())
            for stage, span in list(self.running.items()):
                if span.end <= self.now:
                    self._end(stage, span)
        assert not self.todo and not any(self.language) and not any(self.mine)
        return Timeline(tuple(tuple(spans) for spans in self.done))

    def _start(self, stage: int, task: Task) -> None:
        seconds: float = getattr(self.costs, task.kind)
        span = Span(task, self.now, self.now + seconds)
        self.running[stage] = span
        if task.kind in ("forward", "backward"):
            self.language[stage].pop(0)
            self.ends[task.kind, task.microbatch, stage] = span.end
        elif task.kind == "encode":
            self.todo.remove(task)
            self.taken[stage] += 1
        else:
            self.mine[stage].remove(Task("encode", task.microbatch, task.portion))

    def _end(self, stage: int, span: Span) -> None:
        del self.running[stage]
        self.done[stage].append(span)
        task = span.task
        if task.kind == "encode":
            self.mine[stage].append(task)
            self.encoded[task.microbatch] = self.encoded.get(task.microbatch, 0) + 1

    def _ready(self, stage: int) -> float:
        """When the next language task of ``stage`` can start; infinity if that is not known."""
        task, last = self.language[stage][0], self.stages - 1
        if task.kind == "forward":
            if stage == 0:
                whole = self.encoded.get(task.microbatch, 0) == self.portions
                return self.now if whole else float("inf")
            return self.ends.get(("forward", task.microbatch, stage - 1), float("inf"))
        kind: Kind = "forward" if stage == last else "backward"
        return self.ends.get((kind, task.microbatch, min(stage + 1, last)), float("inf"))

    def _next(self, stage: int) -> Task | None:
        """What ``stage`` does now; None if it waits."""
        ready = self._ready(stage) if self.language[stage] else float("inf")
        if ready <= self.now:
            return self.language[stage][0]
        for task in (self._encode(stage), self._backward(stage)):
            if task is None:
                continue
            seconds: float = getattr(self.costs, task.kind)
            if not self.policy.patient or self.now + seconds <= ready:
                return task
        return None

    def _backward(self, stage: int) -> Task | None:
        for task in self.mine[stage]:
            if self.ends.get(("backward", task.microbatch, 0), float("inf")) <= self.now:
                return Task("encode_backward", task.microbatch, task.portion)
        return None

    def _encode(self, stage: int) -> Task | None:
        even = self.microbatches * self.portions / self.stages
        if not self.todo or self.taken[stage] >= ceil(even * self.policy.share):
            return None
        returned = sum(
            1
            for index in range(self.microbatches)
            if self.ends.get(("backward", index, 0), float("inf")) <= self.now
        )
        return self.todo[0] if self.todo[0].microbatch < returned + self.policy.window else None

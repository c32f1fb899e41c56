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
from collections import deque
from dataclasses import dataclass, field
from math import ceil, inf
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
    ``share``: no stage encodes more than this much of an even split. ``window``: so many
    microbatches are encoded, all stages together, before their backward; a stage that holds its
    part of them goes back first, before the language task if ``tidy``."""

    patient: bool
    share: float
    window: int
    tidy: bool


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

    ``window`` bounds the microbatches whose encoder activations are alive, of which each stage has
    its part. It is at least one more than ``stages``, as many as 1F1B needs; four for each
    stage if not given.
    """
    limit = max(stages + 1, 4 * stages if window is None else window)
    windows = sorted({min(limit, 2 * stages), limit})
    shares = (1.0, 1.15, inf)
    policies = itertools.product((False, True), shares, windows, (False, True))
    timelines = [
        _Run(stages, microbatches, portions, costs, Policy(*policy)).finish() for policy in policies
    ]
    # With any share a run always ends: more microbatches are encoded than the pipeline holds.
    ended = [timeline for timeline in timelines if timeline is not None]
    return min(ended, key=lambda timeline: timeline.length)


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
        self.todo = deque(
            Task("encode", index, portion)
            for index in range(self.microbatches)
            for portion in range(self.portions)
        )
        self.returned: set[int] = set()
        self.taken = [0] * self.stages
        self.room = ceil(self.policy.window * self.portions / self.stages)
        self.mine: list[list[Task]] = [[] for _ in every]
        self.done: list[list[Span]] = [[] for _ in every]

    def finish(self) -> Timeline | None:
        """Run to the end; None if the shares leave a portion that every stage refuses."""
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
        if self.todo or any(self.language) or any(self.mine):
            return None
        return Timeline(tuple(tuple(spans) for spans in self.done))

    def _start(self, stage: int, task: Task) -> None:
        seconds: float = getattr(self.costs, task.kind)
        span = Span(task, self.now, self.now + seconds)
        self.running[stage] = span
        if task.kind in ("forward", "backward"):
            self.language[stage].pop(0)
            self.ends[task.kind, task.microbatch, stage] = span.end
        elif task.kind == "encode":
            assert self.todo.popleft() == task
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
        elif task.kind == "backward" and stage == 0:
            self.returned.add(task.microbatch)

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
        backward, full = self._backward(stage), len(self.mine[stage]) >= self.room
        if full and backward is not None and self.policy.tidy:
            return backward
        if ready <= self.now:
            return self.language[stage][0]
        for task in (None if full else self._encode(stage), backward):
            if task is None:
                continue
            seconds: float = getattr(self.costs, task.kind)
            if not self.policy.patient or self.now + seconds <= ready:
                return task
        return None

    def _backward(self, stage: int) -> Task | None:
        for task in self.mine[stage]:
            if task.microbatch in self.returned:
                return Task("encode_backward", task.microbatch, task.portion)
        return None

    def _encode(self, stage: int) -> Task | None:
        even = self.microbatches * self.portions / self.stages
        if not self.todo or self.taken[stage] >= even * self.policy.share:
            return None
        ahead = self.todo[0].microbatch - len(self.returned)
        return self.todo[0] if ahead < self.policy.window else None

"""Predict a step on two lanes: the encoders' work beside the pipeline's, and behind it.

A GPU that runs a stage's language tasks on one stream and its encoders' tasks on another, at a
lower priority, runs each list in its own order. A language task starts when its inputs are there,
an encoder's task when the other lane is idle, too. Once it runs, it slows the other lane: a kernel
that has begun is not interrupted, so a higher priority only says which kernel is next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from colocc.passes.timeline import LANGUAGE, Costs, Span, Task, Timeline, inputs

# What the language lane gets of a GPU that both use: beside an encoder's kernels, its own took 1.11
# to 1.41 times as long, in the mean 1.2 (2.0B + 1.3B on two H200).
LANGUAGE_SHARE = 0.83


class Encoders(Protocol):
    """What an idle stage does for the encoders."""

    def next(self, stage: int) -> Task | None:
        """The next task of ``stage``, if it has one by now; it may still have to wait."""

    def start(self, stage: int, task: Task) -> None:
        """``stage`` starts what it was told to do next."""

    def end(self, stage: int, task: Task) -> None:
        """``stage`` has ended a task, the language module's too."""


class Listed:
    """The encoders' tasks among ``orders``, one list for each stage."""

    def __init__(self, orders: Sequence[Iterable[Task]]) -> None:
        self.left = [deque(task for task in order if task.kind not in LANGUAGE) for order in orders]

    def next(self, stage: int) -> Task | None:
        """The first of the list of ``stage`` that has not started."""
        return self.left[stage][0] if self.left[stage] else None

    def start(self, stage: int, task: Task) -> None:
        """Take ``task`` off the list."""
        self.left[stage].popleft()

    def end(self, stage: int, task: Task) -> None:
        """Lists have nothing to learn."""


@dataclass
class _Lane:
    """The task that one lane of a stage is at; ``left``: the seconds that it still takes.

    ``needs``: what of its inputs the task that comes ``next`` has been seen to wait for.
    """

    task: Task | None = None
    left: float = 0.0
    start: float = 0.0
    next: Task | None = None
    needs: list[tuple[Task, int | None]] = field(default_factory=list)


@dataclass
class TwoLanes:
    """A step whose language tasks and encoders' work run on two lanes of each stage.

    ``portions``: of each microbatch.
    """

    language: Sequence[Sequence[Task]]
    encoders: Encoders
    portions: Sequence[int]
    costs: Costs
    now: float = 0.0
    where: dict[Task, int] = field(default_factory=dict)
    ended: set[tuple[Task, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._todo = [deque(tasks) for tasks in self.language]
        self._lanes = [(_Lane(), _Lane()) for _ in self.language]
        self._spans: list[list[Span]] = [[] for _ in self.language]

    def play(self) -> Timeline:
        """Run until nothing more can start.

        Spans are in the order of their starts. As each starts after its inputs have ended, they are
        lists that can be run one task after the other, too.
        """
        while active := self._active():
            step = min(lane.left / share for _, lane, share in active)
            self.now += step
            for stage, lane, share in active:
                if lane.left / share <= step:
                    self._end(stage, lane)
                else:
                    lane.left -= step * share
        for spans in self._spans:
            spans.sort(key=lambda span: span.start)
        return Timeline(tuple(tuple(spans) for spans in self._spans))

    def _active(self) -> list[tuple[int, _Lane, float]]:
        """The lanes of each stage that run now, with what each gets of its GPU; what can start has
        started."""
        found = []
        for stage, (language, encoder) in enumerate(self._lanes):
            if language.task is None and self._todo[stage]:
                self._begin(stage, language, self._todo[stage][0])
            if language.task is None and encoder.task is None:
                self._begin(stage, encoder, self.encoders.next(stage))
            both = language.task is not None and encoder.task is not None
            for lane, share in ((language, LANGUAGE_SHARE), (encoder, 1.0 - LANGUAGE_SHARE)):
                if lane.task is not None:
                    found.append((stage, lane, share if both else 1.0))
        return found

    def _begin(self, stage: int, lane: _Lane, task: Task | None) -> None:
        """Start ``task`` if its inputs are there."""
        if task is None or not self._ready(task, stage, lane):
            return
        lane.task, lane.start = task, self.now
        lane.left = self.costs.seconds(task, stage, self.portions)
        if task.kind in LANGUAGE:
            self._todo[stage].popleft()
            return
        self.encoders.start(stage, task)
        if task.kind == "encode":
            self.where[task] = stage

    def _ready(self, task: Task, stage: int, lane: _Lane) -> bool:
        if lane.next is not task:
            lane.next = task
            lane.needs = inputs(task, stage, len(self.language), self.portions)
        while lane.needs:
            need, at = lane.needs[-1]
            if (need, self.where.get(need) if at is None else at) not in self.ended:
                return False
            lane.needs.pop()
        return True

    def _end(self, stage: int, lane: _Lane) -> None:
        task, lane.task = lane.task, None
        assert task is not None
        self._spans[stage].append(Span(task, lane.start, self.now))
        self.ended.add((task, stage))
        self.encoders.end(stage, task)

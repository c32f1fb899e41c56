"""Fill the pipeline's bubbles with the encoders' work.

``fill`` is list scheduling: a stage whose next language task is not ready takes a portion of the
earliest microbatch that is not encoded, or the backward of one of its own. What an idle stage
takes, no other stage must: so the split over stages comes out uneven, as the bubbles are. The
policies below differ in what to prefer; all are tried and the shortest step is kept. Where stages
have two lanes, that is the step in which their lists are played on both (two_lanes.py); of steps as
short, the one whose language tasks are behind no encoder's task that has begun, as these share the
GPU with them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, lcm

from colocc.passes.timeline import (
    LANGUAGE,
    Costs,
    Kind,
    Span,
    Task,
    Timeline,
    inputs,
    one_f_one_b,
)
from colocc.passes.two_lanes import Listed, TwoLanes

# As short as the shortest: what a plan foresees is not more exact than that.
NEAR = 1.002
# Portions at the ends have their own size in steps of up to so many microbatches for each stage.
ENDS = 4


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


def fill(
    stages: int,
    portions: Sequence[int],
    costs: Costs,
    *,
    window: int | None = None,
    apart: bool = False,
) -> Timeline:
    """Return the shortest timeline of all policies; ``portions`` says how many each microbatch is
    cut into.

    ``apart``: encoders run on a lane of their own, behind the pipeline's. ``window`` bounds the
    microbatches whose encoder activations are alive, of which each stage has its part. It is at
    least one more than ``stages``, as many as 1F1B needs; four for each stage if not given.
    """
    limit = max(stages + 1, 4 * stages if window is None else window)
    windows = {stages + 1} if apart else set[int]()
    windows |= {min(limit, 2 * stages), limit}
    shares = (1.0, 1.15, inf)
    found, seen = [], set[Timeline]()
    for policy in itertools.product((False, True), shares, sorted(windows), (False, True)):
        work = _Work(stages, portions, Policy(*policy))
        timeline = _OneLane(work, costs).finish()
        # With any share a run always ends: more microbatches are encoded than the pipeline holds.
        if work.is_done() and timeline not in seen:
            seen.add(timeline)
            found.append(_replay(timeline, portions, costs) if apart else timeline)
        if apart and not work.policy.patient:
            work = _Work(stages, portions, Policy(*policy))
            timeline = TwoLanes(_pipeline(work), work, portions, costs).play()
            if work.is_done():
                found.append(timeline)
    least = min(timeline.length for timeline in found)
    return min(
        (timeline for timeline in found if timeline.length <= NEAR * least),
        key=lambda timeline: (interrupted(timeline), timeline.length),
    )


def shortest(
    stages: int,
    choices: Sequence[int],
    microbatches: int,
    costs: Costs,
    *,
    window: int | None = None,
    apart: bool = False,
) -> tuple[tuple[int, ...], Timeline]:
    """The portions of each microbatch, of so many as one can have, and the timeline with them that
    take the least time; of equal ones, those of the fewest portions.

    All microbatches alike; and for the two best of these, smaller portions at the ends: those of
    others were worth less than 1 %, and a plan for 16 stages and 64 microbatches takes 23 s.
    """

    def tried(portions: tuple[int, ...]) -> tuple[float, int, tuple[int, ...], Timeline]:
        timeline = fill(stages, portions, costs, window=window, apart=apart)
        return timeline.length, sum(portions), portions, timeline

    found = sorted((tried((count,) * microbatches) for count in choices), key=lambda one: one[:3])
    for _, _, (count, *_), _ in found[:2]:
        found += map(tried, cuts(count, max(choices), stages, microbatches))
    *_, portions, timeline = min(found, key=lambda one: one[:3])
    return portions, timeline


def cuts(count: int, most: int, stages: int, microbatches: int) -> list[tuple[int, ...]]:
    """Steps of ``count`` portions for each microbatch, but ``most`` at the ends: there stages wait
    for the first embeddings, or some for others with the last gradients. The ends of a long step do
    not matter."""
    if count == most or microbatches > ENDS * stages:
        return []
    return [
        (most,) * first + (count,) * (microbatches - first - last) + (most,) * last
        for first, last in ((1, 0), (0, 1), (1, 1))
        if microbatches > first + last
    ]


def interrupted(timeline: Timeline) -> float:
    """The seconds of language tasks that an encoder's task, begun before them, is behind."""
    found = 0.0
    for spans in timeline.stages:
        ends = 0.0
        for span in spans:
            if span.task.kind not in LANGUAGE:
                ends = max(ends, span.end)
            elif span.end <= ends:
                found += span.end - span.start
    return found


def _replay(timeline: Timeline, portions: Sequence[int], costs: Costs) -> Timeline:
    """The tasks of ``timeline`` in the same order on two lanes."""
    orders = [[span.task for span in spans] for spans in timeline.stages]
    language = [[task for task in order if task.kind in LANGUAGE] for order in orders]
    return TwoLanes(language, Listed(orders), portions, costs).play()


def _pipeline(work: _Work) -> list[list[Task]]:
    return [one_f_one_b(stage, work.stages, len(work.portions)) for stage in range(work.stages)]


class _Work:
    """The encoders' work that is not done, and which of it a stage takes next."""

    def __init__(self, stages: int, portions: Sequence[int], policy: Policy) -> None:
        self.stages, self.portions, self.policy = stages, portions, policy
        self.todo = deque(
            Task("encode", index, portion)
            for index, count in enumerate(portions)
            for portion in range(count)
        )
        self.returned: set[int] = set()
        # Parts of microbatches are counted as whole numbers.
        self.whole = lcm(*portions)
        self.taken, self.held = [0] * stages, [0] * stages
        self.mine: list[list[Task]] = [[] for _ in range(stages)]
        self._left = 2 * len(self.todo)

    def is_done(self) -> bool:
        """Whether every portion has been encoded and has gone back."""
        return self._left == 0

    def next(self, stage: int) -> Task | None:
        """What ``stage`` does while it waits for the pipeline."""
        backward = self.backward(stage)
        if backward is not None and self.policy.tidy and self.is_full(stage):
            return backward
        return self.encode(stage) or backward

    def start(self, stage: int, task: Task) -> None:
        """``stage`` takes ``task``."""
        if task.kind == "encode":
            assert self.todo.popleft() == task
            self.taken[stage] += self._part(task)
        else:
            self.mine[stage].remove(Task("encode", task.microbatch, task.portion))
            self.held[stage] -= self._part(task)

    def end(self, stage: int, task: Task) -> None:
        """``stage`` is done with ``task``, of the encoders or of the pipeline."""
        if task.kind == "encode":
            self.mine[stage].append(task)
            self.held[stage] += self._part(task)
        elif task.kind == "backward" and stage == 0:
            self.returned.add(task.microbatch)
        self._left -= task.kind not in LANGUAGE

    def is_full(self, stage: int) -> bool:
        """Whether ``stage`` holds its part of the window: as many portions of the next one's size
        as reach it."""
        index = self.todo[0].microbatch if self.todo else len(self.portions) - 1
        part = self.whole // self.portions[index]
        room = -(-self.policy.window * self.portions[index] // self.stages)
        return self.held[stage] + part > room * part

    def _part(self, task: Task) -> int:
        return self.whole // self.portions[task.microbatch]

    def backward(self, stage: int) -> Task | None:
        """The first portion of ``stage`` that can go back."""
        for task in self.mine[stage]:
            if task.microbatch in self.returned:
                return Task("encode_backward", task.microbatch, task.portion)
        return None

    def encode(self, stage: int) -> Task | None:
        """The next portion, if ``stage`` may encode it."""
        even = len(self.portions) * self.whole / self.stages
        if not self.todo or self.is_full(stage) or self.taken[stage] >= even * self.policy.share:
            return None
        ahead = self.todo[0].microbatch - len(self.returned)
        return self.todo[0] if ahead < self.policy.window else None


class _OneLane:
    """A step whose stages do one thing at a time, and take the next when they are free."""

    def __init__(self, work: _Work, costs: Costs) -> None:
        self.work, self.costs, self.stages = work, costs, work.stages
        self.language = [deque(tasks) for tasks in _pipeline(work)]
        self.now = 0.0
        self.ends: dict[tuple[Kind, int, int], float] = {}
        self.encoded: dict[int, int] = {}
        self.running: dict[int, Span] = {}
        self.done: list[list[Span]] = [[] for _ in self.language]

    def finish(self) -> Timeline:
        """Run until nothing more can start."""
        while True:
            for stage in range(self.stages):
                if stage not in self.running and (task := self._next(stage)) is not None:
                    self._start(stage, task)
            if not self.running:
                return Timeline(tuple(tuple(spans) for spans in self.done))
            self.now = min(span.end for span in self.running.values())
            for stage, span in list(self.running.items()):
                if span.end <= self.now:
                    self._end(stage, span)

    def _start(self, stage: int, task: Task) -> None:
        span = Span(task, self.now, self.now + self.costs.seconds(task, stage, self.work.portions))
        self.running[stage] = span
        if task.kind in LANGUAGE:
            self.language[stage].popleft()
            self.ends[task.kind, task.microbatch, stage] = span.end
        else:
            self.work.start(stage, task)

    def _end(self, stage: int, span: Span) -> None:
        del self.running[stage]
        self.done[stage].append(span)
        if span.task.kind == "encode":
            self.encoded[span.task.microbatch] = self.encoded.get(span.task.microbatch, 0) + 1
        self.work.end(stage, span.task)

    def _ready(self, stage: int) -> float:
        """When the next language task of ``stage`` can start; infinity if that is not known."""
        if not self.language[stage]:
            return inf
        task = self.language[stage][0]
        if task.kind == "forward" and stage == 0:
            whole = self.encoded.get(task.microbatch, 0) == self.work.portions[task.microbatch]
            return self.now if whole else inf
        ((need, at),) = inputs(task, stage, self.stages, self.work.portions)
        assert at is not None
        return self.ends.get((need.kind, need.microbatch, at), inf)

    def _next(self, stage: int) -> Task | None:
        """What ``stage`` does now; None if it waits."""
        ready, work = self._ready(stage), self.work
        backward = work.backward(stage)
        if work.is_full(stage) and backward is not None and work.policy.tidy:
            return backward
        if ready <= self.now:
            return self.language[stage][0]
        for task in (work.encode(stage), backward):
            if task is None:
                continue
            seconds = self.costs.seconds(task, stage, self.work.portions)
            if not work.policy.patient or self.now + seconds <= ready:
                return task
        return None

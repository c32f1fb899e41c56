"""What the solver answers for one edge: frozen, printable, free of tensors and process groups.

All sizes are in *units*. One unit is the smallest run of samples that the plan moves as a whole; a
step of the training loop has ``plan.units`` of them, in the order of the reading module: all of its
first dp replica, microbatch by microbatch, then all of its second, and so on. So a plan holds for
every batch whose samples divide by ``plan.units``, whatever the rows per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from colocc.layout import Layout

Interval = tuple[int, int]
"""A half-open run of units: (start, stop)."""

Kind = Literal["narrow", "all_gather", "all_to_all"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan, for all ranks.

    ``groups`` are the sets of ranks that communicate, each ascending, in order of their first rank;
    none for ``narrow``. Intervals count units of the rank's own buffer, before the step:

    narrow      rank r keeps the intervals ``keeps[r]``, joined in that order.
    all_gather  each rank sends its whole buffer to its group, joined by ascending rank; a rank in
                no group keeps what it has.
    all_to_all  rank r sends its interval (start, stop) to peer for each (peer, start, stop) in
                ``sends[r]``, itself among the peers; what arrives is joined by ascending sender.
    """

    kind: Kind
    groups: tuple[tuple[int, ...], ...] = ()
    keeps: tuple[tuple[Interval, ...], ...] = ()
    sends: tuple[tuple[tuple[int, int, int], ...], ...] = ()

    def group_of(self, rank: int) -> tuple[int, ...] | None:
        return next((group for group in self.groups if rank in group), None)


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds which samples: ``slots[i]`` are the units of dp coordinate i of ``layout``, in the
    order in which they lie in memory. ``stages`` are the pipeline coordinates that hold them, None
    for all; every rank of another stage holds nothing."""

    module: str
    layout: Layout
    slots: tuple[tuple[Interval, ...], ...]
    stages: tuple[int, ...] | None = None

    def units(self) -> tuple[tuple[Interval, ...], ...]:
        """The intervals that each rank holds."""
        dp, pp = self.layout.coordinates("dp").tolist(), self.layout.coordinates("pp").tolist()
        return tuple(
            self.slots[slot] if self.stages is None or stage in self.stages else ()
            for slot, stage in zip(dp, pp, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How one value gets from ``src`` to ``dst``, and its gradient back.

    ``scale`` multiplies the gradient on its way back: the modules' own gradient reductions differ
    (an average over another number of replicas, or a sum), and the product must be one.
    ``where`` is the solved relation of the dp coordinates.
    """

    src: Holding
    dst: Holding
    units: int
    kind: Literal["fan_in", "fan_out", "equal"]
    ratio: int
    where: str
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    scale: Fraction = Fraction(1)

    @property
    def moves(self) -> bool:
        """Whether anything is left to do: a plan without steps and scale is no redistribution."""
        return bool(self.forward or self.backward or self.scale != 1)

    def member_lists(self) -> tuple[tuple[int, ...], ...]:
        """Every set of ranks that communicates, in the order of first use."""
        steps = self.forward + self.backward
        return tuple(dict.fromkeys(group for step in steps for group in step.groups))

    def received(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Units that each rank receives from other ranks, forward and backward."""
        return _received(self.forward, self.src), _received(self.backward, self.dst)

    def bound(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The least that each rank must receive, |need minus have| in units, forward and
        backward."""
        return _missing(self.src, self.dst), _missing(self.dst, self.src)


def length(intervals: tuple[Interval, ...]) -> int:
    """The number of units in ``intervals``."""
    return sum(stop - start for start, stop in intervals)


def _received(steps: tuple[Step, ...], start: Holding) -> tuple[int, ...]:
    have = [length(units) for units in start.units()]
    got = [0] * len(have)
    for step in steps:
        if step.kind == "narrow":
            have = [length(keeps) for keeps in step.keeps]
        elif step.kind == "all_gather":
            for group in step.groups:
                total = sum(have[rank] for rank in group)
                for rank in group:
                    got[rank] += total - have[rank]
                for rank in group:
                    have[rank] = total
        else:
            after = [0] * len(have)
            for rank, sends in enumerate(step.sends):
                for peer, first, last in sends:
                    after[peer] += last - first
                    got[peer] += (last - first) * (peer != rank)
            have = after
    return tuple(got)


def _missing(have: Holding, need: Holding) -> tuple[int, ...]:
    return tuple(
        length(wants) - overlap(wants, holds)
        for holds, wants in zip(have.units(), need.units(), strict=True)
    )


def overlap(left: tuple[Interval, ...], right: tuple[Interval, ...]) -> int:
    """The number of units in both."""
    return sum(max(0, min(b, d) - max(a, c)) for a, b in left for c, d in right)

"""The checker accepts every good plan and rejects every mutant of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest

from colocc.errors import VerifyError
from colocc.layout import DEFAULT_ORDER, Layout
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Holding, Plan, Step
from colocc.passes.solve.solver import solve
from tests.passes.solve.pairs import OLD_ORDER, TUPLES, tuple_pair

SCALE = Fraction(2)
Mutants = Iterator[tuple[str, Plan]]


def put(items: tuple[Any, ...], index: int, *new: Any) -> tuple[Any, ...]:
    """``items`` with the one at ``index`` replaced by ``new``."""
    return (*items[:index], *new, *items[index + 1 :])


def swapped(items: tuple[Any, ...], i: int, j: int) -> tuple[Any, ...]:
    return put(put(items, i, items[j]), j, items[i])


def moved(interval: tuple[int, int]) -> Iterator[tuple[int, int]]:
    start, stop = interval
    yield from ((start + 1, stop + 1), (start - 1, stop - 1), (start, stop + 1), (start, stop - 1))


def step_mutants(step: Step, world: int) -> Iterator[tuple[str, Step]]:
    groups = step.groups
    for i, j in combinations(range(len(groups)), 2):
        # Two groups exchange their last members.
        left, right = (*groups[i][:-1], groups[j][-1]), (*groups[j][:-1], groups[i][-1])
        yield "groups", replace(step, groups=put(put(groups, i, left), j, right))
    for i, group in enumerate(groups):
        yield "groups", replace(step, groups=put(groups, i, group[:-1]))
        yield "groups", replace(step, groups=put(groups, i, group[::-1]))
        yield "groups", replace(step, groups=put(groups, i))
    for rank, keeps in enumerate(step.keeps):
        for i, interval in enumerate(keeps):
            for new in moved(interval):
                yield "interval", replace(step, keeps=put(step.keeps, rank, put(keeps, i, new)))
            yield "interval", replace(step, keeps=put(step.keeps, rank, put(keeps, i)))
    for i, j in combinations(range(len(step.keeps)), 2):
        yield "ranks", replace(step, keeps=swapped(step.keeps, i, j))
    for rank, sends in enumerate(step.sends):
        for i, (peer, start, stop) in enumerate(sends):
            for new in moved((start, stop)):
                sent = put(sends, i, (peer, *new))
                yield "interval", replace(step, sends=put(step.sends, rank, sent))
            for other in {(peer + 1) % world, (peer - 1) % world}:
                sent = put(sends, i, (other, start, stop))
                yield "peer", replace(step, sends=put(step.sends, rank, sent))
            yield "send", replace(step, sends=put(step.sends, rank, put(sends, i)))
            twice = put(sends, i, sends[i], sends[i])
            yield "send", replace(step, sends=put(step.sends, rank, twice))
    for i, j in combinations(range(len(step.sends)), 2):
        yield "ranks", replace(step, sends=swapped(step.sends, i, j))


def direction_mutants(steps: tuple[Step, ...], world: int) -> Iterator[tuple[str, Any]]:
    for i, step in enumerate(steps):
        yield "step", put(steps, i)
        yield "step", put(steps, i, step, step)
        for what, mutant in step_mutants(step, world):
            yield what, put(steps, i, mutant)


def holding_mutants(holding: Holding) -> Iterator[tuple[str, Holding]]:
    slots = holding.slots
    for i, j in combinations(range(len(slots)), 2):
        yield "slots", replace(holding, slots=swapped(slots, i, j))
    for i, slot in enumerate(slots):
        yield "slots", replace(holding, slots=put(slots, i))
        for k, interval in enumerate(slot):
            for new in moved(interval):
                yield "slots", replace(holding, slots=put(slots, i, put(slot, k, new)))
    stages = range(holding.layout.pp)
    for wrong in [None, *((stage,) for stage in stages), tuple(stages)]:
        mutant = replace(holding, stages=wrong)
        # With one stage, None and (0,) are two spellings of all of them.
        if mutant.units() != holding.units():
            yield "stage", mutant


def mutants(plan: Plan) -> Mutants:
    """Plans that differ from ``plan`` in one thing, and so are wrong."""
    world = plan.src.layout.size
    for what, steps in direction_mutants(plan.forward, world):
        yield f"forward {what}", replace(plan, forward=steps)
    for what, steps in direction_mutants(plan.backward, world):
        yield f"backward {what}", replace(plan, backward=steps)
    for what, holding in holding_mutants(plan.src):
        yield f"src {what}", replace(plan, src=holding)
    for what, holding in holding_mutants(plan.dst):
        yield f"dst {what}", replace(plan, dst=holding)
    for scale in (Fraction(1), Fraction(1, 2), Fraction(4), -SCALE, Fraction(0)):
        yield "scale", replace(plan, scale=scale)
    yield "units", replace(plan, units=plan.units * 2)
    yield "directions", replace(plan, forward=plan.backward, backward=plan.forward)


@pytest.mark.parametrize("order", [DEFAULT_ORDER, OLD_ORDER])
def test_every_mutant_is_rejected(order: str) -> None:
    tried: Counter[str] = Counter()
    accepted = []
    for index in range(len(TUPLES)):
        src, dst = tuple_pair(index, order)
        plan = solve(("images", src), ("language", dst), scale=SCALE)
        check(plan, scale=SCALE)
        for what, mutant in mutants(plan):
            if mutant == plan:
                continue
            tried[what] += 1
            try:
                check(mutant, scale=SCALE)
            except VerifyError:
                continue
            accepted.append(f"{src} -> {dst}: {what}\n  {plan}\n  {mutant}")
    assert not accepted, "\n".join(accepted[:5])
    assert tried.total() >= 2000
    ends = {f"{way} {what}" for way in ("forward", "backward") for what in STEP_KINDS}
    assert ends | {"src slots", "dst slots", "dst stage", "scale"} <= set(tried)


STEP_KINDS = ("groups", "interval", "peer", "send", "step", "ranks")


def test_a_rejection_names_the_rank_and_what_it_ends_with() -> None:
    src, dst = Layout(tp=2, dp=4), Layout(tp=4, dp=2)
    plan = solve(("images", src), ("language", dst))
    step = replace(plan.forward[0], groups=((0, 4), (1, 3), (2, 6), (5, 7)))
    with pytest.raises(VerifyError) as info:
        check(replace(plan, forward=(step,)))
    assert str(info.value) == (
        "plan images (tp2 dp4) -> language (tp4 dp2) is wrong: forward, rank 0 ends with units "
        "[0, 2], it needs [0, 1]. This is a bug in colocc: please report it with the dump."
    )


def test_the_scale_is_checked_only_where_one_is_given() -> None:
    layout = Layout(tp=2, dp=4)
    plan = solve(("images", layout), ("language", Layout(tp=4, dp=2)), scale=Fraction(1, 2))
    check(plan)
    check(plan, scale=Fraction(1, 2))
    with pytest.raises(VerifyError, match="the gradient is scaled by 1/2, not by 2"):
        check(plan, scale=Fraction(2))

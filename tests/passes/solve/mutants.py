"""Plans that differ from a right one in one thing, and so are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

from colocc.passes.solve.plan import Holding, Moves, Part, Plan, Step

Mutants = Iterator[tuple[str, Plan]]


def put(items: tuple[Any, ...], index: int, *new: Any) -> tuple[Any, ...]:
    """``items`` with the one at ``index`` replaced by ``new``."""
    return (*items[:index], *new, *items[index + 1 :])


def swapped(items: tuple[Any, ...], i: int, j: int) -> tuple[Any, ...]:
    return put(put(items, i, items[j]), j, items[i])


def shifted(interval: tuple[int, int]) -> Iterator[tuple[int, int]]:
    start, stop = interval
    yield from ((start + 1, stop + 1), (start - 1, stop - 1), (start, stop + 1), (start, stop - 1))


def mutants(plan: Plan) -> Mutants:
    """Every mutant of ``plan``; one that equals it, or is another spelling of it, is none."""
    world = plan.src.layout.size
    for what, steps in _direction(plan.forward, world):
        yield f"forward {what}", replace(plan, forward=steps)
    for what, steps in _direction(plan.backward, world):
        yield f"backward {what}", replace(plan, backward=steps)
    yield "directions", replace(plan, forward=plan.backward, backward=plan.forward)
    for what, holding in _holding(plan.src):
        yield f"src {what}", replace(plan, src=holding)
    for what, holding in _holding(plan.dst):
        yield f"dst {what}", replace(plan, dst=holding)
    yield from _words(plan)


def _direction(steps: tuple[Step, ...], world: int) -> Iterator[tuple[str, tuple[Step, ...]]]:
    for i, step in enumerate(steps):
        yield "step dropped", put(steps, i)
        yield "step doubled", put(steps, i, step, step)
        for what, mutant in (*_groups(step), *_moves(step, world), *_kind(step)):
            yield what, put(steps, i, mutant)
    for i, j in combinations(range(len(steps)), 2):
        yield "steps reordered", swapped(steps, i, j)
    whole = tuple(range(world))
    yield "step added", (*steps, Step("all_gather", (whole,)))


def _groups(step: Step) -> Iterator[tuple[str, Step]]:
    groups = step.groups
    for i, j in combinations(range(len(groups)), 2):
        # Two groups exchange their last members, or are one.
        left, right = (*groups[i][:-1], groups[j][-1]), (*groups[j][:-1], groups[i][-1])
        yield "groups swapped", replace(step, groups=put(put(groups, i, left), j, right))
        both = tuple(sorted(groups[i] + groups[j]))
        yield "groups joined", replace(step, groups=put(put(groups, j), i, both))
        yield "groups reordered", replace(step, groups=swapped(groups, i, j))
    for i, group in enumerate(groups):
        yield "group cut", replace(step, groups=put(groups, i, group[:-1]))
        yield "group reversed", replace(step, groups=put(groups, i, group[::-1]))
        yield "group dropped", replace(step, groups=put(groups, i))
        yield "group doubled", replace(step, groups=put(groups, i, group, group))


def _kind(step: Step) -> Iterator[tuple[str, Step]]:
    for kind in ("narrow", "all_gather", "all_to_all", "send_recv", "all_reduce"):
        # A send_recv is an all_to_all, too, of ranks that have one peer each.
        if kind != step.kind and (step.kind, kind) != ("send_recv", "all_to_all"):
            yield "kind", replace(step, kind=kind)
    yield "adds", replace(step, adds=not step.adds)


def _moves(step: Step, world: int) -> Iterator[tuple[str, Step]]:
    moves = step.moves
    columns = [array.astype(np.int64) for array in moves.arrays()]
    every = np.arange(len(moves))

    def made(index: Any, row: int | slice = 0, **new: Any) -> Step:
        names = ("src", "dst", "low", "high")
        fresh = {name: column[index] for name, column in zip(names, columns, strict=True)}
        for name, value in new.items():
            fresh[name][row] = value
        return replace(step, moves=Moves.make(**fresh))

    for i in range(len(moves)):
        low, high = columns[2][i], columns[3][i]
        for dim in range(len(low)):
            for a, b in shifted((int(low[dim]), int(high[dim]))):
                at = np.arange(len(low)) == dim
                new = {"low": np.where(at, a, low), "high": np.where(at, b, high)}
                yield "slice shifted", made(every, i, **new)
        for by in (1, -1):
            yield "peer", made(every, i, dst=(columns[1][i] + by) % world)
            yield "peer", made(every, i, src=(columns[0][i] + by) % world)
        yield "move dropped", made(np.delete(every, i))
        yield "move doubled", made(np.r_[every, i])
    for i in range(len(moves) - 1):
        order = every.copy()
        order[[i, i + 1]] = [i + 1, i]
        backwards = Moves(*(array[order] for array in moves.arrays()))
        yield "moves reordered", replace(step, moves=backwards)
        sender, receiver = columns[0][order], columns[1][order]
        yield "peers swapped", made(every, slice(None), src=sender)
        yield "peers swapped", made(every, slice(None), dst=receiver)


def _holding(holding: Holding) -> Iterator[tuple[str, Holding]]:
    for dim, part in enumerate(holding.parts):
        for what, mutant in _part(part):
            yield f"{what} of dim {dim}", replace(holding, parts=put(holding.parts, dim, mutant))
    stages = range(holding.layout.pp)
    for wrong in [None, *((stage,) for stage in stages), tuple(stages)]:
        yield "stage", replace(holding, stages=wrong)
    for axes in ((), ("tp",), ("cp",), ("dp",)):
        yield "partial", replace(holding, partial=axes)


def _part(part: Part) -> Iterator[tuple[str, Part]]:
    cuts = part.cuts
    for i, j in combinations(range(len(cuts)), 2):
        yield "cuts swapped", replace(part, cuts=swapped(cuts, i, j))
    for i, cut in enumerate(cuts):
        yield "cut dropped", replace(part, cuts=put(cuts, i))
        for k, interval in enumerate(cut):
            for new in shifted(interval):
                yield "cut shifted", replace(part, cuts=put(cuts, i, put(cut, k, new)))
    yield "axes", replace(part, axes=part.axes[::-1] if len(part.axes) > 1 else ("pp",))


def _words(plan: Plan) -> Mutants:
    scales = (plan.scale * 2, plan.scale / 2, -plan.scale, Fraction(0), plan.scale + 1)
    for scale in scales:
        yield "scale", replace(plan, scale=scale)
    for kind in ("fan_in", "fan_out", "equal"):
        yield "kind of plan", replace(plan, kind=kind)
    for ratio in (plan.ratio * 2, 1 / (plan.ratio + 1)):
        yield "ratio", replace(plan, ratio=ratio)
    for dim in range(len(plan.grid)):
        for size in (plan.grid[dim] * 2, plan.grid[dim] + 1):
            yield "grid", replace(plan, grid=put(plan.grid, dim, size))
    yield "dims", replace(plan, dims=("position", *plan.dims[1:]))
    for i, line in enumerate(plan.where):
        yield "form", replace(plan, where=put(plan.where, i, f"{line} + 1"))
        yield "form", replace(plan, where=put(plan.where, i))
        yield "form", replace(plan, where=put(plan.where, i, line.replace(".dp = ", ".dp = 1 + ")))
        for side in (plan.src, plan.dst):
            other = line.replace(side.module, "other")
            yield "form", replace(plan, where=put(plan.where, i, other))
    if plan.value is not None:
        for new in ({"dtype": "i8"}, {"module": "text"}, {"dims": plan.value.dims[::-1]}):
            yield "value", replace(plan, value=replace(plan.value, **new))
        yield "value", replace(plan, value=None)

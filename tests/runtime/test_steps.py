"""Covers runtime/steps.py: every kind of step on gloo ranks, against one global array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from colocc.layout import Layout
from colocc.passes.solve.plan import Plan
from colocc.passes.solve.solver import solve
from colocc.runtime.groups import close_groups, open_groups
from colocc.runtime.redistribution import Redistribution
from tests.harness import run_threads

ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-pp-dp", "dp-cp-tp-pp"]
SAMPLES_PER_UNIT, ROWS_PER_CHUNK, COLUMNS = 2, 3, 8
BOTH = ("sample", "sequence")


@dataclass(frozen=True)
class Case:
    """An edge, and the steps that it must take: forward, then backward."""

    name: str
    src: Layout
    dst: Layout
    steps: str = ""
    dims: tuple[str, ...] = ("sample",)
    sink: Layout | None = None
    ranks_per_node: int | None = None

    def plan(self) -> Plan:
        sink = None if self.sink is None else ("sink", self.sink)
        return solve(
            ("images", self.src),
            ("language", self.dst),
            sink=sink,
            dims=self.dims,
            ranks_per_node=self.ranks_per_node,
        )


def by_order(order: str) -> list[Case]:
    """Edges on 8 ranks, all axes in this order."""

    def at(**sizes: int) -> Layout:
        flags = {flag: bool(sizes.pop(flag, 0)) for flag in ("sp", "zigzag")}
        return Layout(order=order, **sizes, **flags)  # type: ignore[arg-type]

    return [
        Case("zigzag", at(dp=8), at(tp=2, cp=2, dp=2, zigzag=1), dims=BOTH),
        Case("zigzag and sp", at(dp=8), at(tp=2, cp=2, dp=2, zigzag=1, sp=1), dims=BOTH),
        Case("contiguous cp", at(tp=2, dp=4), at(tp=2, cp=2, dp=2), dims=BOTH),
        Case("sp on both sides", at(tp=2, dp=4, sp=1), at(tp=4, dp=2, sp=1), dims=BOTH),
        Case("source sp", at(tp=2, dp=4, sp=1), at(tp=4, dp=2), dims=BOTH),
        Case("reader sp", at(tp=4, dp=2), at(tp=2, dp=4, sp=1), dims=BOTH),
        Case("source cp", at(tp=2, cp=2, dp=2), at(cp=4, dp=2, zigzag=1), dims=BOTH),
        Case("pp", at(tp=2, dp=4), at(tp=2, pp=2, dp=2)),
        Case("pp and sp", at(tp=2, dp=4, sp=1), at(tp=2, pp=2, dp=2, sp=1), dims=BOTH),
        Case("pp and zigzag", at(tp=2, dp=4), at(cp=2, pp=2, dp=2, zigzag=1), dims=BOTH),
        Case("summands that travel", at(tp=2, dp=4), at(tp=2, cp=2, dp=2)),
        Case("summands in place", at(tp=2, cp=2, dp=2), at(tp=2, cp=2, dp=2)),
        Case("encoder to encoder", at(tp=2, dp=4), at(tp=8), sink=at(tp=2, pp=2, dp=2)),
        Case("two levels", at(tp=4, dp=2), at(tp=8), ranks_per_node=4),
        Case("two levels back", at(tp=8), at(dp=8), ranks_per_node=2),
        Case("two levels, zigzag", at(dp=8), at(tp=4, cp=2, zigzag=1), dims=BOTH, ranks_per_node=4),
    ]


KINDS = [
    Case("3:2", Layout(tp=2, dp=3), Layout(tp=3, dp=2), "all_to_all / send_recv"),
    Case("2:3", Layout(tp=3, dp=2), Layout(tp=2, dp=3), "send_recv / all_to_all"),
    Case("5:4", Layout(tp=4, dp=5), Layout(tp=5, dp=4), "all_to_all / all_to_all"),
    Case("3:2 and sp", Layout(tp=2, dp=3), Layout(tp=3, dp=2, sp=True), dims=BOTH),
    Case("6:4 on pp", Layout(tp=2, dp=6), Layout(pp=3, dp=4)),
    Case("gather", Layout(tp=2, dp=4), Layout(tp=4, dp=2), "all_gather / narrow"),
    Case(
        "gather the sequence", Layout(tp=2, dp=4, sp=True), Layout(tp=2, dp=4),
        "all_gather / narrow", dims=BOTH,
    ),
    Case(
        "permute", Layout(tp=2, dp=4), Layout(tp=4, dp=2, sp=True), "send_recv / all_to_all",
        dims=BOTH,
    ),
    Case(
        "reduce", Layout(tp=2, cp=2, dp=2), Layout(tp=2, cp=2, dp=2), "/ all_reduce",
    ),
    Case(
        "add", Layout(tp=2, dp=4), Layout(tp=2, cp=2, dp=2), "all_gather / send_recv+",
    ),
    Case(
        "two levels", Layout(tp=4, dp=2), Layout(tp=8), "send_recv all_to_all / narrow",
        ranks_per_node=4,
    ),
]  # fmt: skip
CASES = KINDS + [case for order in ORDERS for case in by_order(order)]


def whole(plan: Plan) -> np.ndarray:
    """Element i of the global tensor is i + 1."""
    rows = plan.grid[1] * ROWS_PER_CHUNK if "sequence" in plan.dims else ROWS_PER_CHUNK
    shape = (plan.grid[0] * SAMPLES_PER_UNIT, rows, COLUMNS)
    return np.arange(1.0, np.prod(shape) + 1).reshape(shape)


def place(layout: Layout, rank: int) -> dict[str, int]:
    """The coordinates of ``rank`` by division, without Layout."""
    found = {}
    for axis in layout.order.split("-"):
        if axis != "ep":
            rank, found[axis] = divmod(rank, getattr(layout, axis))
    return found


def sequence(value: np.ndarray, layout: Layout, at: dict[str, int]) -> np.ndarray:
    """The part of dim 1 at these coordinates, as Megatron cuts it: over cp, then over tp."""
    if layout.zigzag and layout.cp > 1:
        chunks = np.split(value, 2 * layout.cp, axis=1)
        value = np.concatenate([chunks[at["cp"]], chunks[-1 - at["cp"]]], axis=1)
    else:
        value = np.split(value, layout.cp, axis=1)[at["cp"]]
    return np.split(value, layout.tp, axis=1)[at["tp"]] if layout.sp else value


def held(plan: Plan, value: np.ndarray, rank: int) -> np.ndarray:
    """What ``rank`` holds at the source, by the samples that the plan gives its slot."""
    layout = plan.src.layout
    at, size = place(layout, rank), SAMPLES_PER_UNIT
    runs = [value[start * size : stop * size] for start, stop in plan.src.slots[at["dp"]]]
    part = np.concatenate(runs)
    return sequence(part, layout, at) if "sequence" in plan.dims else part


def read(case: Case, plan: Plan, value: np.ndarray, rank: int) -> np.ndarray:
    """What ``rank`` reads: its replica's samples, or for an encoder those of its slot."""
    at = place(case.dst, rank)
    if case.sink is None:
        part = np.split(value, case.dst.dp)[at["dp"]]
    else:
        size = SAMPLES_PER_UNIT
        runs = [value[start * size : stop * size] for start, stop in plan.dst.slots[at["dp"]]]
        part = np.concatenate(runs)
    if "sequence" in plan.dims:
        part = sequence(part, case.dst, at)
    return part if at["pp"] == 0 else part[:0]


def weight(case: Case, rank: int) -> int:
    """Ranks that hold summands of a gradient hold different ones."""
    return 7 + place(case.dst, rank)["cp"] * ("sequence" not in case.dims)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.src} {case.dst}")
def test_values_arrive_and_gradients_return(case: Case) -> None:
    plan = case.plan()
    if case.steps:
        ways = [
            " ".join(step.kind + "+" * step.adds for step in steps)
            for steps in (plan.forward, plan.backward)
        ]
        assert " / ".join(ways).strip() == case.steps
    value = whole(plan)

    def main(rank: int) -> tuple[Tensor, Tensor]:
        opened = open_groups(plan.member_lists())
        move = Redistribution(plan, opened, rank)
        mine = torch.from_numpy(held(plan, value, rank)).requires_grad_()
        moved = move(mine)
        moved.backward(moved.detach() * weight(case, rank))
        close_groups(plan.member_lists())
        assert mine.grad is not None and mine.grad.is_contiguous() and moved.is_contiguous()
        return moved.detach(), mine.grad

    summands = range(case.dst.cp if "sequence" not in case.dims else 1)
    factor = sum(7 + index for index in summands)
    for rank, (moved, gradient) in enumerate(run_threads(case.src.size, main, timeout=60)):
        assert np.array_equal(moved.numpy(), read(case, plan, value, rank))
        assert np.array_equal(gradient.numpy(), factor * held(plan, value, rank))

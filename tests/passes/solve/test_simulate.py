"""Covers passes/solve/simulate.py."""

from typing import Any

import numpy as np
import pytest

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.solve.plan import Holding, Plan
from colocc.passes.solve.solver import solve


def solved(src: str, dst: str, **options: Any) -> Plan:
    return solve(("images", Layout.parse(src)), ("language", Layout.parse(dst)), **options)


def part(value: np.ndarray, holding: Holding, rank: int, grid: tuple[int, ...]) -> np.ndarray:
    """What ``rank`` holds of ``value``, whose first dims are the plan's; nothing off its stages."""
    box = holding.box(rank)
    if not box:
        return value[:0]
    for dim, (intervals, cells) in enumerate(zip(box, grid, strict=True)):
        size = value.shape[dim] // cells
        index = [i for start, stop in intervals for i in range(start * size, stop * size)]
        value = value.take(index, axis=dim)
    return value


@pytest.mark.parametrize(
    ("src", "dst", "shape", "dims"),
    [
        ("tp2 dp3", "tp3 dp2", (12, 5), ("sample",)),
        ("tp2 dp4", "tp2 cp2 dp2 sp zigzag", (8, 8, 3), ("sample", "sequence")),
        ("tp2 dp4 sp", "tp2 pp2 dp2 sp", (4, 4, 3), ("sample", "sequence")),
        ("tp4 dp2 sp", "tp2 dp4", (4, 8), ("sample", "sequence")),
    ],
)
def test_there_and_back(src: str, dst: str, shape: Any, dims: tuple[str, ...]) -> None:
    plan = solved(src, dst, dims=dims)
    value = np.arange(np.prod(shape)).reshape(shape)
    ranks = range(plan.src.layout.size)
    have = [part(value, plan.src, rank, plan.grid) for rank in ranks]
    need = [part(value, plan.dst, rank, plan.grid) for rank in ranks]
    for got, want in zip(plan.simulate(have), need, strict=True):
        np.testing.assert_array_equal(got.ravel(), want.ravel())
    for got, want in zip(plan.simulate(need, backward=True), have, strict=True):
        np.testing.assert_array_equal(got, want)


def test_summands_of_cp_ranks_add() -> None:
    plan = solved("dp4", "cp2 dp2")
    gradients = [np.full((2, 1), 10.0**rank) for rank in range(4)]
    back = plan.simulate(gradients, backward=True)
    # Replica 0 is ranks 0 and 1, replica 1 ranks 2 and 3; each rank encodes one of four samples.
    assert [float(part[0, 0]) for part in back] == [11, 11, 1100, 1100]


def test_samples_of_another_dim() -> None:
    plan = solved("dp2", "tp2")
    shards = [np.full((3, 1), rank) for rank in range(2)]
    for got in plan.simulate(shards, tensor_dims=(1,)):
        np.testing.assert_array_equal(got, [[0, 1]] * 3)


def test_shards_that_do_not_fit() -> None:
    plan = solved("dp4", "tp2 dp2")
    with pytest.raises(LayoutError, match="3 shards"):
        plan.simulate([np.zeros(1)] * 3)
    with pytest.raises(LayoutError, match="cells of different sizes"):
        plan.simulate([np.zeros(1), np.zeros(2), np.zeros(1), np.zeros(1)])
    rows = solved("dp2", "tp2", dims=("sample", "row", "position"))
    with pytest.raises(LayoutError, match="as many rows as the batch says"):
        rows.simulate([np.zeros((1, 1, 1))] * 2)

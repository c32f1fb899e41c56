"""Covers runtime/rows.py and row_moves.py: rows that name their sample and position, moved and
compared exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.solve.plan import Plan
from colocc.passes.solve.solver import solve
from colocc.runtime.groups import close_groups, open_groups
from colocc.runtime.row_moves import RowRedistribution
from colocc.runtime.rows import Cells, Rows, units_of
from colocc.sequence import cuts
from tests.harness import run_threads

LENGTH, COLUMNS, TOKEN = 16, 3, 9
PAIRS = {
    "3:2": (Layout(tp=2, dp=3), Layout(tp=3, dp=2)),
    "2:3": (Layout(tp=3, dp=2), Layout(tp=2, dp=3)),
    "fan_in": (Layout(dp=8), Layout(tp=4, dp=2)),
    "fan_out": (Layout(tp=8), Layout(tp=2, dp=4)),
    "pp2": (Layout(tp=2, dp=4), Layout(tp=2, pp=2, dp=2)),
    "pp2 by order": (
        Layout(tp=2, dp=4),
        Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp"),
    ),
    "sp": (Layout(tp=2, dp=4), Layout(tp=4, dp=2, sp=True)),
    "equal, sp": (Layout(tp=2, dp=2), Layout(tp=2, dp=2, sp=True)),
    "cp2": (Layout(tp=2, dp=4), Layout(cp=2, tp=2, dp=2)),
    "cp2 zigzag": (Layout(dp=8), Layout(cp=2, tp=2, dp=2, zigzag=True)),
    "cp2 zigzag sp pp2": (Layout(tp=2, dp=4), Layout(tp=2, cp=2, pp=2, sp=True, zigzag=True)),
    "sp to cp": (Layout(tp=2, dp=4, sp=True), Layout(cp=4, dp=2, zigzag=True)),
    "sp to sp": (Layout(tp=4, dp=2, sp=True), Layout(tp=2, dp=4, sp=True)),
    "encoder cp2": (Layout(cp=2, tp=2, dp=2), Layout(tp=4, dp=2, sp=True)),
    "dp fastest": (Layout(tp=2, dp=4, order="dp-tp"), Layout(tp=4, dp=2)),
}
pairs = pytest.mark.parametrize(("src", "dst"), PAIRS.values(), ids=list(PAIRS))

# Rows of each sample, by [replica * microbatches + microbatch][sample]: multiples of 4, so that a
# source's sequence parallelism over 4 ranks can cut each image.
COUNTS = {
    "ragged": [4, 0, 8, 4, 0, 12, 4, 8, 16, 0, 0, 4],
    "text only": [0] * 12,
    "one image": [0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0],
    "empty replica": [0, 0, 0, 0, 0, 0, 4, 8, 4, 4, 16, 8],
    "uniform": [4] * 12,
    "fewer samples than units": [4, 8, 0, 4, 12, 8],
}


def rows_of(counts: list[int], replicas: int, microbatches: int, seed: int = 0) -> Rows:
    """Each sample's rows at random positions, one item for every four; samples without rows at the
    end, so that microbatches are equal."""
    counts = counts + [0] * (-len(counts) % (replicas * microbatches))
    rng = np.random.default_rng(seed)
    places = [np.sort(rng.choice(LENGTH, size=count, replace=False)) for count in counts]
    return Rows(
        replicas,
        microbatches,
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate(places).astype(np.int64),
        np.full(len(counts), LENGTH),
        np.full(sum(counts) // 4, 4),
    )


def dims_of(src: Layout) -> tuple[str, ...]:
    """A source with cp makes all rows of a sample on each cp rank, one with sp a part."""
    return ("sample", "row", "position") if src.sp else ("sample", "position")


def coded(rows: list[int]) -> Tensor:
    return (torch.tensor(rows, dtype=torch.int64) + 1)[:, None] * torch.arange(1, COLUMNS + 1)


def held_by(plan: Plan, rows: Rows, rank: int) -> list[int]:
    """The rows that a source rank makes, sample by sample, without Cells: its tp rank's part of
    each item where it is sequence parallel."""
    layout, box = plan.src.layout, plan.src.box(rank)
    tp = int(layout.coordinates("tp")[rank])
    size = 4 // layout.tp if layout.sp else 4
    share = slice(tp * size, (tp + 1) * size) if layout.sp else slice(0, 4)
    found: list[int] = []
    samples = len(rows.lengths) // rows.replicas
    per = plan.units // rows.replicas
    for sample in range(len(rows.lengths)):
        replica, place = divmod(sample, samples)
        unit = next(
            replica * per + u
            for u in range(per)
            if u * samples // per <= place < (u + 1) * samples // per
        )
        if any(start <= unit < stop for start, stop in box[0]):
            first, last = int(rows.starts[sample]), int(rows.starts[sample + 1])
            for item in range(first, last, 4):
                found += list(range(item, item + 4))[share]
    return found


def read_by(dst: Layout, rows: Rows, rank: int) -> list[int]:
    """The rows of the rank's replica at positions in its part of the sequence."""
    if int(dst.coordinates("pp")[rank]):
        return []
    replica = int(dst.coordinates("dp")[rank])
    chunks, parts = cuts(dst)
    part = int(dst.coordinates("cp")[rank]) * (dst.tp if dst.sp else 1)
    part += int(dst.coordinates("tp")[rank]) if dst.sp else 0
    mine = {
        place
        for start, stop in parts[part]
        for place in range(start * LENGTH // chunks, stop * LENGTH // chunks)
    }
    samples = len(rows.lengths) // rows.replicas
    first, last = rows.starts[[replica * samples, (replica + 1) * samples]]
    return [row for row in range(int(first), int(last)) if int(rows.position[row]) in mine]


def on_ranks[R](plan: Plan, work: Callable[[RowRedistribution, int], R]) -> list[R]:
    def main(rank: int) -> R:
        opened = open_groups(plan.member_lists())
        result = work(RowRedistribution(plan, opened, rank), rank)
        close_groups(plan.member_lists())
        return result

    return run_threads(plan.src.layout.size, main, timeout=30)


@pytest.mark.parametrize("microbatches", [1, 2])
@pairs
def test_rows_arrive_and_gradients_return(src: Layout, dst: Layout, microbatches: int) -> None:
    plan = solve(("images", src), ("language", dst), dims=dims_of(src), scale=Fraction(3))
    batches = [rows_of(counts, dst.dp, microbatches) for counts in COUNTS.values()]

    def work(move: RowRedistribution, rank: int) -> None:
        for rows in batches:
            move.rows = rows
            held, read = held_by(plan, rows, rank), read_by(dst, rows, rank)
            value = coded(held).double().requires_grad_()
            moved = move(value)
            assert torch.equal(moved.detach(), coded(read).double())
            assert sum(move.counts(rows)) == len(read)
            (7 * moved * moved.detach()).sum().backward()
            assert value.grad is not None
            # Each row comes back once, from one of its readers, whatever the replicas.
            assert torch.equal(value.grad, 3 * 7 * coded(held).double())

    on_ranks(plan, work)


@pairs
def test_bytes_on_the_wire_are_the_rows_alone(src: Layout, dst: Layout) -> None:
    """What each rank receives from others is what it needs and does not have."""
    plan = solve(("images", src), ("language", dst), dims=dims_of(src))
    rows = rows_of(COUNTS["ragged"], dst.dp, 2)

    def work(move: RowRedistribution, rank: int) -> int:
        cells, came = Cells(plan, rows), 0
        for step in move.forward_steps:
            traffic = step.traffic(cells, torch.device("cpu"))
            members = zip(step.members, traffic.came, strict=True)
            came += sum(count for member, count in members if member != rank)
        return came

    for rank, came in enumerate(on_ranks(plan, work)):
        wanted = set(read_by(dst, rows, rank)) - set(held_by(plan, rows, rank))
        assert came == len(wanted), rank


def test_rows_are_cut_by_microbatch() -> None:
    rows = rows_of([4, 0, 8, 4, 0, 12, 4, 8], 2, 2)
    assert rows.by_microbatch(np.arange(0, 16)) == [4, 12]
    assert rows.by_microbatch(np.arange(16, 40)) == [12, 12]
    assert rows.by_microbatch(np.arange(0)) == [0, 0]


@pytest.mark.parametrize(("samples", "replicas", "units"), [(12, 2, 6), (10, 2, 6), (4, 2, 12)])
def test_units_cut_each_replica_s_samples_by_floor(samples: int, replicas: int, units: int) -> None:
    found, size, share = units_of(samples, replicas, units), samples // replicas, units // replicas
    for replica in range(replicas):
        for unit in range(share):
            first, last = unit * size // share, (unit + 1) * size // share
            mine = np.flatnonzero(found == replica * share + unit)
            assert mine.tolist() == list(range(replica * size + first, replica * size + last))


def test_a_wrong_number_of_rows_names_the_rank() -> None:
    src, dst = PAIRS["fan_in"]
    plan = solve(("images", src), ("language", dst), dims=dims_of(src))
    move = RowRedistribution(plan, dict.fromkeys(plan.member_lists()), 3, name="images_language")  # type: ignore[arg-type]
    move.rows = rows_of([4] * 16, 2, 1)
    with pytest.raises(LayoutError, match=r"images on rank 3 made 7 rows, .* 8 placeholders"):
        move(torch.zeros(7, 2))


def test_two_levels_are_refused() -> None:
    src, dst = Layout(tp=2, dp=4), Layout(tp=4, dp=2)
    plan = solve(("images", src), ("language", dst), dims=dims_of(src), ranks_per_node=2)
    if "slice" not in plan.dims:
        pytest.fail("the plan has one level: choose another pair")
    with pytest.raises(LayoutError, match="leave out ranks_per_node"):
        RowRedistribution(plan, {}, 0)


def test_rows_are_alike_where_every_part_of_them_is() -> None:
    rows = rows_of([4, 0, 2, 1], 2, 1)
    assert rows.alike(rows_of([4, 0, 2, 1], 2, 1))
    others = [
        rows_of([4, 0, 1, 2], 2, 1),
        rows_of([4, 0, 2, 1], 1, 2),
        replace(rows, position=rows.position + 1),
        replace(rows, lengths=rows.lengths + 1),
        replace(rows, items=rows.items[:-1]),
        replace(rows, unit=np.array([0, 0, 1, 1])),
    ]
    assert [rows.alike(other) for other in others] == [False] * len(others)
    dealt = others[-1]
    assert dealt.alike(replace(dealt, unit=np.array([0, 0, 1, 1])))
    assert not dealt.alike(replace(dealt, unit=np.array([0, 1, 1, 1])))

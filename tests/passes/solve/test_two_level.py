"""Covers passes/solve/two_level.py: every byte crosses between nodes once."""

from math import prod

import numpy as np
import pytest

from colocc.layout import Layout
from colocc.passes.solve.boxes import length, overlap
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Holding, Plan, Step
from colocc.passes.solve.solver import solve

EDGES = [
    ("tp2 dp8", "tp16", 8),
    ("dp16", "tp8 dp2", 4),
    ("tp2 dp8", "tp4 pp2 dp2", 4),
    ("tp16", "tp2 dp8", 8),
    ("dp12", "tp4 dp3 order=dp-tp", 6),
]


def crossing(steps: tuple[Step, ...], ranks_per_node: int) -> int:
    """Cells that go from a node to another."""
    total = 0
    for step in steps:
        assert step.kind in ("all_to_all", "send_recv", "narrow")
        far = step.moves.src // ranks_per_node != step.moves.dst // ranks_per_node
        total += int(step.moves.cells()[far].sum())
    return total


def lacking(have: Holding, need: Holding, plan: Plan, ranks_per_node: int) -> int:
    """Cells that some rank of a node needs and none of it has, over all nodes; samples alone."""
    total, rest = 0, prod(plan.grid[1:])
    for node in range(plan.src.layout.size // ranks_per_node):
        ranks = range(node * ranks_per_node, (node + 1) * ranks_per_node)
        held, wanted = np.zeros((2, plan.units), dtype=bool)
        for side, units in ((held, have.units()), (wanted, need.units())):
            for rank in ranks:
                for start, stop in units[rank]:
                    side[start:stop] = True
        total += int((wanted & ~held).sum()) * rest
    return total


@pytest.mark.parametrize(("src", "dst", "ranks_per_node"), EDGES)
def test_nodes_receive_what_they_lack_and_no_more(src: str, dst: str, ranks_per_node: int) -> None:
    ends = ("images", Layout.parse(src)), ("language", Layout.parse(dst))
    plan = solve(*ends, ranks_per_node=ranks_per_node)
    check(plan)
    for steps, have, need in (
        (plan.forward, plan.src, plan.dst),
        (plan.backward, plan.dst, plan.src),
    ):
        assert crossing(steps, ranks_per_node) == lacking(have, need, plan, ranks_per_node)
    for got, least in zip(plan.received_cells(), plan.bound_cells(), strict=True):
        assert np.array_equal(got, least)


def test_one_level_would_cross_more_often() -> None:
    ends = ("images", Layout(tp=2, dp=8)), ("language", Layout(tp=16))
    (plain,) = solve(*ends).forward
    two = solve(*ends, ranks_per_node=8)
    assert plain.kind == "all_gather"
    assert len(two.forward) == 2 and two.reasons[0].startswith("fwd two collectives")
    # Each of 16 ranks takes the half of the units that the other node has.
    units = sum(
        length(need) - overlap(need, ((0, 4),) if rank < 8 else ((4, 8),))
        for rank, need in enumerate(two.dst.units())
    )
    assert crossing(two.forward, 8) * 8 == units * two.grid[-1]


def test_inside_one_node_nothing_changes() -> None:
    ends = ("images", Layout(tp=2, dp=4)), ("language", Layout(tp=8))
    assert solve(*ends, ranks_per_node=8).forward == solve(*ends).forward

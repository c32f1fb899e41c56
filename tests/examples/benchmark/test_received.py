"""Covers examples/benchmark/received.py: the table of the docs is what it prints."""

from pathlib import Path

from examples.benchmark.received import CASES, gathered, plan_of, table

DOCS = Path(__file__).parents[3] / "docs" / "redistribution.md"


def test_the_docs_hold_the_table() -> None:
    assert table() in DOCS.read_text()


def test_no_case_is_above_its_bound_or_above_gathering() -> None:
    for _, src, dst in CASES:
        plan = plan_of(src, dst)
        got, least = plan.received_cells(), plan.bound_cells()
        for index, naive in enumerate(gathered(plan)):
            assert (got[index] == least[index]).all()
            assert got[index].max() <= naive * plan.grid[0] * (
                plan.grid[-1] if len(plan.grid) > 1 else 1
            )

"""Covers examples/benchmark/balance.py: the table of the docs is what it prints."""

from pathlib import Path

from colocc.layout import Layout
from examples.benchmark.balance import CASES, measured, table

DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_docs_hold_the_table() -> None:
    assert table() in DOCS.read_text()


def test_balanced_is_near_the_bound_and_below_the_order() -> None:
    for _, src, dst in CASES[:3]:
        before, after, bound, _ = measured(Layout.parse(src), Layout.parse(dst))
        assert bound <= after <= 1.05 * bound < before

"""Covers examples/benchmark/profiled.py."""

import pytest

from examples.benchmark.profiled import covered


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(0, 2), (5, 6)], 3), ([(1, 4), (0, 2)], 4), ([(0, 9), (1, 2), (8, 10)], 10)],
)
def test_overlapping_spans_count_once(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == length

"""Covers examples/benchmark/predicted.py."""

from examples.benchmark.predicted import row


def test_a_row_by_hand() -> None:
    # Three phases: 16 + 3 microbatches of 16, and the encoder's tenth; ideal: the pipeline alone.
    cells = [cell.strip() for cell in row(4, 16, 0.1).strip("|").split("|")]
    assert cells[:2] == ["4, 16", "10.0%"]
    assert abs(float(cells[2]) - (19 / 16 + 0.1)) < 1e-3
    assert abs(float(cells[4]) - 19 / 16) < 1e-3
    assert float(cells[4]) <= float(cells[3]) < float(cells[2])
    assert float(cells[5]) > 1.0

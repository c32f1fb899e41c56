"""Covers examples/digits_report.py."""

from pathlib import Path

import pytest

from examples import digits_report as report

RUN = report.Run([4.0, 2.0, 0.125], 0.975, 8, {"images": "tp1 dp8", "language": "tp2 pp2 dp2"})


def test_closing_line() -> None:
    assert report.closing_line(RUN) == (
        "digits: held-out accuracy 0.9750, loss 4.0000 -> 0.1250, 3 steps, 8 ranks, "
        "images tp1 dp8 -> language tp2 pp2 dp2"
    )


def test_read_inverts_write(tmp_path: Path) -> None:
    report.write(RUN, tmp_path / "new")
    assert report.read(tmp_path / "new") == RUN


def test_the_largest_difference_is_relative_to_the_reference() -> None:
    other = report.Run([4.0, 2.5, 0.125], 0.9, 1, RUN.layouts)
    assert report.largest_difference(RUN, other) == pytest.approx(0.2)
    assert report.largest_difference(RUN, other, steps=1) == 0.0
    assert report.difference(RUN, other).endswith("over 3 steps: 2.0e-01")


def test_runs_of_other_lengths_are_no_reference() -> None:
    with pytest.raises(ValueError, match="shorter"):
        report.largest_difference(RUN, report.Run([4.0], 0.9, 1, RUN.layouts))


def test_plot_draws_a_png(tmp_path: Path) -> None:
    report.plot(RUN, RUN, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

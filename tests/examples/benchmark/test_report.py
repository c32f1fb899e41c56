"""Covers examples/benchmark/report.py: medians, ratios, T*, and what must be equal."""

from pathlib import Path
from typing import Any

import pytest

from examples.benchmark import report
from examples.benchmark.cases import Case


def arm(*seconds: float, loss: float | None = 2.0, norm: float | None = 1.0) -> dict[str, Any]:
    return {
        "seconds": list(seconds),
        "peak_gib": 1.5,
        "outside_gib": 0.5,
        "communicators": 3,
        "loss": loss,
        "norm": norm,
    }


def result(*, language: str = "tp2", **arms: Any) -> report.Result:
    case = Case("tiny", "tp1 dp2", language, 8, 4, tuple(arms))
    return {"case": case.to_json(), "arms": arms, "device": "CPU", "world": 2}


ALONE: dict[str, Any] = {
    "language_only": arm(2.0, 2.0, loss=None, norm=None),
    "encoder_only": arm(1.0, 1.0, loss=None, norm=None),
}


def test_ratios_are_of_steps_that_took_turns() -> None:
    # Both drift by a factor of ten; the ratio does not.
    found = report.ratio(result(one=arm(1, 2, 10), other=arm(2, 4, 20)), "one", "other")
    assert found == (0.5, 0.0)


def test_an_arm_that_took_no_turns_is_compared_with_the_median() -> None:
    measured: dict[str, Any] = {"first_stage=2": arm(3, 3), "three_phase": arm(1, 2, 6)}
    assert report.ratio(result(**measured), "first_stage=2", "three_phase") == (1.5, 0.0)


def test_an_arm_that_failed_has_no_ratio() -> None:
    failed = result(one=arm(1.0), other={"failed": "out of memory"})
    assert report.ratio(failed, "one", "other") is None
    assert "| other | out of memory |" in report.markdown([failed])


def test_ideal_without_a_pipeline_is_the_sum() -> None:
    assert report.ideal(result(**ALONE)) == 3.0


def test_ideal_with_a_pipeline_hides_the_encoder_in_the_bubble() -> None:
    # Of 2 s, 4 / 5 is work, so a bubble of 0.4 s hides a part of the encoder's second.
    assert report.ideal(result(language="tp1 pp2", **ALONE)) == pytest.approx(2.6)


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (arm(1.0), 0),
        (arm(1.0, loss=2.1), 1),
        (arm(1.0, loss=float("nan")), 1),
        (arm(1.0, loss=2.1, norm=0.5), 2),
    ],
)
def test_losses_and_norms_that_differ_are_told(other: dict[str, Any], wrong: int) -> None:
    problems = report.differing(result(one=arm(1.0), other=other, **ALONE), 1e-3)
    assert len(problems) == wrong


def test_table_and_plot(tmp_path: Path) -> None:
    shown = result(megatron=arm(1.0, 3.0), fast=arm(0.5, 1.5), **ALONE)
    text = report.markdown([shown])
    assert "| megatron | 2.000 | 0.500 |" in text
    assert "fast / megatron: 0.500 +- 0.000." in text
    assert "T* = 3.000 s" in text
    report.plot([shown, result(broken={"failed": "out of memory"})], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_what_was_measured_and_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "predicted", lambda: "| stages |\n")
    measured = result(one=arm(1.0))
    text = report.page([measured])
    assert report.markdown([measured]) in text
    assert text.endswith("| stages |\n")
    assert "Nothing yet." in report.page([])

"""Covers examples/benchmark: the command on CPU ranks, every arm of the tiny cases, and failure."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.benchmark.__main__ import main, reason_of
from examples.benchmark.cases import SETS


def test_every_arm_trains_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["tiny", "--out", str(tmp_path), "--steps", "2", "--warmup", "1", "--trace"])
    assert code == 0, (tmp_path / "ranks.log").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [tuple(result["arms"]) for result in results] == [case.arms for case in SETS["tiny"]]
    losses = set()
    for result in results:
        for name, arm in result["arms"].items():
            assert len(arm["seconds"]) == 2, (name, arm)
            if arm["loss"] is not None:
                losses.add(round(arm["loss"], 4))
                assert arm["norm"] > 0
    assert len(losses) == 1
    assert capsys.readouterr().out == (tmp_path / "results.md").read_text()
    assert (tmp_path / "steps.png").exists()
    traces = {path.name for path in (tmp_path / "traces").glob("*.json")}
    assert SETS["tiny"][1].file_of("filled=1+graphs") == (
        "tiny_tp1_dp2_tp1_pp2_8_in_4_filled_1_graphs.json"
    )
    assert "tiny_tp1_dp2_tp1_pp2_8_in_4_filled.json" in traces
    assert len(traces) == 3 + 2 + 2  # colocc's own arms, the homogeneous one with them


def test_an_arm_that_fails_is_left_out_and_named(tmp_path: Path) -> None:
    arms = ["--model", "toy", "--arms", "lookahead=3", "three_phase", "lookahead=0"]
    code = main(["tiny", "--cases", "0", "--out", str(tmp_path), "--steps", "1", *arms])
    assert code == 0, (tmp_path / "ranks.log").read_text()
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["case"]["model"] == "toy"
    assert "schedule 'lookahead=0' is not known" in result["arms"]["lookahead=0"]["failed"]
    assert len(result["arms"]["three_phase"]["seconds"]) == 1


def test_a_model_that_cannot_be_built_is_named_by_its_arm(tmp_path: Path) -> None:
    arms = ["--arms", "three_phase", "homogeneous@tp3", "homogeneous=lookahead=1"]
    code = main(["tiny", "--cases", "0", "--out", str(tmp_path), "--steps", "1", *arms])
    assert code == 0, (tmp_path / "ranks.log").read_text()
    (result,) = json.loads((tmp_path / "results.json").read_text())
    failed = {name for name, found in result["arms"].items() if "failed" in found}
    assert failed == {"homogeneous@tp3"}
    assert "3 ranks" in result["arms"]["homogeneous@tp3"]["failed"]


def test_reasons() -> None:
    own = "[rank0]: ValueError: too long"
    peer = "[rank1]: RuntimeError: Connection closed by peer"
    assert reason_of(f"{peer}\n{own}\nChildFailedError: \n", 1) == own
    assert reason_of("torch.OutOfMemoryError: CUDA out of memory", 1) == "out of memory"
    assert reason_of("", -9) == "exit code -9"


def test_results_of_several_runs_are_written_together(tmp_path: Path) -> None:
    case = replace(SETS["tiny"][0], arms=("three_phase",))
    arm = {
        "seconds": [1.0],
        "peak_gib": 1.0,
        "outside_gib": 1.0,
        "communicators": 2,
        "loss": 1.0,
        "norm": 1.0,
    }
    case_line = {"case": case.to_json(), "arms": {"three_phase": arm}}
    line = json.loads(json.dumps(case_line | {"device": "CPU", "world": 2}))
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for file in files:
        file.write_text(json.dumps(line) + "\n")
    out = tmp_path / "out"
    assert main(["--results", *map(str, files), "--out", str(out)]) == 0
    assert json.loads((out / "results.json").read_text()) == [line, line]


@pytest.mark.parametrize("arguments", [[], ["huge"]])
def test_a_set_must_be_known(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)

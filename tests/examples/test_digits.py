"""Covers examples/digits.py: the command."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colocc import Layout
from examples import digits, digits_report

SHORT = ["--steps", "3", "--global-batch", "16", "--microbatches", "2"]


def test_parse_takes_layouts() -> None:
    options = digits.parse(["--layout", "images=tp2,dp4", "--layout", "language=tp2,pp2,dp2"])
    assert dict(options.layout) == {
        "images": Layout(tp=2, dp=4),
        "language": Layout(tp=2, pp=2, dp=2),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout", "audio=tp2"], "'audio=tp2' names no module: write images="),
        (["--layout", "images"], "'images' names no module"),
        (["--layout", "images=tp0"], "tp"),
        (["--layout", "images=qp2"], "qp2"),
        (["--global-batch", "10"], "10 in --microbatches 4: 10 % 4 = 2; give a multiple of 4"),
        (["--steps", "0"], "--steps is 0: at least 1"),
        (["--global-batch", "2000"], "the training scans are fewer"),
    ],
)
def test_parse_says_what_does_not_fit(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        digits.parse(words)
    assert message in capsys.readouterr().err


def test_numbers_are_a_command_line() -> None:
    options = digits.parse([*SHORT, "--seed", "5", "--learning-rate", "0.25", "--bf16"])
    again = digits.parse(digits.numbers(options))
    assert vars(again) == vars(options)


def test_demo_starts_a_run_on_eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **unused: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert digits.main(["demo", "--steps", "7", "--layout", "images=tp2,dp4"]) == 3
    (command,) = started
    assert command[command.index("--nproc-per-node") + 1] == "8"
    options = digits.parse(command[command.index(digits.__file__) + 1 :])
    assert (options.mode, options.steps, options.compare) == ("run", 7, True)
    assert dict(options.layout) == {
        "images": Layout(tp=2, dp=4),
        "language": Layout(tp=2, pp=2, dp=2),
    }


def test_the_command_on_one_process_ends_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, digits.__file__, *SHORT, "--out", str(tmp_path)]
    environ = {n: v for n, v in os.environ.items() if n not in ("COLOCC_DUMP", "WORLD_SIZE")}
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=200, check=True
    )
    line = (
        r"digits: held-out accuracy [01]\.\d{4}, loss \d+\.\d{4} -> \d+\.\d{4}, 3 steps, 1 ranks, "
        r"images tp1 dp1 -> language tp1 dp1\n"
    )
    assert re.fullmatch(line, done.stdout)
    run = digits_report.read(tmp_path)
    assert len(run.losses) == 3
    assert all(math.isfinite(loss) for loss in run.losses)
    pages = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert pages[0] == "01_capture.txt"
    assert len(pages) == 6

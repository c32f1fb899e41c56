"""Covers examples/digits.py: the command, and a short run on ranks against one process."""

import argparse
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from colocc import Layout
from colocc.runtime import cpu
from examples import digits, digits_report
from tests.harness import ProcessPool

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


def test_the_learning_rate_warms_up_and_cools_down() -> None:
    rates = [digits.warm_then_cool(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3


def test_loss_counts_tokens_of_names_only() -> None:
    losses, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    total, tokens, log = digits.loss_of_names((losses, mask))
    assert float(total) == 6.0
    assert int(tokens) == 2
    assert not tokens.is_floating_point()
    assert log["loss"].tolist() == [6.0, 2.0]


def run_on_rank(
    _: int, options: argparse.Namespace, layouts: dict[str, Layout]
) -> digits_report.Run:
    with cpu.ranks():
        return digits.train_and_read(options, layouts, torch.device("cpu"))


def test_ranks_train_and_read_as_one_process_does(processes: ProcessPool, tmp_path: Path) -> None:
    options = digits.parse([*SHORT, "--out", str(tmp_path)])
    one = {"images": Layout(), "language": Layout()}
    layouts = {"images": Layout(dp=4), "language": Layout(tp=2, pp=2)}
    alone = processes.run(1, partial(run_on_rank, options=options, layouts=one))[0]
    ranks = processes.run(4, partial(run_on_rank, options=options, layouts=layouts))
    assert all(run == ranks[0] for run in ranks)
    assert digits_report.largest_difference(ranks[0], alone) < 1e-5
    assert ranks[0].accuracy == pytest.approx(alone.accuracy, abs=1 / 360)
    assert ranks[0].losses[0] != ranks[0].losses[-1]
    assert ranks[0].ranks == 4


def test_bf16_runs_and_loses_little(processes: ProcessPool, tmp_path: Path) -> None:
    layouts = {"images": Layout(dp=2), "language": Layout(tp=2)}
    runs = []
    for precision in ("--bf16", "--no-bf16"):
        options = digits.parse([*SHORT, precision, "--out", str(tmp_path)])
        runs.append(processes.run(2, partial(run_on_rank, options=options, layouts=layouts))[0])
    assert 0 < digits_report.largest_difference(runs[0], runs[1]) < 0.02


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
    assert len(pages) == 5

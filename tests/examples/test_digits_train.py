"""Covers examples/digits_train.py: a short run on ranks against the same run on one process."""

import argparse
from functools import partial
from pathlib import Path

import pytest
import torch

from colocc import Layout
from colocc.runtime import cpu
from examples import digits, digits_report, digits_train
from tests.harness import ProcessPool

SHORT = ["--steps", "3", "--global-batch", "16", "--microbatches", "2"]


def test_the_learning_rate_warms_up_and_cools_down() -> None:
    rates = [digits_train.warm_then_cool(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3


def test_loss_counts_tokens_of_names_only() -> None:
    losses, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    total, tokens, log = digits_train.loss_of_names((losses, mask))
    assert float(total) == 6.0
    assert int(tokens) == 2
    assert not tokens.is_floating_point()
    assert log["loss"].tolist() == [6.0, 2.0]


def run_on_rank(
    _: int, options: argparse.Namespace, layouts: dict[str, Layout]
) -> digits_report.Run:
    with cpu.ranks():
        return digits_train.train_and_read(options, layouts, torch.device("cpu"))


@pytest.mark.parametrize(
    ("images", "language"), [("tp1 dp4", "tp2 pp2"), ("tp2 dp2", "pp2 dp2"), ("tp2 dp2", "dp4")]
)
def test_ranks_train_and_read_as_one_process_does(
    processes: ProcessPool, tmp_path: Path, images: str, language: str
) -> None:
    options = digits.parse([*SHORT, "--out", str(tmp_path)])
    one = {"images": Layout(), "language": Layout()}
    layouts = {"images": Layout.parse(images), "language": Layout.parse(language)}
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

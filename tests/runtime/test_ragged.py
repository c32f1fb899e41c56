"""Covers runtime/ragged.py, and ragged batches through a MimoModel against the float64 oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout
from colocc.runtime import cpu
from colocc.testing import Run, compare, float64, observed, oracle, relative_l2, watch_input
from tests import mimo, ragged
from tests.harness import ProcessPool

TOKENS = {"images": ragged.TOKEN}
PATH = ("modality_inputs", "images")

# By microbatch, the images of each sample.
STREAMS = {
    "text only": [[0] * 8, [0] * 8],
    "ragged": [[0, 1, 2, 0, 3, 1, 0, 1], [1, 1, 0, 0, 0, 0, 2, 0], [2, 0, 1, 1, 0, 0, 0, 0]],
    "a text-only microbatch": [[0] * 8, [1, 0, 2, 0, 0, 0, 0, 1]],
    "text-only replicas": [[0, 0, 0, 0, 1, 3, 0, 2], [0] * 8],
    "uniform": [[1] * 8, [1] * 8],
    "text only again": [[0] * 8],
}
LAYOUTS = {
    "fan_in": {"images": Layout(tp=2, dp=4), "language": Layout(tp=4, dp=2)},
    "fan_out": {"images": Layout(tp=8), "language": Layout(tp=2, dp=4)},
    "pp2": {"images": Layout(dp=8), "language": Layout(tp=2, pp=2, dp=2)},
    "equal": {"images": Layout(tp=4, dp=2), "language": Layout(tp=4, dp=2)},
    "sp": {"images": Layout(tp=2, dp=4), "language": Layout(tp=2, dp=4, sp=True)},
    "sp pp2": {"images": Layout(dp=8), "language": Layout(tp=2, pp=2, dp=2, sp=True)},
}


# ---------------------------------------------------------------- against the oracle


def batches(stream: list[list[int]]) -> list[dict[str, Any]]:
    return [ragged.batch(images, seed=seed) for seed, images in enumerate(stream)]


def reference_on_rank(_: int) -> dict[str, Run]:
    layouts = {"images": Layout(), "language": Layout()}
    with cpu.ranks(), float64(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False)
        return {
            name: oracle(model, batches(stream), mimo.loss_func, replicas=1)
            for name, stream in STREAMS.items()
        }


def steps_on_rank(_: int, layouts: Mapping[str, Layout]) -> dict[str, Run]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts, sequence_parallel=layouts["language"].sp)
        program = stack.enter_context(colocc.compile(model, layouts, groups=groups))
        runs = {}
        for name, stream in STREAMS.items():
            seen: list[torch.Tensor] = []
            model.zero_grad_buffer()
            with watch_input(model.language_model, seen):
                logs = program.forward_backward(
                    batches(stream),
                    num_microbatches=len(stream),
                    loss_func=mimo.loss_func,
                    force_all_reduce=True,
                )
            losses = [log["loss"] for log in logs]
            runs[name] = observed(program, losses, seen, microbatches=len(stream))
        return runs


@pytest.fixture(scope="module")
def reference(processes: ProcessPool) -> dict[str, Run]:
    return processes.run(1, reference_on_rank)[0]


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=list(LAYOUTS))
def test_ragged_batches_equal_the_oracle(
    processes: ProcessPool, reference: dict[str, Run], layouts: dict[str, Layout]
) -> None:
    ranks = processes.run(8, partial(steps_on_rank, layouts=layouts))
    language = layouts["language"]
    for name, stream in STREAMS.items():
        wanted, seen = reference[name], [rank[name] for rank in ranks]
        gradients = [Run(gradients=run.gradients) for run in seen]
        # The oracle's encoder is not called without images: its gradients are zeros.
        zeros = {n: torch.zeros_like(g) for n, g in reference["ragged"].gradients.items()}
        compare(gradients, Run(gradients=zeros | wanted.gradients), noise=1e-9)
        check_inputs(seen, wanted, language)
        check_loss(seen, wanted, language, stream)


def check_inputs(seen: list[Run], wanted: Run, language: Layout) -> None:
    """Each rank of the first stage holds its part of what the oracle's language module reads."""
    for rank, run in enumerate(seen):
        first = int(language.coordinates("pp")[rank]) == 0
        assert len(run.inputs) == (len(wanted.inputs) if first else 0)
        for (microbatch, _), value in run.inputs.items():
            part = ragged.part_of(wanted.inputs[microbatch, 0], language, rank)
            assert value.shape == part.shape
            assert relative_l2(value, part) < 1e-5, (rank, microbatch)


def check_loss(seen: list[Run], wanted: Run, language: Layout, stream: list[list[int]]) -> None:
    """The sums of the losses of all replicas and cp ranks over the tokens are the oracle's loss."""
    places = zip(*(language.coordinates(axis).tolist() for axis in ("dp", "cp")), strict=True)
    leaders = {
        place: run.loss for place, run in zip(places, seen, strict=True) if run.loss is not None
    }
    assert len(leaders) == language.dp * language.cp
    tokens = sum(int(batch["loss_mask"].sum()) for batch in batches(stream))
    total = sum(loss for loss in leaders.values() if loss is not None)
    assert total / tokens == pytest.approx(wanted.loss, rel=1e-5)

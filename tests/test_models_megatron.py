"""Covers docs/models.md: Megatron's MimoModel trained for three steps, pipelined and not."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout
from colocc.runtime import cpu
from colocc.testing import Run, compare, float64, observed, oracle, watch_input
from tests import mimo
from tests.harness import ProcessPool

STEPS, MICROBATCHES, RATE, SAMPLES = 3, 3, 0.1, 8
IMAGES = Layout(tp=2, dp=4)
LANGUAGE = {1: Layout(tp=4, dp=2), 2: Layout(tp=2, pp=2, dp=2)}

Layouts = dict[str, Layout]
Options = dict[str, Any]


def batches(step: int, layouts: Layouts) -> list[dict[str, Any]]:
    names = tuple(name for name in layouts if name != "language")
    seeds = range(step * MICROBATCHES, (step + 1) * MICROBATCHES)
    return [mimo.batch(SAMPLES, names, seed=seed) for seed in seeds]


def alone(_: int, layouts: Layouts, options: Options) -> list[Run]:
    """What each step makes of the whole model in one process, in float64, with SGD between."""
    single = {name: Layout() for name in layouts}
    with cpu.ranks(), float64(), colocc.process_groups(single) as groups:
        model = mimo.build(groups, single, wrap=False, **options)
        seen = []
        for step in range(STEPS):
            given = batches(step, layouts)
            seen.append(oracle(model, given, mimo.loss_func, replicas=layouts["language"].dp))
            tokens = sum(int(batch["loss_mask"].sum()) for batch in given)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.grad is not None:
                        weight -= RATE * weight.grad / tokens
        return seen


def together(_: int, layouts: Layouts, options: Options) -> list[Run]:
    """What this rank sees of each step of the compiled model, with Megatron's SGD between."""
    from megatron.core.optimizer import OptimizerConfig

    sgd = OptimizerConfig(
        optimizer="sgd", lr=RATE, sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts, **options)
        program = stack.enter_context(colocc.compile(model, layouts, groups=groups))
        modules: list[Any] = list(program.trainable().values())
        optimizer, runs = program.optimizer(sgd), []
        for step in range(STEPS):
            seen: list[torch.Tensor] = []
            for module in modules:
                module.zero_grad_buffer()
            optimizer.zero_grad()
            with watch_input(model.language_model, seen):
                logs = program.forward_backward(
                    batches(step, layouts), num_microbatches=MICROBATCHES, loss_func=mimo.loss_func
                )
            losses = [log["loss"] for log in logs]
            runs.append(observed(program, losses, seen, microbatches=MICROBATCHES))
            assert optimizer.step()[0]
        return runs


def check_trained(pool: ProcessPool, layouts: Layouts, **options: Any) -> None:
    (wanted,) = pool.run(1, partial(alone, layouts=layouts, options=options))
    ranks = pool.run(8, partial(together, layouts=layouts, options=options))
    language = layouts["language"]
    for step, reference in enumerate(wanted):
        seen = [rank[step] for rank in ranks]
        compare(seen, reference, tolerance=1e-5, noise=1e-9)
        sums = {
            replica: run.loss
            for replica, run in zip(language.coordinates("dp").tolist(), seen, strict=True)
            if run.loss is not None
        }
        assert len(sums) == language.dp
        tokens = sum(int(batch["loss_mask"].sum()) for batch in batches(step, layouts))
        assert sum(sums.values()) / tokens == pytest.approx(reference.loss, rel=1e-5)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("is_hybrid", [False, True])
def test_mimo_model(processes: ProcessPool, is_hybrid: bool, stages: int) -> None:
    layouts = {"images": IMAGES, "language": LANGUAGE[stages]}
    check_trained(processes, layouts, is_hybrid=is_hybrid, projector=is_hybrid)


def test_two_encoders_of_which_one_is_frozen(processes: ProcessPool) -> None:
    layouts = {"images": IMAGES, "audio": Layout(dp=8), "language": LANGUAGE[2]}
    check_trained(processes, layouts, frozen=("audio",), projector=True)

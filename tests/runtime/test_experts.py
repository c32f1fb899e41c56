"""Covers the ep axis: a MimoModel whose language model is a mixture of experts, against the float64
oracle, the loss that balances the experts included."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

import colocc
from colocc import Layout
from colocc.runtime import cpu
from colocc.testing import Run, compare, float64, observed, oracle, watch_input
from tests import mimo
from tests.harness import ProcessPool

EXPERTS, MICROBATCHES, SIZE = 4, 2, 8
CASES = {
    "ep4": ({"images": Layout(tp=2, dp=4), "language": Layout(ep=4, dp=8)}, False),
    "tp2 ep2 sp": (
        {"images": Layout(dp=8), "language": Layout(tp=2, ep=2, dp=4, sp=True)},
        True,
    ),
    "pp2 ep2": ({"images": Layout(dp=8), "language": Layout(pp=2, ep=2, dp=4)}, True),
}


def batches() -> list[dict[str, Any]]:
    return [mimo.batch(SIZE, seed=index) for index in range(MICROBATCHES)]


def reference_on_rank(_: int) -> dict[tuple[int, bool], Run]:
    """The loss that balances experts is one of each replica's microbatch."""
    layouts = {"images": Layout(), "language": Layout()}
    runs = {}
    with cpu.ranks(), float64(), colocc.process_groups(layouts) as groups:
        for replicas, per_token in {(layouts["language"].dp, p) for layouts, p in CASES.values()}:
            model = mimo.build(groups, layouts, wrap=False, experts=EXPERTS, per_token=per_token)
            share = 1.0 if per_token else 1 / (MICROBATCHES * replicas)
            MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([share]))
            runs[replicas, per_token] = oracle(
                model, batches(), mimo.loss_func, replicas=replicas, per_token=per_token
            )
    return runs


def step_on_rank(_: int, layouts: dict[str, Layout], per_token: bool) -> Run:
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(
            groups,
            layouts,
            experts=EXPERTS,
            per_token=per_token,
            sequence_parallel=layouts["language"].sp,
        )
        program = stack.enter_context(colocc.compile(model, layouts, groups=groups))
        seen: list[torch.Tensor] = []
        model.zero_grad_buffer()
        with watch_input(model.language_model, seen):
            logs = program.forward_backward(
                batches(),
                num_microbatches=MICROBATCHES,
                loss_func=mimo.loss_func,
                force_all_reduce=True,
            )
        losses = [log["loss"] for log in logs]
        return observed(program, losses, seen, microbatches=MICROBATCHES)


@pytest.fixture(scope="module")
def reference(processes: ProcessPool) -> dict[tuple[int, bool], Run]:
    return processes.run(1, reference_on_rank)[0]


@pytest.mark.parametrize(("layouts", "per_token"), CASES.values(), ids=list(CASES))
def test_experts_equal_the_oracle(
    processes: ProcessPool,
    reference: dict[tuple[int, bool], Run],
    layouts: dict[str, Layout],
    per_token: bool,
) -> None:
    work = partial(step_on_rank, layouts=layouts, per_token=per_token)
    runs = processes.run(8, work, timeout=300, detail=True)
    wanted = reference[layouts["language"].dp, per_token]
    worst = compare(runs, wanted, noise=1e-9)
    named = {f"local_experts.{expert}.linear_fc1.weight" for expert in range(EXPERTS)}
    assert all(any(name.endswith(expert) for name in worst) for expert in named)
    layer = "language.decoder.layers.0.mlp.experts.local_experts"
    held = {name.removeprefix(layer)[1] for name in runs[0].gradients if name.startswith(layer)}
    assert len(held) == EXPERTS // layouts["language"].ep
    if per_token:
        dp = layouts["language"].coordinates("dp").tolist()
        first = {d: run.loss for d, run in zip(dp, runs, strict=True) if run.loss is not None}
        tokens = sum(int(batch["loss_mask"].sum()) for batch in batches())
        assert wanted.loss == pytest.approx(sum(first.values()) / tokens, rel=1e-5)

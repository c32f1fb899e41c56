"""Covers runtime/cuda_graphs.py and runtime/captured.py: whole steps with recorded graphs."""

import contextlib
import warnings
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout
from colocc.runtime import cpu, megatron
from tests import mimo
from tests.harness import ProcessPool
from tests.runtime.megatron.test_engine import check_trained, train_on_rank
from tests.runtime.recorded import (
    recorded_graphs,
    started_early,
)

SMALL = {"images": Layout(dp=2), "language": Layout(tp=2)}


def steps_on_rank(
    _: int, layouts: dict[str, Layout], schedule: str, graphs: str, overlap: bool
) -> tuple[list[Any], dict[str, torch.Tensor], int]:
    """Two steps of three microbatches: logs, gradients, how many pairs were captured."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts, overlap=overlap, bucket_size=100 if overlap else None)
        early = stack.enter_context(started_early())
        program = stack.enter_context(
            colocc.compile(
                model, layouts, groups=groups, schedule=schedule, cuda_graphs=graphs != "off"
            )
        )
        if graphs == "recorded":
            stack.enter_context(recorded_graphs())
        logs = []
        for step in range(2):
            model.zero_grad_buffer()
            with warnings.catch_warnings():
                if graphs == "refused":
                    warnings.simplefilter("ignore", UserWarning)
                logs += program.forward_backward(
                    [mimo.batch(8, seed=3 * step + index) for index in range(3)],
                    num_microbatches=3,
                    loss_func=mimo.loss_func,
                    force_all_reduce=True,
                )
        found = {
            f"{owner}.{name}": megatron.main_gradient(weight).clone()
            for owner, module in program.trainable().items()
            for name, weight in module.named_parameters()
        }
        encoder: Any = model.modality_submodules["images"]
        buckets = len(encoder.bucket_groups)
        assert buckets > 2 or not overlap
        assert len(early) == (2 * buckets if overlap and graphs == "recorded" else 0)
        if graphs == "refused":
            assert [call.reason for call in program.captured.values()] == ["there is no GPU"]
        return logs, found, sum(call.captured() for call in program.captured.values())


@pytest.mark.parametrize(
    ("layouts", "schedule", "pairs", "overlap"),
    [
        (SMALL, "three_phase", 1, False),
        (SMALL, "lookahead=1", 1, False),
        (SMALL, "lookahead=2", 2, True),
        (SMALL, "three_phase", 1, True),
        ({"images": Layout(dp=2), "language": Layout(pp=2)}, "filled=1", None, False),
        ({"images": Layout(dp=2), "language": Layout(pp=2)}, "filled=2", None, True),
    ],
)
def test_a_step_with_graphs_is_a_step_without(
    processes: ProcessPool,
    layouts: dict[str, Layout],
    schedule: str,
    pairs: int | None,
    overlap: bool,
) -> None:
    work = partial(steps_on_rank, layouts=layouts, schedule=schedule, overlap=overlap)
    without, graphs, refused = (
        processes.run(2, partial(work, graphs=how)) for how in ("off", "recorded", "refused")
    )
    for one, other, third in zip(without, graphs, refused, strict=True):
        assert one[0] == other[0] == third[0]
        assert one[1].keys() == other[1].keys() == third[1].keys()
        for name, gradient in one[1].items():
            torch.testing.assert_close(other[1][name], gradient, rtol=1e-6, atol=1e-6)
            assert torch.equal(third[1][name], gradient), name
        assert one[2] == third[2] == 0
        assert other[2] == pairs if pairs is not None else other[2] >= 1


def trained_on_rank(rank: int, layouts: dict[str, Layout], schedule: str) -> list[Any]:
    with recorded_graphs():
        return train_on_rank(
            rank, layouts, distributed=True, schedule=schedule, overlap=True, cuda_graphs=True
        )


@pytest.mark.parametrize(
    ("language", "schedule"),
    [(Layout(pp=2), "three_phase"), (Layout(pp=2), "filled=1"), (Layout(tp=2), "lookahead=1")],
)
def test_graphs_train_on_weights_that_are_gathered_behind_the_step_before(
    processes: ProcessPool, language: Layout, schedule: str
) -> None:
    layouts = {"images": Layout(dp=2), "language": language}
    work = partial(train_on_rank, layouts=layouts, distributed=True, schedule=schedule)
    replayed = partial(trained_on_rank, layouts=layouts, schedule=schedule)
    check_trained(processes.run(2, replayed), processes.run(2, work))

"""Covers runtime/intake.py: ranks that call a step unlike, and what steps keep of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

import colocc
from colocc import Layout, LayoutError
from colocc.runtime import cpu
from tests import mimo, ragged
from tests.harness import ProcessPool


def unlike_calls_on_rank(rank: int) -> list[str]:
    """What is said where one rank evaluates and the other trains, and of a weight that was frozen
    when DDP looked; a good step follows."""
    layouts = {"images": Layout(dp=2), "language": Layout(pp=2)}
    said = []
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False)
        weight = model.modality_submodules["images"].encoders["vit"].outward.weight
        weight.requires_grad_(False)
        model.modality_submodules["images"] = wrapped(model, groups, "images")
        model.language_model = wrapped(model, groups, "language")
        with colocc.compile(model, layouts, groups=groups) as program:

            def run(**options: bool) -> None:
                step = [ragged.batch([1] * 4)]
                program.forward_backward(
                    step, num_microbatches=1, loss_func=mimo.loss_func, **options
                )

            with pytest.raises(LayoutError) as info:
                run(forward_only=rank == 1)
            said.append(str(info.value))
            weight.requires_grad_(rank == 1)
            with pytest.raises(LayoutError) as info:
                run()
            said.append(str(info.value))
            weight.requires_grad_(False)
            run()
    return said


def wrapped(model: Any, groups: Any, name: str) -> Any:
    module = model.language_model if name == "language" else model.modality_submodules[name]
    config = next(part.config for part in module.modules() if hasattr(part, "config"))
    settings = DistributedDataParallelConfig()
    return DistributedDataParallel(config, settings, module, pg_collection=groups[name])


def test_ranks_that_do_not_do_the_same_are_one_error_on_all(processes: ProcessPool) -> None:
    one, other = processes.run(2, unlike_calls_on_rank)
    assert one == other
    assert "trained images; rank 1 has" in one[0]
    assert "trained images with forward_only=True. rank 1 must be given" in one[0]
    assert "rank 1: images: module.encoders.vit.outward.weight requires a gradient, and" in one[1]


def spare_items_on_rank(_: int) -> bool:
    """Whether steps of text alone are the same before and after the memory of the images that
    came last has been overwritten."""
    layouts = {"images": Layout(dp=2), "language": Layout(dp=2)}
    text, batch = ragged.batch([0] * 4), ragged.batch([1] * 4)
    seen = []
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups) as program:
            for step in (batch, text, text):
                model.zero_grad_buffer()
                program.forward_backward([step], num_microbatches=1, loss_func=mimo.loss_func)
                seen.append([w.main_grad.clone() for w in model.parameters()])
                batch["modality_inputs"]["images"]["vit"]["x"].fill_(float("nan"))
    return all(map(torch.equal, seen[1], seen[2]))


def test_a_batch_s_memory_may_be_used_again(processes: ProcessPool) -> None:
    assert processes.run(2, spare_items_on_rank) == [True, True]

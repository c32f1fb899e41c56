"""Covers docs/models.md: models that nobody here wrote, compiled and trained on their layouts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import colocc
from colocc import CaptureError, Layout, LayoutError, Rows
from colocc.testing import float64, relative_l2
from tests.harness import run_threads
from tests.hf import (
    PLACE,
    llava,
    llava_batch,
    qwen_audio,
    qwen_audio_batch,
    qwen_vl,
    qwen_vl_batch,
    two_eyes,
    two_eyes_batch,
    voxtral,
    voxtral_batch,
)

EXACT = 1e-10
WIDE, TEXT = Layout(dp=8), Layout(tp=2, dp=4)
STEPS = 3

Batch = dict[str, Any]


def loss_of(output: Any) -> Tensor:
    loss: Tensor = output["loss"]
    return loss


def step_alone(model: nn.Module, batches: Sequence[Batch]) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each step, of the model in one process."""
    whole = copy.deepcopy(model)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    seen = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(whole(**batch))
        loss.backward()
        seen.append((float(loss.detach()), grads(whole)))
        optimizer.step()
    return seen


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".module.", ".").removeprefix("module."): weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def error(value: Tensor, reference: Tensor) -> float:
    """Relative L2; absolute where the reference is zero but for rounding (a key's bias)."""
    if reference.norm() <= 1e-12 * reference.numel() ** 0.5:
        return float(value.norm())
    return relative_l2(value, reference)


def wrap(model: nn.Module, layouts: Mapping[str, Layout], groups: colocc.ProcessGroups) -> None:
    """Each module with something to train in torch's DDP, over its own dp group."""
    for path in layouts:
        module = model.get_submodule(path)
        if any(weight.requires_grad for weight in module.parameters()):
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent) if parent else model
            setattr(owner, name, DistributedDataParallel(module, process_group=groups[path].dp))


def check_trained(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    batches: Sequence[Batch],
    *,
    idle: tuple[str, ...] = (),
    single: bool = False,
    **options: Any,
) -> str:
    """Train on 8 ranks, compare each step with one process; return the program's page. Modules that
    are ``idle`` may have no gradient in one process. Ranks compute in float64, or ``single``."""
    within, dtype = (1e-5, torch.float32) if single else (EXACT, torch.float64)
    given = [
        {n: v.to(dtype) if v.is_floating_point() else v for n, v in b.items()} for b in batches
    ]

    def precise() -> AbstractContextManager[None]:
        return nullcontext() if single else float64()

    def main(rank: int) -> tuple[list[tuple[float, dict[str, Tensor]]], str]:
        mine, seen = copy.deepcopy(model).to(dtype), []
        with (
            precise(),
            colocc.process_groups(layouts) as groups,
            colocc.compile(
                mine, layouts, groups=groups, example_inputs=given[0], **options
            ) as program,
        ):
            wrap(mine, layouts, groups)
            optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
            for batch in given:
                optimizer.zero_grad()
                loss = loss_of(program(**batch))
                loss.backward()
                total = loss.detach().clone()
                torch.distributed.all_reduce(total)
                seen.append((float(total) / 8, grads(mine)))
                optimizer.step()
            return seen, str(program)

    with float64():
        wanted = step_alone(model, batches)
    with precise():
        results = run_threads(8, main, timeout=120)
    for rank, (seen, _) in enumerate(results):
        for step, ((loss, got), (right, gradients)) in enumerate(zip(seen, wanted, strict=True)):
            assert abs(loss - right) < within * abs(right), (rank, step)
            assert got.keys() >= gradients.keys()
            for name, gradient in got.items():
                # What one process does not call, ranks call for their peers: nothing comes of it.
                right_one = gradients.get(name, torch.zeros_like(gradient))
                assert error(gradient, right_one) < within, (rank, step, name)
            assert all(name.startswith(idle) for name in got.keys() - gradients.keys())
    return results[0][1]


LLAVA = {
    "model.vision_tower": WIDE,
    "model.multi_modal_projector": WIDE,
    "model.language_model": TEXT,
    "lm_head": TEXT,
}


@pytest.mark.parametrize(("vision", "projector"), [("clip", WIDE), ("siglip", TEXT)])
def test_llava(vision: str, projector: Layout) -> None:
    layouts = {**LLAVA, "model.multi_modal_projector": projector}
    page = check_trained(llava(vision), layouts, [llava_batch(step) for step in range(STEPS)])
    assert page.count("\n+ %") == 1


def test_two_vision_encoders_of_different_layouts() -> None:
    layouts = {
        "near": WIDE,
        "far": Layout(tp=4, dp=2),
        "projector": TEXT,
        "language": TEXT,
        "head": TEXT,
    }
    page = check_trained(two_eyes(), layouts, [two_eyes_batch(step) for step in range(STEPS)])
    assert page.count("\n+ %") == 2


def test_two_vision_encoders_of_which_one_is_frozen() -> None:
    layouts = {"near": WIDE, "far": TEXT, "projector": TEXT, "language": TEXT, "head": TEXT}
    model = two_eyes()
    model.get_submodule("near").requires_grad_(False)
    check_trained(model, layouts, [two_eyes_batch(step) for step in range(STEPS)])


def test_qwen_vl_whose_images_are_rows_of_patches() -> None:
    layouts = {"model.visual": WIDE, "model.language_model": TEXT, "lm_head": TEXT}
    page = check_trained(
        qwen_vl(),
        layouts,
        [qwen_vl_batch(step) for step in range(STEPS)],
        batch_dims={"position_ids": 1, "pixel_values": Rows()},
    )
    assert "f64[8*16@dp,12]" in page and "i64[3,8@dp,12]" in page


AUDIO = {
    "model.audio_tower": WIDE,
    "model.multi_modal_projector": TEXT,
    "model.language_model": TEXT,
    "lm_head": TEXT,
}


def test_voxtral() -> None:
    check_trained(voxtral(), AUDIO, [voxtral_batch(step) for step in range(STEPS)])


def test_qwen_audio_branches_on_data() -> None:
    model, batch = qwen_audio(), qwen_audio_batch()
    assert loss_of(model(**batch)).isfinite()
    with pytest.raises(CaptureError) as info:
        colocc.compile(model, AUDIO, example_inputs=batch)
    assert "looks at the value of a tensor" in str(info.value)
    assert "modeling_qwen2_audio.py" in str(info.value) and "legacy_processing" in str(info.value)


def uneven(images: int) -> Batch:
    """Samples with no image, one and two; their placeholders fit."""
    batch = llava_batch()
    batch["input_ids"][:2] = batch["input_ids"][0]
    batch["input_ids"][0][batch["input_ids"][0] == PLACE] = 5
    batch["input_ids"][1, 8:] = PLACE
    batch["pixel_values"] = batch["pixel_values"].repeat(2, 1, 1, 1)[:images]
    return batch


@pytest.mark.parametrize(
    ("dims", "images", "problem"),
    [
        ({}, 8, "sample 0 has 0 places for embeddings and 4 embeddings"),
        ({}, 9, "pixel_values of microbatch 0 has 9 samples in dim 0, input_ids"),
        ({"pixel_values": Rows()}, 9, "has 9 rows for 8 samples: 9 % 8 = 1. Give every sample"),
        ({"pixel_values": Rows()}, 8, "sample 0 has 0 places for embeddings and 4 embeddings"),
    ],
)
def test_samples_with_different_numbers_of_images_are_refused_alike(
    dims: Any, images: int, problem: str
) -> None:
    model, language = llava(), Layout(tp=2)
    layouts = {name: Layout(dp=2) if "tower" in name else language for name in LLAVA}

    def main(rank: int) -> str:
        mine = copy.deepcopy(model)
        with colocc.compile(
            mine, layouts, example_inputs=llava_batch(), batch_dims=dims
        ) as program:
            try:
                program(**uneven(images))
            except (CaptureError, LayoutError) as error:
                return str(error)
        return "accepted"

    (text,) = set(run_threads(2, main, timeout=60))
    assert problem in text

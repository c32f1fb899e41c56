"""Covers passes/items.py and docs/models.md: recorded models whose samples have any number of
images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colocc import Items, Layout
from tests.hf import llava, qwen_vl, ragged_llava_batch, ragged_qwen_vl_batch
from tests.test_models import LLAVA, TEXT, WIDE, check_trained

TOWER = Items("model.vision_tower")
VISUAL = Items("model.visual")
# By step, the images of each sample.
STREAM = [[1, 0, 2, 0, 0, 1, 2, 1], [0] * 8, [0, 0, 0, 0, 2, 1, 0, 0]]


@pytest.mark.parametrize(("vision", "projector"), [("clip", WIDE), ("siglip", TEXT)])
def test_llava(vision: str, projector: Layout) -> None:
    page = check_trained(
        llava(vision),
        {**LLAVA, "model.multi_modal_projector": projector},
        [ragged_llava_batch(seed, images) for seed, images in enumerate(STREAM)],
        batch_dims={"pixel_values": TOWER},
        idle=("model.vision_tower", "model.multi_modal_projector"),
    )
    assert page.count("\n+ %") == 1


# By step, the grids of each sample's images, in patches.
GRIDS: list[list[list[tuple[int, int]]]] = [
    [[(2, 4)], [], [(4, 4), (2, 2)], [], [(6, 4)], [(2, 4), (2, 4), (4, 2)], [], [(4, 4)]],
    [[]] * 8,
    [[], [], [], [], [], [(4, 8)], [(2, 2)], []],
]


def tokens_of(inputs: Any) -> torch.Tensor:
    grid: torch.Tensor = inputs["image_grid_thw"]
    return grid.prod(-1) // 4


def test_qwen_vl_whose_images_differ_in_size() -> None:
    check_trained(
        qwen_vl(),
        {"model.visual": WIDE, "model.language_model": TEXT, "lm_head": TEXT},
        [ragged_qwen_vl_batch(seed, grids) for seed, grids in enumerate(GRIDS)],
        batch_dims={"position_ids": 1, "pixel_values": VISUAL, "image_grid_thw": VISUAL},
        rows={"model.visual": tokens_of},
        idle=("model.visual",),
    )

"""Batches of samples with 0, 1 or several images, and the oracle's values as each rank sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from colocc.layout import Layout
from colocc.sequence import cuts
from tests import mimo

TOKEN = mimo.VOCABULARY - 1


def batch(images: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """One global microbatch: sample i has ``images[i]`` images of mimo.ROWS rows each, whose
    placeholders stand anywhere; without any image there is no input."""
    generator = torch.Generator().manual_seed(seed)
    found = mimo.batch(len(images), seed=seed)
    dtype = torch.get_default_dtype()
    ids = torch.randint(0, TOKEN - 7, (len(images), mimo.LENGTH), generator=generator)
    for sample, count in enumerate(images):
        places = torch.randperm(mimo.LENGTH, generator=generator)[: count * mimo.ROWS]
        ids[sample, places] = TOKEN
    shape = (sum(images), mimo.ROWS, mimo.FEATURES)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    inputs = {"vit": {"x": x}} if sum(images) else None
    return {**found, "input_ids": ids, "modality_inputs": {"images": inputs}}


def part_of(whole: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """The part of the language module's input [s, b, h] that ``rank`` holds: its replica's samples,
    its positions."""
    at = {axis: int(layout.coordinates(axis)[rank]) for axis in ("tp", "cp", "dp")}
    chunks, parts = cuts(layout)
    size = len(whole) // chunks
    runs = parts[at["cp"] * layout.tp + at["tp"] if layout.sp else at["cp"]]
    mine = torch.cat([whole[start * size : stop * size] for start, stop in runs])
    return mine.chunk(layout.dp, dim=1)[at["dp"]]

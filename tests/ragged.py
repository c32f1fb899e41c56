"""Batches of samples with 0, 1 or several images for the model of mimo.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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

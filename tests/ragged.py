"""Batches of samples with 0, 1 or several images for the model of mimo.py, whole and in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from colocc import Wanted
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


TEXT = ("input_ids", "position_ids", "labels", "loss_mask")
IMAGES = "modality_inputs.images"


class Samples(torch.utils.data.Dataset[Any]):
    """The samples of some global microbatches, one after the other: what is wanted of each."""

    def __init__(self, batches: Sequence[dict[str, Any]]) -> None:
        self.texts = {name: torch.cat([batch[name] for batch in batches]) for name in TEXT}
        self.rows = (self.texts["input_ids"] == TOKEN).sum(dim=1)
        self.images: list[torch.Tensor] = []
        for batch in batches:
            counts = (batch["input_ids"] == TOKEN).sum(dim=1) // mimo.ROWS
            given = batch["modality_inputs"]["images"]
            x = given["vit"]["x"] if given else torch.zeros(0, mimo.ROWS, mimo.FEATURES)
            self.images += x.split(counts.tolist())

    def __getitem__(self, wanted: Wanted) -> tuple[int, dict[str, torch.Tensor]]:
        found = {n: self.texts[n][wanted.index] for n in TEXT if n in wanted.inputs}
        if IMAGES in wanted.inputs:
            found[IMAGES] = self.images[wanted.index]
        return wanted.microbatch, found


def collate(samples: list[tuple[int, dict[str, torch.Tensor]]]) -> list[dict[str, Any]]:
    """The microbatches of a step, from the parts of its samples."""
    step: list[dict[str, Any]] = []
    for index in range(max(microbatch for microbatch, _ in samples) + 1):
        mine = [found for microbatch, found in samples if microbatch == index]
        names = [name for name in TEXT if any(name in found for found in mine)]
        batch: dict[str, Any] = {
            name: torch.stack([found[name] for found in mine if name in found]) for name in names
        }
        images = [found[IMAGES] for found in mine if IMAGES in found and len(found[IMAGES])]
        inputs = {"vit": {"x": torch.cat(images)}} if images else None
        step.append(batch | {"modality_inputs": {"images": inputs}})
    return step

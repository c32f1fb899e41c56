"""A small model whose samples have any number of images, and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from colocc import Items, Layout

TOKEN, LENGTH = 9, 8
LAYOUTS = {"vision": Layout(dp=4), "language": Layout(tp=2, dp=2)}
DIMS = {"pixels": Items("vision")}
Merge = Callable[["Gallery", Tensor, Tensor, Tensor, Tensor], Tensor]


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(TOKEN + 1, 8), nn.Linear(8, 8)

    def forward(self, text: Tensor) -> Tensor:
        found: Tensor = self.out(text.cumsum(1))
        return found


def scatter(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return text.masked_scatter((ids == TOKEN).unsqueeze(-1), rows)


class Gallery(nn.Module):
    """An image makes two rows of 8, which ``merge`` puts at its placeholders."""

    def __init__(self, merge: Merge = scatter) -> None:
        super().__init__()
        self.vision, self.language, self.merge = nn.Linear(4, 16), Reader(), merge

    def forward(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        text = self.language.embed(ids)
        if pixels is not None:
            rows = self.vision(pixels).unflatten(1, (2, 8))
            text = self.merge(self, text, ids, pixels, rows)
        out: Tensor = self.language(text)
        return out


def ids_of(rows: Sequence[int]) -> Tensor:
    """Token ids with so many placeholders in each sample."""
    ids = torch.arange(len(rows) * LENGTH).reshape(len(rows), LENGTH) % TOKEN
    for sample, count in enumerate(rows):
        start = sample % (LENGTH - count + 1)
        ids[sample, start : start + count] = TOKEN
    return ids


def batch_of(images: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """A batch whose samples have so many images; without pixels where none has any."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(sum(images), 4, generator=generator, dtype=torch.float64)
    batch: dict[str, Any] = {"ids": ids_of([2 * count for count in images])}
    return batch | {"pixels": pixels} if sum(images) else batch


class Strips(Gallery):
    """An image is a strip of patches; each patch makes a row."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(4, 8)

    def forward(
        self, ids: Tensor, patches: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        text = self.language.embed(ids)
        if patches is not None:
            assert sizes is not None
            rows = torch.cat(torch.split(self.vision(patches), sizes.tolist()))
            text = scatter(self, text, ids, patches, rows)
        out: Tensor = self.language(text)
        return out


STRIP_DIMS = {"patches": Items("vision"), "sizes": Items("vision")}


def sizes_of(inputs: Any) -> Tensor:
    """The rows of each strip."""
    sizes: Tensor = inputs["sizes"]
    return sizes


def strips_of(sizes: Sequence[Sequence[int]], seed: int = 0) -> dict[str, Any]:
    """A batch whose samples have strips of so many patches."""
    flat = [size for strips in sizes for size in strips]
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(sum(flat), 4, generator=generator, dtype=torch.float64)
    batch: dict[str, Any] = {"ids": ids_of([sum(strips) for strips in sizes])}
    return batch | {"patches": patches, "sizes": torch.tensor(flat)} if flat else batch

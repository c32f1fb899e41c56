"""A plain module of two encoders, glue and a decoder; its batches; what all ranks refuse."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colocc import CaptureError, Layout, LayoutError
from tests.harness import run_threads

ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-pp-dp", "dp-tp"]
BATCH, LENGTH, HIDDEN = 16, 5, 8


class Model(nn.Module):
    """Two torch encoders, glue that picks between them, a torch decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Flatten(2), nn.Linear(16, HIDDEN), nn.GELU())
        self.audio = nn.Linear(4, HIDDEN)
        self.decoder = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3))

    def forward(self, images: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
        seen, heard = self.vision(images), self.audio(clips)
        out: Tensor = self.decoder(torch.where(mask.unsqueeze(-1), seen, heard))
        return out


MODULES = ("vision", "audio", "decoder")


def model() -> Model:
    """The same weights on every rank; threads share the global generator, so it stays out."""
    made, generator = Model().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 3)
    return made


def batch(seed: int = 0, size: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "images": random(size, LENGTH, 4, 4),
        "clips": random(size, LENGTH, 4),
        "mask": random(size, LENGTH) > 0,
    }


def layouts_of(order: str, *sizes: tuple[int, int]) -> dict[str, Layout]:
    return {
        name: Layout(tp=tp, dp=dp, order=order)
        for name, (tp, dp) in zip(MODULES, sizes, strict=True)
    }


LAYOUTS = layouts_of(ORDERS[0], (2, 4), (8, 1), (4, 2))


def replica(whole: Tensor, layout: Layout, rank: int) -> Tensor:
    return whole.chunk(layout.dp)[int(layout.coordinates("dp")[rank])]


def refused(world: int, work: Callable[[int], Any]) -> str:
    """The one error that all ranks raise; the ranks are still in step after it."""

    def main(rank: int) -> tuple[str, float]:
        try:
            work(rank)
        except (LayoutError, CaptureError) as error:
            text = f"{type(error).__name__}: {error}"
        else:
            text = "accepted"
        total = torch.ones(1)
        dist.all_reduce(total)
        return text, total.item()

    ((text, total),) = set(run_threads(world, main, timeout=20))
    assert total == world
    return text


def contains(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"

"""What the tests of the passes share: a wrapped message, and small models with their batches."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from colocc.layout import Layout
from colocc.passes import run
from colocc.passes.graph import Graph


def refusal(kind: type[Exception], call: Callable[[], object]) -> str:
    """What ``call`` is refused with, wrapped for a golden."""
    with pytest.raises(kind) as info:
        call()
    lines = str(info.value).splitlines()
    return "\n".join(textwrap.fill(line, 96, subsequent_indent="    ") for line in lines)


class Pair(nn.Module):
    """A vision encoder, a language model that reads it, and ``glue`` between them."""

    def __init__(self, glue: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.vision = nn.Linear(16, 8)
        self.language = nn.Linear(8, 8)
        self.glue = glue

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.vision(images)
        if self.glue is not None:
            x = self.glue(x, mask)
        out: torch.Tensor = self.language(x)
        return out


PAIR_BATCH = {"images": torch.zeros(8, 5, 16), "mask": torch.ones(8, 5, 1, dtype=torch.bool)}
PAIR_LAYOUTS = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=4, dp=2)}


class Trio(nn.Module):
    """Two encoders, glue that merges them, and a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(16, 8)
        self.audio = nn.Linear(4, 8)
        self.language = nn.Linear(8, 8)

    def forward(
        self, images: torch.Tensor, clips: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        seen = self.vision(images)
        heard = self.audio(clips)
        merged = torch.where(mask.unsqueeze(-1), seen, heard)
        out: torch.Tensor = self.language(merged)
        return out


TRIO_BATCH = {
    "images": torch.zeros(8, 5, 16),
    "clips": torch.zeros(8, 5, 4),
    "mask": torch.ones(8, 5, dtype=torch.bool),
}
TRIO_LAYOUTS = {
    "vision": Layout(tp=2, dp=4),
    "audio": Layout(tp=8, dp=1),
    "language": Layout(tp=2, pp=2, dp=2),
}


def graph_of(
    model: nn.Module, layouts: Mapping[str, Layout], batch: Mapping[str, Any] | None, **more: Any
) -> Graph:
    """The graph of all ranks, with gradients averaged by every module."""
    return run(model, layouts, reductions={}, example_inputs=batch, **more)


def pair_graph(glue: Callable[..., Any] | None = None) -> Graph:
    return graph_of(Pair(glue), PAIR_LAYOUTS, PAIR_BATCH)


def trio_graph(**layouts: Layout) -> Graph:
    return graph_of(Trio(), {**TRIO_LAYOUTS, **layouts}, TRIO_BATCH)

"""Covers passes/handed.py: an input that the caller does not hand on is handed on all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from colocc.layout import Layout
from colocc.passes.capture import capture
from colocc.passes.graph import Graph, Traits

LAYOUTS = {"vision": Layout(dp=2), "language": Layout(tp=2)}
TRAITS = Traits(handed={"language": ("mask",)})


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = self.weight(x)
        return out


class Model(nn.Module):
    """Takes a mask, and gives its language model none."""

    def __init__(self, own: float | None = None) -> None:
        super().__init__()
        self.vision, self.language, self.own = nn.Linear(4, 8), Language(), own

    def forward(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return self.language(self.vision(images), mask=self.own)


def mask_of(graph: Graph) -> Any:
    """What the language model reads as its mask."""
    (call,) = [node for node in graph.fx.nodes if graph.module_of(node) == "language"]
    return call.kwargs["mask"]


def inputs(graph: Graph) -> list[str]:
    return [node.meta["path"][0] for node in graph.placeholders()]


@pytest.mark.parametrize("example", [None, {"images": torch.zeros(4, 4), "mask": torch.ones(4)}])
def test_the_language_model_reads_the_mask(example: dict[str, torch.Tensor] | None) -> None:
    graph = capture(Model(), LAYOUTS, example_inputs=example, traits=TRAITS)
    assert mask_of(graph).meta["path"] == ("mask",)
    assert inputs(graph) == ["images", "mask"]


def test_without_the_trait_it_is_no_input() -> None:
    graph = capture(Model(), LAYOUTS)
    assert mask_of(graph) is None
    assert inputs(graph) == ["images"]


def test_an_example_without_it_has_none() -> None:
    example = {"images": torch.zeros(4, 4)}
    graph = capture(Model(), LAYOUTS, example_inputs=example, traits=TRAITS)
    assert mask_of(graph) is None
    assert inputs(graph) == ["images"]


def test_what_the_caller_gives_stays() -> None:
    graph = capture(Model(own=2.0), LAYOUTS, traits=TRAITS)
    assert mask_of(graph) == 2.0
    assert inputs(graph) == ["images"]

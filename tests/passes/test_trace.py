"""Covers passes/trace.py: a forward traced without an example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from colocc.errors import CaptureError
from colocc.passes.graph import Traits
from colocc.passes.trace import Input, explained, trace, tracer_of
from tests.passes.kit import Pair

TARGETS = {"vision": "vision", "language": "language"}


class Reads(Pair):
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        images.shape[0], mask.dim()
        found: Tensor = self.language(self.vision(images))
        return found


def inputs() -> dict[str, Input]:
    return {name: Input((name,)) for name in ("images", "mask")}


def test_reads_and_inputs_that_nothing_uses_are_dropped() -> None:
    graph = trace(Reads(), TARGETS, Traits(), inputs())
    assert [node.name for node in graph.nodes] == ["images", "vision", "language", "output"]
    vision = next(node for node in graph.nodes if node.name == "vision")
    assert vision.meta["line"].startswith("passes/test_trace.py:")
    assert vision.meta["kind"] == "Linear"


def test_only_inputs_become_placeholders() -> None:
    graph = trace(Pair(lambda x, mask: x * mask), TARGETS, Traits(), {**inputs(), "mask": 3.0})
    assert [n.meta["path"] for n in graph.nodes if n.op == "placeholder"] == [("images",)]


class Branches(Pair):
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        if mask.sum() > 0:
            images = images + 1
        found: Tensor = self.language(self.vision(images))
        return found


def test_a_branch_on_data_names_the_line_and_the_remedy() -> None:
    with pytest.raises(CaptureError) as info:
        trace(Branches(), TARGETS, Traits(), inputs())
    message = str(info.value)
    assert "looks at the value of a tensor" in message
    assert "passes/test_trace.py:" in message and "if mask.sum() > 0:" in message
    assert "@colocc.leaf" in message


def test_the_tracer_of_a_value_at_any_depth() -> None:
    tracer = fx.Tracer()
    tracer.graph = fx.Graph()
    proxy = tracer.create_proxy("placeholder", "x", (), {})
    assert tracer_of(({"a": [1, proxy]},), {}) is tracer
    assert tracer_of((1,), {"x": torch.zeros(1)}) is None


def test_what_is_said_of_the_users_own_error() -> None:
    text = str(explained(ValueError("no such mode"), nn.Linear(1, 1)))
    assert text.startswith("Linear.forward cannot be traced: ValueError: no such mode.")

"""Covers passes/nodes.py: which node makes each value that a forward holds, and what none makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from colocc.errors import CaptureError
from colocc.passes.nodes import HERE, Nodes
from colocc.passes.sizes import Sizes
from tests.passes.kit import PAIR_BATCH, PAIR_LAYOUTS, Pair, graph_of, pair_graph


class Made:
    """Nodes with one input x, [4, 6] in the example."""

    def __init__(self) -> None:
        self.model = nn.Linear(6, 2)
        self.sizes = Sizes(4, lambda expr, answer: None)
        self.mode = FakeTensorMode(shape_env=self.sizes.environment, allow_non_fake_inputs=True)
        self.nodes = Nodes(self.model, self.sizes, torch.device("cpu"))
        shape = self.sizes.shape(("x",), torch.zeros(4, 6, dtype=torch.int64), 0, rows=False)
        with self.mode:
            self.x = torch.empty(shape)
        self.nodes.placeholder(("x",), self.x, None)

    def made(self, value: Any) -> fx.Node:
        x = self.nodes.operand(self.x)
        return self.nodes.node("call_function", torch.neg, (x,), {}, value)


def test_constants_devices_and_sizes() -> None:
    made = Made()
    assert made.nodes.operand((1, "a", torch.float16, None)) == (1, "a", torch.float16, None)
    assert made.nodes.operand(torch.device("cpu")) is HERE
    assert made.nodes.operand(torch.device("meta")) == torch.device("meta")
    size = made.nodes.operand(made.x.shape[0] * 2)
    assert size.name == "size" and [n.name for n in size.args] == ["x"]
    assert made.nodes.operand(made.x.shape[0] * 2) is size
    assert size.target(torch.zeros(3, 6)) == 6


def test_parts_of_a_value_are_read_by_steps_once() -> None:
    made = Made()
    parts = {"a": [made.x + 1, made.x + 2], "b": (made.x + 3,)}
    whole = made.made(parts)
    first = made.nodes.operand(parts["a"][0])
    assert first.args[1] == 0 and first.args[0].args == (whole, "a")
    count = len(made.nodes.graph.nodes)
    assert made.nodes.operand(parts["a"][0]) is first
    assert len(made.nodes.graph.nodes) == count
    assert made.nodes.operand(parts["a"][1]).args[0] is first.args[0]


def test_a_parameter_is_read_by_its_path() -> None:
    made = Made()
    node = made.nodes.operand(made.model.weight)
    assert (node.op, node.target) == ("get_attr", "weight")
    assert made.nodes.operand(made.model.weight) is node


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_what_no_node_has_made_is_refused() -> None:
    made = Made()
    for value, problem in (
        (torch.zeros(2), "a tensor is read that is no input, parameter or buffer"),
        (Holder(torch.zeros(2)), "a Holder that holds tensors passes between modules"),
    ):
        with pytest.raises(CaptureError, match=problem) as info:
            made.nodes.operand({"deep": [value]})
        assert "passes/test_nodes.py:" in str(info.value)
        assert "@colocc.leaf" in str(info.value)


def test_what_shares_memory_with_a_change_is_stale() -> None:
    made = Made()
    first, view = made.x + 1, (made.x + 1)[:, 0]
    other = view.view(-1)
    for value in (first, view, other):
        made.made(value)
    made.nodes.outdate(view)
    made.nodes.operand(first)
    made.nodes.operand(view)
    with pytest.raises(CaptureError, match="shares memory with one that was changed in place at"):
        made.nodes.operand(other)


def outer(x: Tensor, mask: Tensor) -> Tensor:
    return x.flatten(1).sum(1)[:, None] * x.flatten(1).sum(1)[None]


def test_two_dims_that_grow_with_the_samples_are_refused() -> None:
    with pytest.raises(CaptureError) as info:
        pair_graph(outer)
    message = str(info.value)
    assert "the result is [8, 8] for 8 samples and [16, 16] for 16; one dim must grow" in message
    assert message.startswith("passes/test_nodes.py:")


def test_a_tensor_of_the_file_is_refused() -> None:
    table = torch.zeros(8)
    with pytest.raises(CaptureError, match="no input, parameter or buffer"):
        pair_graph(lambda x, mask: x + table)
    model = Pair()
    model.table = table
    model.glue = lambda x, mask: x + model.table
    graph = graph_of(model, PAIR_LAYOUTS, PAIR_BATCH)
    assert [n.target for n in graph.nodes if n.op == "get_attr"] == ["table"]

"""Covers passes/prune.py: glue that nothing reads goes, calls of the user's stay."""

import torch
from torch import fx

from colocc.passes.capture import leaf
from colocc.passes.prune import prune


@leaf
def told(x: torch.Tensor) -> torch.Tensor:
    return x


def test_only_opaque_calls_stay_unread() -> None:
    graph = fx.Graph()
    x, unread = graph.placeholder("x"), graph.placeholder("unread")
    graph.call_module("tower", (x,))
    graph.call_function(told, (x,))
    first = graph.call_function(torch.neg, (unread,))
    graph.call_function(torch.abs, (first,))
    graph.output(graph.call_function(torch.exp, (x,)))
    prune(graph)
    assert [node.name for node in graph.nodes] == ["x", "tower", "told", "exp", "output"]

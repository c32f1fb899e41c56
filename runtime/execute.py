"""Run the nodes of one phase, one after the other; a value is let go after its last reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from colocc.passes.graph import Graph, Method
from colocc.runtime.guards import check_modes
from colocc.runtime.lengths import Lengths, Sizes
from colocc.runtime.nodes import call, names_device

Settle = Callable[[Mapping[fx.Node, Any], Exception | None], None]


class Executor:
    """The nodes of one phase of a graph, bound to the user's model and the redistributions.

    Submodules are looked up at each call, so a module that was wrapped (by DDP, say) after the
    compile is called through its wrapper. ``calls`` are what runs a node of that name instead of
    the node's own target; ``methods`` stand in for those of the model; redistributions run
    ``noted``. ``settle`` is called once, before the first redistribution, with the values so far
    and the error that making them raised, if any, which it raises: what comes before is this
    rank's own work, what comes after its peers wait for.
    """

    def __init__(
        self,
        graph: Graph,
        phase: str,
        model: nn.Module,
        redistributions: Mapping[str, Callable[..., Any]],
        results: list[fx.Node],
        *,
        calls: Mapping[str, Callable[..., Any]] | None = None,
        methods: Mapping[str, Callable[..., Any]] | None = None,
        noted: Callable[[str], AbstractContextManager[None]] | None = None,
        settle: Settle | None = None,
    ) -> None:
        self.model, self.redistributions, self.calls = model, redistributions, calls or {}
        self.guards = graph.guards
        self.methods = methods or {}
        self.noted = noted or (lambda kind: nullcontext())
        self.nodes = [
            n
            for n in graph.fx.nodes
            if n.meta["phase"] == phase and n.op not in ("placeholder", "output")
        ]
        self.settle = settle
        self.own = len(self.nodes)
        if settle is not None:
            self.nodes, self.own = _own_first(self.nodes, redistributions)
        self.runs = {
            node: partial(_without_grad, self._runs(node))
            if node.meta.get("no_grad")
            else self._runs(node)
            for node in self.nodes
        }
        self.lengths = Lengths(graph)
        self.results = results
        self.samples: int | None = None
        self.sizes: Sizes = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        self.lets_go: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source not in results:
                self.lets_go.setdefault(node, []).append(source)

    def __call__(
        self, values: dict[fx.Node, Any], *, samples: int | None = None, sizes: Sizes | None = None
    ) -> list[Any]:
        """Return the values of ``results``; ``values`` holds the inputs, and is used up.

        ``samples`` is the number of samples that all ranks together run, ``sizes`` are those of
        their inputs.
        Raises: CaptureError if a module is in another mode (train, eval) than the graph holds for;
        LayoutError if one makes another part of a sequence than its layout says.
        """
        self.samples, self.sizes = samples, sizes or {}
        check_modes(self.guards, self.model)
        if self.settle is None:
            self._run_all(self.nodes, values)
        else:
            try:
                self._run_all(self.nodes[: self.own], values)
            except Exception as error:
                self.settle(values, error)
                raise
            self.settle(values, None)
            self._run_all(self.nodes[self.own :], values)
        return [values[node] for node in self.results]

    def _run_all(self, nodes: list[fx.Node], values: dict[fx.Node, Any]) -> None:
        for node in nodes:
            values[node] = self._run(node, values)
            for spent in self.lets_go.get(node, ()):
                del values[spent]

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        value = self.runs[node](values)
        if node in self.lengths:
            self.lengths.check(node, value, self.sizes)
        return value

    def _runs(self, node: fx.Node) -> Callable[[Mapping[fx.Node, Any]], Any]:
        """What makes the value of ``node`` from those that it reads."""
        if node.name in self.redistributions:
            return partial(self._redistributed, node)
        instead = self.calls.get(node.name)
        if isinstance(node.target, Method):
            instead = self.methods.get(node.target.name)
        if instead is None:
            return partial(call, node, model=self.model, here=names_device(node))
        return partial(_called, instead, node)

    def _redistributed(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        (source,) = node.all_input_nodes
        with self.noted("redistribute"):
            if node.name in self.calls:
                return self.calls[node.name](values[source])
            return self.redistributions[node.name](values[source], samples=self.samples)


def _called(instead: Callable[..., Any], node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return instead(*args, **kwargs)


def _without_grad(
    run: Callable[[Mapping[fx.Node, Any]], Any], values: Mapping[fx.Node, Any]
) -> Any:
    with torch.no_grad():
        return run(values)


def _own_first(
    nodes: list[fx.Node], redistributions: Mapping[str, Any]
) -> tuple[list[fx.Node], int]:
    """The nodes with those first that read no redistribution, and how many these are."""
    moved: set[fx.Node] = set()
    for node in nodes:
        if node.name in redistributions or any(n in moved for n in node.all_input_nodes):
            moved.add(node)
    own = [node for node in nodes if node not in moved]
    return own + [node for node in nodes if node in moved], len(own)

"""Trace a forward with torch.fx, where there is no example: nothing is known of any value.

That is enough for a model whose modules feed one another through glue that is known beforehand
(``Traits``), such as Megatron's MimoModel. torch.fx traces through a custom
``autograd.Function`` and so loses its backward: that is an error here.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError, LayoutError
from colocc.passes.graph import COMPUTING, Method, Traits
from colocc.passes.handed import hand_on
from colocc.passes.source import line_in, line_of
from colocc.passes.watch import watched


class Input:
    """A placeholder to be, with its place in the batch."""

    def __init__(self, path: tuple[str, ...]) -> None:
        self.path = path


def trace(
    model: nn.Module, targets: Mapping[str, str], traits: Traits, inputs: Mapping[str, Any]
) -> fx.Graph:
    """Return the graph of ``model.forward``; an Input among ``inputs`` becomes a placeholder.

    Raises: CaptureError with the user's line and the remedy.
    """
    tracer = _Tracer(targets, inputs)
    with watched(model, targets, traits, tracer):
        try:
            graph = tracer.trace(model)
        except (CaptureError, LayoutError):
            raise
        except Exception as error:  # whatever the user's forward does with a traced value
            raise explained(error, model) from error
    names = {path: name for name, path in targets.items()}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in names:
            node._rename(re.sub(r"\W", "_", names[str(node.target)]))
        node.meta["line"] = line_in(node.stack_trace)
        if node.op == "call_module":
            node.meta["kind"] = type(model.get_submodule(str(node.target))).__name__
    hand_on(graph, targets, traits.handed)
    _drop_unused_reads(graph)
    return graph


class _Tracer(fx.Tracer):
    def __init__(self, targets: Mapping[str, str], inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.targets, self.inputs = targets, inputs
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.targets.values():
            return True
        # A module of torch's own without parameters (GELU, Dropout) is one glue operation.
        return bool(super().is_leaf_module(m, module_qualified_name))

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        made = super().create_node(kind, *args, **kwargs)
        if kind in COMPUTING and not torch.is_grad_enabled():
            made.meta["no_grad"] = True
        return made

    def sees(self, args: Any, kwargs: Any) -> bool:
        return tracer_of(args, kwargs) is self

    def call(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self.call_module(module, run, args, kwargs)

    def method(self, method: Method, label: str, arguments: dict[str, Any]) -> Any:
        return self.create_proxy("call_function", method, (), arguments, name=label)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        def make(value: Any) -> Any:
            if isinstance(value, Input):
                proxy = self.create_proxy("placeholder", "_".join(value.path), (), {})
                proxy.node.meta["path"] = value.path
                return proxy
            if isinstance(value, dict):
                return {key: make(item) for key, item in value.items()}
            return value

        arguments = {name: make(value) for name, value in self.inputs.items()}
        return functools.partial(_call_root, root_fn, arguments), [self.root]


def _call_root(root_fn: Any, arguments: dict[str, Any], root: Any) -> Any:
    return root_fn(root, **arguments)


def tracer_of(args: Any, kwargs: Any) -> fx.Tracer | None:
    """The torch.fx tracer of the first traced value among the arguments."""
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, fx.Proxy):
            tracer = value.tracer
            assert isinstance(tracer, fx.Tracer)
            return tracer
    return None


def explained(error: Exception, model: nn.Module) -> CaptureError:
    """What to tell the user of an error that the forward raised while it was traced."""
    if isinstance(error, fx.proxy.TraceError):
        problem = "its control flow or arithmetic looks at the value of a tensor"
    else:
        problem = f"{type(error).__name__}: {error}"
    return CaptureError(
        f"{type(model).__name__}.forward cannot be traced: {problem}.\n  {line_of(error)}\n"
        "  Move that code into a function marked @colocc.leaf (it must treat every sample on its "
        "own), or into a module that the layouts name."
    )


def _drop_unused_reads(graph: fx.Graph) -> None:
    """Erase reads of attributes, sizes and items that nothing uses; nothing else is ever
    dropped."""
    reads = {getattr, operator.getitem, len}
    for node in reversed(graph.nodes):
        unused = not node.users
        if unused and node.op == "call_function" and node.target in reads:
            graph.erase_node(node)
        elif unused and node.op == "placeholder":
            # What the forward takes and never reads is no input: a batch that has it is refused.
            graph.erase_node(node)
        elif unused and node.op == "call_method" and node.target in {"size", "dim"}:
            graph.erase_node(node)

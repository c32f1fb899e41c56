"""What one node of a graph does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from colocc.passes.graph import Method
from colocc.passes.nodes import Here
from colocc.passes.shapes import attribute
from colocc.passes.structure import tensors_in


def call(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    model: nn.Module | None = None,
    *,
    here: bool = True,
) -> Any:
    """The value of ``node`` from those that it reads. Glue made of inputs needs no ``model``.

    ``here`` is false of a node that ``names_device`` says no of.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if here:
        args, kwargs = _placed(args, kwargs, model)
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if isinstance(target, Method):
        return getattr(model, target.name)(*args, **kwargs)
    if node.op == "call_function":
        return target(*args, **kwargs)
    assert model is not None, f"{node.name} is a part of the model"
    found = attribute(model, target)
    return found if node.op == "get_attr" else found(*args, **kwargs)


def names_device(node: fx.Node) -> bool:
    """Whether an argument of ``node`` is the device of the rank."""
    found: list[Here] = []

    def look(value: Any) -> Any:
        if isinstance(value, Here):
            found.append(value)
        return value

    fx.node.map_aggregate((node.args, node.kwargs), look)
    return bool(found)


def _placed(args: Any, kwargs: Any, model: nn.Module | None) -> Any:
    """The arguments with this rank's device in place of the example's: that of the first tensor
    among them, else the model's."""
    found: list[torch.device] = []

    def place(value: Any) -> Any:
        if not isinstance(value, Here):
            return value
        if not found:
            tensors = [*tensors_in((args, kwargs)), *(model.parameters() if model else ())]
            found.append(tensors[0].device if tensors else torch.get_default_device())
        return found[0]

    return fx.node.map_aggregate((args, kwargs), place)

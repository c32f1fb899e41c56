"""The type of every value: from the shapes that the recording left, or open.

The dim that grows with the batch holds the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Graph
from colocc.passes.rows import BatchDims, dim_of, has_rows, items_of
from colocc.types import DTYPES, UNKNOWN, Dim, Type

TORCH_DTYPES = {short: getattr(torch, name) for name, short in DTYPES.items()}


def short_dtype(dtype: torch.dtype) -> str:
    """``bf16`` of torch.bfloat16."""
    return DTYPES.get(str(dtype).removeprefix("torch."), UNKNOWN)


def is_shape(value: Any) -> bool:
    """Whether a rule's answer is (dtype, shape)."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def batch_size_of(example_inputs: Mapping[str, Any], batch_dims: BatchDims) -> int:
    """The number of samples in ``example_inputs``. Raises: LayoutError if its tensors disagree."""
    sizes: dict[str, int] = {}
    for path, value in tensors_of(example_inputs):
        dim = dim_of(batch_dims, path[0])
        if has_rows(batch_dims, path[0]) or items_of(batch_dims, path[0]) is not None:
            continue
        if dim is not None and value.dim() > dim:
            sizes[".".join(path)] = value.shape[dim]
    if not sizes:
        raise LayoutError("example_inputs holds no tensor with a batch dim")
    first = next(iter(sizes))
    for name, size in sizes.items():
        if size != sizes[first]:
            raise LayoutError(
                f"the batch has {sizes[first]} samples in {first} and {size} in {name}. Give every "
                f"input the same number, or say which dim holds them: batch_dims={{{name!r}: 1}}"
            )
    return sizes[first]


def tensors_of(
    value: Any, path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """All tensors in nested mappings, with their paths."""
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    if isinstance(value, Mapping):
        return [found for key in value for found in tensors_of(value[key], (*path, str(key)))]
    return []


def infer_types(graph: Graph) -> None:
    """Set ``types`` of every node: one for a tensor, a tuple for several, None for none."""
    for node in graph.fx.nodes:
        module = node.meta["module"]
        layout = graph.layouts[module]
        shapes = node.meta.get("shapes")
        if shapes is None:
            node.meta["types"] = open_type(module, layout)
        elif isinstance(shapes, tuple):
            node.meta["types"] = _type_of(shapes, module, layout)
        else:
            node.meta["types"] = tuple(_type_of(shape, module, layout) for shape in shapes) or None


def _type_of(shape: tuple[str, tuple[Dim, ...], int | None], module: str, layout: Layout) -> Type:
    dtype, dims, batch = shape
    return Type(dtype, dims, module, layout, batch)


def open_type(module: str, layout: Layout) -> Type:
    """The type of a value of which only the batch is known."""
    return Type(UNKNOWN, (Dim(0, 1, ("dp",)),), module, layout, batch=0, open=True)


def attribute(model: nn.Module, path: str) -> Any:
    """The attribute of ``model`` at a dotted path, through wrappers such as DDP."""
    value: Any = model
    for part in path.split("."):
        while not hasattr(value, part) and isinstance(getattr(value, "module", None), nn.Module):
            value = value.module
        value = getattr(value, part)
    return value


def lookup(batch: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value at ``path`` in nested mappings, None where a step of the path is missing."""
    value: Any = batch
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value

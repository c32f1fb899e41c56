"""Run a model's forward on the fake tensors of an example, recording it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError, LayoutError
from colocc.passes.graph import Graph, Traits
from colocc.passes.guards import LengthGuard, ValueGuard
from colocc.passes.handed import hand_on
from colocc.passes.items import one_item_each
from colocc.passes.prune import prune
from colocc.passes.record import DATA, LOOKS, Recorder, recording
from colocc.passes.rows import (
    BatchDims,
    RowsPerItem,
    dim_of,
    has_rows,
    items_of,
    rows_per_sample,
)
from colocc.passes.shapes import batch_size_of, short_dtype
from colocc.passes.sizes import Number, Origin, Sizes, dims_of
from colocc.passes.source import line_of
from colocc.passes.structure import is_constant, tensors_in
from colocc.passes.trace import explained
from colocc.passes.watch import checks_of_data, every_call, reads_of_training, unchanged, watched


def recorded(
    graph: Graph,
    model: nn.Module,
    traits: Traits,
    example_inputs: Mapping[str, Any],
    batch_dims: BatchDims,
    rows: Mapping[str, RowsPerItem],
) -> None:
    """Fill ``graph`` with the nodes of ``model.forward``, its guards and notes.

    ``shapes`` is set on every node that makes tensors. Raises: CaptureError, LayoutError.
    """
    by_sample = {name: value for name, value in example_inputs.items() if name != traits.packing}
    graph.batch_size = batch_size_of(by_sample, batch_dims)
    example_inputs, graph.items = one_item_each(example_inputs, batch_dims, rows, graph.batch_size)
    recorder = Recorder(model, graph.targets, graph.batch_size, _device_of(model))
    recorder.rules = _rules(graph, traits)
    with contextlib.ExitStack() as stack:
        for context in (
            unchanged(model),
            watched(model, graph.targets, traits, recorder),
            every_call(recorder),
            reads_of_training(recorder.looked_at_training),
            checks_of_data(recorder.left_out),
            # Composite operations written in C++ would fix symbolic sizes.
            enable_python_dispatcher(),
            recorder.mode,
            recording(recorder),
        ):
            stack.enter_context(context)
        with recorder.inside():
            arguments = _arguments(recorder, model, traits, example_inputs, batch_dims)
        try:
            with recorder:
                result = model.forward(**arguments)
            with recorder.inside():
                recorder.finish(result)
        except (CaptureError, LayoutError):
            raise
        except DATA as error:
            raise recorder.refused(LOOKS, line_of(error)) from error
        except Exception as error:  # whatever the user's forward does
            raise explained(error, model) from error
    for node in recorder.graph.nodes:
        value = node.meta.pop("value", None)
        if not node.meta.get("open"):
            node.meta["shapes"] = _shapes(recorder.sizes, node, value)
        if isinstance(value, torch.Tensor):
            node.meta["sizes"] = tuple(recorder.sizes.expr(length) for length in value.shape)
        if any(tensor.requires_grad for tensor in tensors_in(value)):
            node.meta["learns"] = True
        found = {recorder.sizes.items_in(tensor.shape) for tensor in tensors_in(value)} - {None}
        if found:
            node.meta["items"] = found.pop()
    graph.fx = recorder.graph
    hand_on(graph.fx, graph.targets, traits.handed)
    prune(graph.fx)
    _check_numbers(graph, recorder)
    graph.guards = recorder.guards
    graph.notes += recorder.notes


def _check_numbers(graph: Graph, recorder: Recorder) -> None:
    """Raise CaptureError for a size that is computed from the number of items where these make
    different numbers of rows: the example's are all alike."""
    for node in graph.fx.nodes:
        if not isinstance(node.target, Number):
            continue
        for name, symbol in recorder.sizes.items.items():
            if graph.items[name].stated and symbol in node.target.expr.free_symbols:
                raise recorder.refused(
                    f"a size is computed from the number of items of {name}, which make different "
                    "numbers of rows",
                    f"at {node.meta['line']}",
                )


def _device_of(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def _rules(graph: Graph, traits: Traits) -> dict[Any, Callable[..., Any]]:
    """Where types are known beforehand: by submodule path, and by name of a glue method."""
    rules: dict[Any, Callable[..., Any]] = {}
    for name, rule in traits.outputs.items():
        if name in graph.targets:
            layout = graph.layouts[name]
            rules[graph.targets[name]] = lambda kwargs, rule=rule, layout=layout: rule(
                kwargs, layout
            )
    for glue in traits.glue:
        layout = graph.layouts[glue.module]
        if glue.returns is not None:
            rules[glue.method] = lambda kwargs, rule=glue.returns, layout=layout: rule(
                kwargs, layout
            )
    return rules


def _arguments(
    recorder: Recorder,
    model: nn.Module,
    traits: Traits,
    example_inputs: Mapping[str, Any],
    batch_dims: BatchDims,
) -> dict[str, Any]:
    """The forward's arguments, fake, each tensor of them a placeholder."""
    arguments: dict[str, Any] = {}

    def make(path: tuple[str, ...], value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            made = _fake(recorder, path, value, batch_dims)
            recorder.placeholder(path, made, value)
            dtype = str(value.dtype).removeprefix("torch.")
            recorder.guards.values.append(ValueGuard(path, "dtype", dtype))
            recorder.guards.lengths.append(_lengths(recorder.sizes, path, made))
            return made
        if isinstance(value, Mapping):
            return {key: make((*path, str(key)), item) for key, item in value.items()}
        if not is_constant(value):
            raise CaptureError(_not_an_input(".".join(path), value))
        recorder.guards.values.append(ValueGuard(path, "value", value))
        return value

    parameters = inspect.signature(model.forward).parameters
    for name in dict.fromkeys([*parameters, *example_inputs]):
        value, parameter = example_inputs.get(name), parameters.get(name)
        if name in traits.nested and isinstance(value, Mapping):
            arguments[name] = {
                module: _whole(recorder, (name, module), value[module], batch_dims)
                for module in traits.nested[name]
                if value.get(module) is not None
            }
        elif value is not None and name == traits.packing:
            arguments[name] = recorder.unknown((name,), required=False)
        elif value is not None:
            arguments[name] = make((name,), value)
        elif parameter is not None and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            needed = parameter.default is parameter.empty
            if needed or name in traits.inputs:
                arguments[name] = recorder.unknown((name,), required=name not in traits.inputs)
    return arguments


def _lengths(sizes: Sizes, path: tuple[str, ...], value: torch.Tensor) -> LengthGuard:
    """What a recording takes for granted of the lengths of an input."""

    def granted(dim: int, length: Any) -> sympy.Expr | None:
        expr = sizes.expr(length)
        own = sizes.origins.get(expr) == Origin(path, dim)
        return None if own or sizes.growing(expr) else expr

    return LengthGuard(path, tuple(granted(*found) for found in enumerate(value.shape)))


def _not_an_input(name: str, value: Any) -> str:
    """What to say of a value that can be neither an input nor a guard."""
    kind = type(value).__name__
    if next(tensors_in(value), None) is not None:
        remedy = "holds tensors. Give them as one tensor, or in a dict that names each"
    else:
        remedy = (
            "cannot be compared with that of another batch. Give a tensor, a dict of tensors, or "
            "plain numbers and strings; what never changes belongs into the model"
        )
    return f"example_inputs: {name} is a {kind}, which {remedy}."


def _whole(recorder: Recorder, path: tuple[str, ...], value: Any, batch_dims: BatchDims) -> Any:
    """A nested input that is one placeholder."""
    made = pytree.tree_map(
        lambda leaf: (
            _fake(recorder, path, leaf, batch_dims) if isinstance(leaf, torch.Tensor) else leaf
        ),
        value,
    )
    recorder.placeholder(path, made, None)
    return made


def _fake(
    recorder: Recorder, path: tuple[str, ...], value: torch.Tensor, batch_dims: BatchDims
) -> torch.Tensor:
    dim, rows = dim_of(batch_dims, path[0]), has_rows(batch_dims, path[0])
    items = items_of(batch_dims, path[0])
    if items is not None:
        count = recorder.sizes.hints[recorder.sizes.batch]
        shape = recorder.sizes.shape_of_items(path, value, items, count)
        return torch.empty(shape, dtype=value.dtype, device=recorder.device)
    if dim is not None and value.dim() <= dim:
        dim = None
    if dim is not None and rows:
        rows_per_sample(
            ".".join(path), value.shape[dim], recorder.sizes.hints[recorder.sizes.batch]
        )
    shape = recorder.sizes.shape(path, value, dim, rows=rows and dim is not None)
    return torch.empty(shape, dtype=value.dtype, device=recorder.device)


def _shapes(sizes: Sizes, node: fx.Node, value: Any) -> Any:
    """(dtype, dims, batch dim) of the tensor that a node makes, or a list of several."""
    found = []
    for tensor in tensors_in(value):
        dims = dims_of(sizes, tensor.shape)
        assert dims is not None, f"{node.name} was recorded with two batch dims"
        found.append((short_dtype(tensor.dtype), *dims))
    return found[0] if isinstance(value, torch.Tensor) else found

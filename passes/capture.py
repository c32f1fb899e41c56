"""Turn the user's forward into a graph: one call per module of the layouts, glue between them.

Algorithm:
1. Bind the forward's arguments: what the batch gives becomes a placeholder (one per tensor of the
   example, or one per module where the model is known), anything else keeps its value.
2. With an example, record the forward as it runs on fake tensors (record.py); without one, trace it
   with torch.fx (trace.py). A module that the layouts name is one call, also when the model calls
   its ``.forward()``, and so is a part of it that the model calls by itself; a method that looks at
   values, and a function marked ``colocc.leaf``, is one call.
3. Drop what nothing uses: reads, and glue that only fed checks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import fx, nn

from colocc.errors import CaptureError, LayoutError
from colocc.layout import Layout
from colocc.passes.example import recorded
from colocc.passes.graph import Graph, Method, Traits
from colocc.passes.record import active
from colocc.passes.rows import BatchDims, RowsPerItem
from colocc.passes.shared import check_tied
from colocc.passes.trace import Input, trace, tracer_of
from colocc.passes.watch import TRACING

__all__ = ["TRACING", "Method", "capture", "check_covered", "find_targets", "leaf"]


@overload
def leaf[F: Callable[..., Any]](fn: F) -> F: ...
@overload
def leaf[F: Callable[..., Any]](
    fn: None = None, *, shapes: Callable[..., Any]
) -> Callable[[F], F]: ...
def leaf(fn: Any = None, *, shapes: Callable[..., Any] | None = None) -> Any:
    """``fn`` as one opaque call of the captured graph, for glue that looks at values.

    It must treat every sample on its own: row i of its result may depend on row i of its arguments
    alone. ``shapes`` takes the same arguments and returns tensors of the shapes and dtypes that
    ``fn`` returns, without looking at values; it is needed where ``fn`` cannot run without them.
    """
    if fn is None:
        return functools.partial(leaf, shapes=shapes)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        recorder = active()
        if recorder is not None and recorder.sees(args, kwargs):
            return recorder.opaque(
                "call_function", wrapper, shapes or fn, args, kwargs, fn.__name__
            )
        tracer = tracer_of(args, kwargs)
        if tracer is None:
            return fn(*args, **kwargs)
        return tracer.create_proxy("call_function", wrapper, args, kwargs, name=fn.__name__)

    wrapper.colocc_leaf = True  # type: ignore[attr-defined]
    return wrapper


def capture(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    *,
    example_inputs: Mapping[str, Any] | None = None,
    traits: Traits | None = None,
    batch_dims: BatchDims | None = None,
    rows: Mapping[str, RowsPerItem] | None = None,
) -> Graph:
    """Return the graph of ``model.forward``.

    Raises: LayoutError for a module in ``layouts`` that the model lacks, or parameters that no
    layout covers, or several; CaptureError, with the user's line and the remedy, for a forward that
    cannot be traced.
    """
    traits = traits or Traits()
    targets = find_targets(model, layouts, traits)
    check_covered(model, targets)
    check_tied(model, dict(layouts), targets)
    graph = Graph(fx.Graph(), type(model).__name__, dict(layouts), targets)
    # Whoever compiles may be inside no_grad: only what the forward does itself is its own.
    with TRACING, torch.inference_mode(False), torch.enable_grad():
        if example_inputs is None:
            graph.fx = trace(model, targets, traits, _inputs(model, traits))
        else:
            _check_known(model, example_inputs)
            recorded(graph, model, traits, example_inputs, batch_dims or {}, rows or {})
    return graph


def find_targets(model: nn.Module, layouts: Mapping[str, Layout], traits: Traits) -> dict[str, str]:
    """The submodule path of each name in ``layouts``: a path itself, or a name the traits know."""
    paths = {path for path, _ in model.named_modules() if path}
    targets = {}
    for name in layouts:
        path = traits.targets.get(name, name)
        if path not in paths:
            known = ", ".join([*traits.targets, *sorted(p for p in paths if "." not in p)])
            raise LayoutError(
                f"layouts names {name!r}, but {type(model).__name__} has no such module. "
                f"Use a submodule path or one of: {known}"
            )
        targets[name] = path
    for name, path in targets.items():
        inside = [
            n for n, p in targets.items() if p.startswith(path + ".") or (p == path and n != name)
        ]
        if inside:
            raise LayoutError(
                f"layouts names both {name!r} ({path}) and {inside[0]!r} ({targets[inside[0]]}), "
                "which is part of it. Give each parameter one layout."
            )
    return targets


def check_covered(model: nn.Module, targets: Mapping[str, str]) -> None:
    """Raise LayoutError if a parameter stands outside every module of the layouts."""
    covered = tuple(path + "." for path in targets.values())
    for name, parameter in model.named_parameters():
        if not name.startswith(covered):
            owner = name.rpartition(".")[0] or type(model).__name__
            raise LayoutError(
                f"no layout covers the parameter {name} {list(parameter.shape)}: layouts names "
                f"{', '.join(f'{n} ({p})' for n, p in targets.items())}. "
                f"Add a layout for {owner!r}, or move it into one of these modules."
            )


def _inputs(model: nn.Module, traits: Traits) -> dict[str, Any]:
    """The forward's arguments: Input where a value comes from the batch, else the default."""
    bound: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        if name in traits.nested:
            bound[name] = {module: Input((name, module)) for module in traits.nested[name]}
        elif required or name in traits.inputs or name in traits.rare:
            bound[name] = Input((name,))
        else:
            bound[name] = parameter.default
    return bound


def _check_known(model: nn.Module, example_inputs: Mapping[str, Any]) -> None:
    """Raise CaptureError for an example that the forward does not take, or that lacks an input."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in sorted(set(example_inputs) - set(parameters)):
        raise CaptureError(
            f"example_inputs has {name!r}, which {type(model).__name__}.forward does not "
            f"take; it takes {', '.join(parameters)}"
        )

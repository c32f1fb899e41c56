"""The type of every value, found by running the graph on fake tensors at two batch sizes.

The dim that grows with the batch holds the samples. Nothing is computed and no module is changed: a
module of a known kind answers by rule (``Traits``), any other runs under FakeTensorMode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError, LayoutError
from colocc.layout import Layout
from colocc.passes.capture import Method
from colocc.passes.graph import Graph, Traits
from colocc.types import DTYPES, UNKNOWN, Dim, Type

TORCH_DTYPES = {short: getattr(torch, name) for name, short in DTYPES.items()}
_SCALES = (1, 2)


def batch_size_of(example_inputs: Mapping[str, Any], batch_dims: Mapping[str, int]) -> int:
    """The number of samples in ``example_inputs``. Raises: LayoutError if its tensors disagree."""
    sizes: dict[str, int] = {}
    for path, value in tensors_of(example_inputs):
        dim = batch_dims.get(path[0], 0)
        if value.dim() > dim:
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


def infer_types(
    graph: Graph,
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    traits: Traits,
    batch_dims: Mapping[str, int],
) -> None:
    """Set ``types`` of every node; ``host`` marks a number that changes with the batch."""
    if example_inputs is None:
        for node in graph.fx.nodes:
            module = node.meta["module"]
            node.meta["types"] = open_type(module, graph.layouts[module])
        return
    graph.batch_size = batch_size_of(example_inputs, batch_dims)
    # The same example is tried at its own batch size and at twice that.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        worlds = [_World(graph, model, traits, mode, scale) for scale in _SCALES]
        for world in worlds:
            world.bind(example_inputs, batch_dims)
        for node in graph.fx.nodes:
            module = node.meta["module"]
            layout = graph.layouts[module]
            known = all(world.run(node) for world in worlds)
            if not known:
                node.meta["types"] = open_type(module, layout)
                continue
            small, large = (world.values[node] for world in worlds)
            node.meta["types"] = _types_of(graph, node, small, large, module, layout)
            node.meta["host"] = _is_batch_number(small, large)


def open_type(module: str, layout: Layout) -> Type:
    """The type of a value of which only the batch is known."""
    return Type(UNKNOWN, (Dim(0, 1, ("dp",)),), module, layout, batch=0, open=True)


class _World:
    """One run of the graph on fake tensors, at ``scale`` times the example's batch."""

    def __init__(
        self, graph: Graph, model: nn.Module, traits: Traits, mode: FakeTensorMode, scale: int
    ) -> None:
        self.graph, self.model, self.traits, self.mode = graph, model, traits, mode
        self.scale = scale
        self.values: dict[fx.Node, Any] = {}
        self.inputs: dict[tuple[str, ...], Any] = {}

    def bind(self, example_inputs: Mapping[str, Any], batch_dims: Mapping[str, int]) -> None:
        def fake(value: Any, dim: int) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            shape = list(value.shape)
            if value.dim() > dim:
                shape[dim] *= self.scale
            return torch.empty(shape, dtype=value.dtype)

        for node in self.graph.placeholders():
            path = node.meta["path"]
            value = lookup(example_inputs, path)
            dim = batch_dims.get(path[0], 0)
            self.inputs[path] = pytree.tree_map(lambda leaf, dim=dim: fake(leaf, dim), value)

    def run(self, node: fx.Node) -> bool:
        """Compute the value of ``node``; false where it cannot be known without running for
        real."""
        if node.op == "placeholder":
            self.values[node] = self.inputs[node.meta["path"]]
            return True
        if any(source not in self.values for source in node.all_input_nodes):
            return False
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        name = self.graph.module_of(node)
        rule: Any = None
        if name is not None:
            rule = self.traits.outputs.get(name)
        elif isinstance(node.target, Method):
            method = node.target.name
            rule = next((g.returns for g in self.traits.glue if g.method == method), None)
        if rule is not None or isinstance(node.target, Method):
            return rule is not None and self._by_rule(node, rule, kwargs)
        self.values[node] = self._call(node, args, kwargs)
        return True

    def _by_rule(self, node: fx.Node, rule: Any, kwargs: Any) -> bool:
        layout = self.graph.layouts[node.meta["module"]]
        answer = rule(kwargs, layout)
        if answer is None:
            return False
        self.values[node] = pytree.tree_map(
            lambda x: torch.empty(x[1], dtype=TORCH_DTYPES[x[0]]) if _is_shape(x) else x,
            answer,
            is_leaf=_is_shape,
        )
        return True

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "get_attr":
                return attribute(self.model, str(node.target))
            if node.op == "call_module":
                with torch.no_grad():
                    return _unwrapped(self.model.get_submodule(str(node.target)))(*args, **kwargs)
            return args[0]
        except Exception as error:  # whatever the user's module does with the example's shapes
            raise CaptureError(
                f"{node.meta['line'] or node.name}: {type(error).__name__}: {error}\n"
                f"  seen while finding shapes for a batch of {self.scale}x the example's size"
            ) from error


def _is_shape(value: Any) -> bool:
    """Whether a rule's answer is (dtype, shape)."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _unwrapped(module: nn.Module) -> nn.Module:
    """``module`` without its data parallel wrapper, whose forward prepares a reduction."""
    while isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return module


def attribute(model: nn.Module, path: str) -> Any:
    """The attribute of ``model`` at a dotted path."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def lookup(batch: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value at ``path`` in nested mappings, None where a step of the path is missing."""
    value: Any = batch
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _types_of(
    graph: Graph, node: fx.Node, small: Any, large: Any, module: str, layout: Layout
) -> Any:
    assert graph.batch_size is not None
    batch = graph.batch_size

    def type_of(a: Any, b: Any) -> Type | None:
        if not isinstance(a, torch.Tensor):
            return None
        found = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(found) > 1 or any(b.shape[i] != 2 * a.shape[i] or a.shape[i] % batch for i in found):
            raise CaptureError(
                f"{node.meta['line'] or node.name}: the result is {list(a.shape)} for {batch} "
                f"samples and {list(b.shape)} for {2 * batch}; one dim must grow with the samples. "
                "Keep samples apart, or move the code into a module that the layouts name."
            )
        dims = [Dim(1, size) for size in a.shape]
        for i in found:
            dims[i] = Dim(batch, a.shape[i] // batch, ("dp",))
        dtype = DTYPES.get(str(a.dtype).removeprefix("torch."), UNKNOWN)
        return Type(dtype, tuple(dims), module, layout, found[0] if found else None)

    flat, spec = pytree.tree_flatten(small)
    other, _ = pytree.tree_flatten(large)
    return pytree.tree_unflatten([type_of(a, b) for a, b in zip(flat, other, strict=True)], spec)


def _is_batch_number(small: Any, large: Any) -> bool:
    """Whether a value holds a number of this process that changes with the batch."""
    pairs = zip(pytree.tree_leaves(small), pytree.tree_leaves(large), strict=True)
    return any(isinstance(a, int) and a != b for a, b in pairs)

"""Local parts: batches that hold, of each input, only the samples that this rank reads.

Which these are is ``program.samples``; within a microbatch they stand in ascending order. Whole on
every rank is ``input_ids`` where its placeholders say how many rows each sample has, since each
rank must know where the rows of others go. What a pipeline stage does not read may be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.passes.graph import Graph
from colocc.passes.rows import BatchDims, dim_of, has_rows, rows_per_sample
from colocc.passes.shapes import lookup, tensors_of
from colocc.passes.solve.slots import slots_of
from colocc.runtime.fields import is_shared
from colocc.runtime.rows import Ids

Run = tuple[int, int, int]
"""Neighbouring samples of one microbatch: (microbatch, start, stop)."""


def check_local(graph: Graph, schedule: str, check: str) -> None:
    """Raise LayoutError where a rank must see more of a batch than its own samples."""
    if check == "first":
        raise LayoutError(
            "check='first' compares the first batch alone, and what is wrong with local parts one "
            "rank alone may see: all would wait for it. Write check='every' or batches='global'."
        )
    reason = None
    if schedule == "filled":
        reason = "schedule 'filled' chooses who encodes what by the sizes of a step's batches"
    elif graph.guards is not None and graph.guards.scatters:
        guard = graph.guards.scatters[0]
        reason = f"the guard of {guard.name} ({guard.line}) counts the places of all samples"
    else:
        reason = _items_of_others(graph)
    for node in graph.fx.nodes:
        plan = node.meta.get("rows")
        if plan is not None and "row" in plan.dims:
            src = plan.src
            reason = (
                f"{src.module} ({src.layout}) cuts the rows of each item over tp, so that every "
                "rank must know the items of all samples"
            )
    if reason is not None:
        raise LayoutError(f"{reason}: local parts do not tell it. Write batches='global'.")


def _items_of_others(graph: Graph) -> str | None:
    """Why the items of a recorded model's local parts would not do; None if they would."""
    sink = (graph.sink, graph.layouts[graph.sink])
    for name, places in graph.rows.items():
        if places.token is not None:
            continue
        layouts = {n: graph.layouts[n] for n, p in graph.rows.items() if p.items == places.items}
        slots = {n: slots_of(layout, sink[1]) for n, layout in layouts.items()}
        other = next((n for n in slots if slots[n] != slots[name]), None)
        if other is not None:
            return (
                f"{name} ({layouts[name]}) and {other} ({layouts[other]}) encode the same inputs "
                "for different samples"
            )
        reads = [n for n in graph.placeholders() if n.meta.get("items") == places.items]
        late = next((node for node in reads if node.meta["module"] == graph.sink), None)
        if late is not None:
            return f"{graph.sink} reads {late.name}, of other samples than {name} encodes"
        deep = next((path for path in sorted(places.read) if len(path) > 1), None)
        if deep is not None:
            return f"{'.'.join(deep)} tells where rows belong, and is inside another input"
        crossing = [n.meta["entries"].size for n in graph.fx.nodes if "entries" in n.meta]
        if any(size.free_symbols for size in [places.each, *crossing] if size is not None):
            return f"how many rows an item of {name} makes depends on the sizes of the inputs"
    return None


def whole_inputs(graph: Graph) -> set[tuple[str, ...]]:
    """The inputs that every rank has whole: they tell where all rows belong."""
    return {path for places in graph.rows.values() for path in places.read}


def size_of_step(
    graph: Graph, microbatches: Sequence[Mapping[str, Any]], batch_dims: BatchDims
) -> int:
    """The samples of one global microbatch, from this rank's parts.

    Raises: LayoutError if no input tells it.
    """
    for index, batch in enumerate(microbatches):
        if not isinstance(batch, Mapping):
            raise LayoutError(f"microbatch {index} is a {type(batch).__name__}: give a dict")
        if graph.packing and batch.get(graph.packing) is not None:
            raise LayoutError(
                f"microbatch {index} has {graph.packing}: the borders of packed sequences are of "
                "all samples, which batches='local' does not tell. Write batches='global'."
            )
    if graph.rows:
        path = min(path for path in whole_inputs(graph) if dim_of(batch_dims, path[0]) == 0)
        ids = [lookup(batch, path) for batch in microbatches]
        sizes = [len(i) if isinstance(i, torch.Tensor) and i.dim() == 2 else None for i in ids]
        if None in sizes or len(set(sizes)) > 1:
            name = ".".join(path)
            raise LayoutError(
                f"the microbatches have {sizes} samples in {name}: give the {name} of all "
                "samples of each on every rank, [samples, tokens], equally many in each"
            )
        return int(sizes[0] or 0)
    # The samples of one microbatch lie in the sink's replicas, those of one step in an encoder's
    # slots.
    nodes = sorted(graph.placeholders(), key=lambda node: node.meta["module"] != graph.sink)
    for node in nodes:
        name, module = node.meta["path"][0], node.meta["module"]
        dim = dim_of(batch_dims, name)
        if dim is None or has_rows(batch_dims, name):
            continue
        if module != graph.sink and len(microbatches) > 1:
            continue
        for _, tensor in tensors_of(lookup(microbatches[0], node.meta["path"])):
            if tensor.dim() > dim:
                return tensor.shape[dim] * graph.layouts[module].dp
    raise LayoutError("no input of this rank has a batch dim: nothing says how many samples it has")


class Parts:
    """Where a rank's samples lie in its parts of a step's microbatches, each of ``size``."""

    def __init__(self, graph: Graph, size: int, runs: Mapping[str, list[Run]]) -> None:
        """``runs`` are the samples that the rank reads, by module; those of modules that make rows
        follow from the placeholders, and are not among them."""
        self.graph, self.size, self.runs = graph, size, runs

    def held(self, module: str, microbatch: int) -> Ids:
        """The samples of one microbatch, ascending, that the inputs of ``module`` hold."""
        runs = [(a, b) for index, a, b in self.runs[module] if index == microbatch]
        return np.sort(np.concatenate([np.arange(*run) for run in runs] or [np.arange(0)]))

    def place(
        self, path: tuple[str, ...], module: str, microbatch: int, start: int, stop: int
    ) -> tuple[int, int, int]:
        """Where the samples ``start`` to ``stop`` lie in the input at ``path``, and how many
        samples it has."""
        if path in whole_inputs(self.graph):
            return start, stop, self.size
        held = self.held(module, microbatch)
        first, last = np.searchsorted(held, [start, stop]).tolist()
        return first, last, len(held)

    def check(
        self, mine: Graph, microbatches: Sequence[Mapping[str, Any]], batch_dims: BatchDims
    ) -> None:
        """Raise LayoutError for an input of this rank that is missing, or holds other samples."""
        whole = whole_inputs(self.graph)
        said = f"{self.size}" + " (input_ids holds so many)" * bool(whole)
        for node in mine.placeholders():
            path, module = node.meta["path"], node.meta["module"]
            dim = dim_of(batch_dims, path[0])
            if module not in self.runs or path in whole or dim is None:
                continue
            for index, batch in enumerate(microbatches):
                held = self.held(module, index)
                for name, tensor in tensors_of(lookup(batch, path), path):
                    shared = path[0] in self.graph.masks and is_shared(tensor)
                    if tensor.dim() > dim and not shared:
                        what = f"{'.'.join(name)} of microbatch {index}"
                        several = has_rows(batch_dims, path[0])
                        _check_count(what, tensor.shape[dim], held, several, said)

    def as_whole(
        self, batch: Mapping[str, Any], microbatch: int, batch_dims: BatchDims
    ) -> dict[str, Any]:
        """``batch`` as shapes alone, of all samples: what guards on sizes are asked about."""
        found: dict[str, Any] = dict(batch)
        for node in self.graph.placeholders():
            path, module = node.meta["path"], node.meta["module"]
            dim, several = dim_of(batch_dims, path[0]), has_rows(batch_dims, path[0])
            if dim is None or module not in self.runs or path in whole_inputs(self.graph):
                continue
            grown = _grower(dim, len(self.held(module, microbatch)), self.size, several)
            _put(found, path, pytree.tree_map(grown, lookup(batch, path)))
        return found


def _put(batch: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the value at ``path``; the mappings on the way become new ones."""
    *way, last = path
    for key in way:
        inner = batch.get(key)
        batch[key] = dict(inner) if isinstance(inner, Mapping) else {}
        batch = batch[key]
    batch[last] = value


def _grower(dim: int, held: int, size: int, several: bool) -> Callable[[Any], Any]:
    def grown(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() <= dim or not held:
            return value
        shape = list(value.shape)
        shape[dim] = shape[dim] // held * size if several else size
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return grown


def _check_count(what: str, count: int, held: Ids, several: bool, said: str) -> None:
    if several and len(held):
        rows_per_sample(what, count, len(held))
    elif count != len(held):
        shown = ", ".join(map(str, held[:8].tolist())) + (", ..." if len(held) > 8 else "")
        raise LayoutError(
            f"{what} has {count} samples, this rank reads {len(held)} of {said}"
            f"{': ' + shown if shown else ''}. With batches='local' an input holds these alone, "
            "in this order (program.samples)."
        )


def in_order(values: Sequence[Ids], replicas: int) -> Ids:
    """Values of each microbatch's samples, in the reader's order: by replica, then microbatch.

    Shapes: [microbatches] of [samples] to [microbatches * samples].
    """
    return np.stack([np.reshape(found, (replicas, -1)) for found in values], axis=1).ravel()


def by_microbatch(values: Ids, replicas: int, microbatches: int) -> list[Ids]:
    """The inverse of ``in_order``."""
    cube = values.reshape(replicas, microbatches, -1)
    return [cube[:, index].ravel() for index in range(microbatches)]

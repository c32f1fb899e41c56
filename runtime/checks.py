"""Whether the microbatches of a step hold what the graph reads, in sizes that layouts can cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any

import torch

from colocc.errors import LayoutError
from colocc.passes.graph import Graph
from colocc.passes.rows import BatchDims, dim_of, has_rows, items_of, rows_per_sample
from colocc.passes.shapes import lookup, tensors_of
from colocc.runtime.fields import check_kinds, is_shared
from colocc.runtime.guards import check_guards
from colocc.sequence import axes_of, check_length


def check_batches(
    graph: Graph,
    microbatches: Sequence[Mapping[str, Any]],
    batch_dims: BatchDims,
    optional: frozenset[str],
) -> int:
    """The samples of one global microbatch.

    Raises: LayoutError for a missing, unknown or odd input.
    """
    sizes: dict[int, tuple[str, int]] = {}
    check_inputs(graph, microbatches, optional)
    paths = {node.meta["path"] for node in graph.placeholders()}
    for index, batch in enumerate(microbatches):
        for name, value in batch.items():
            if items_of(batch_dims, str(name)) is not None:
                continue
            items = [module for module in graph.rows if (name, module) in paths]
            if items and isinstance(value, Mapping):
                value = {key: part for key, part in value.items() if key not in items}
            if name != graph.packing and not has_rows(batch_dims, str(name)):
                if name in graph.masks and is_shared(value):
                    continue
                _check_size(index, name, value, dim_of(batch_dims, str(name)), sizes)
    check_kinds(graph, microbatches)
    first = next(iter(sizes.values()), None)
    if first is None:
        raise LayoutError("the batch holds no tensor")
    for index, batch in enumerate(microbatches):
        _check_rows(index, batch, batch_dims, first[1])
        check_guards(graph, batch, first[1], f"microbatch {index}")
    return first[1]


def check_inputs(
    graph: Graph,
    microbatches: Sequence[Mapping[str, Any]],
    optional: frozenset[str],
    whole: Graph | None = None,
) -> None:
    """Raise LayoutError for a microbatch that lacks an input of ``graph``, or has one that the
    ``whole`` graph, if it is another one, does not read."""
    whole = whole or graph
    paths = {node.meta["path"] for node in graph.placeholders()}
    known = {node.meta["path"] for node in whole.placeholders()}
    items = {name for places in whole.items.values() for name in places.names or ()}
    stated = {(n,) for p in whole.items.values() if p.stated for n in p.names or ()}
    constants = {guard.path for guard in whole.guards.values} if whole.guards is not None else set()
    for index, batch in enumerate(microbatches):
        if not isinstance(batch, Mapping):
            raise LayoutError(
                f"microbatch {index} is a {type(batch).__name__}: give a dict of the arguments of "
                f"{graph.name}.forward"
            )
        for path in sorted(paths):
            if lookup(batch, path) is None and path[0] not in optional | items:
                have = ", ".join(map(str, batch))
                raise LayoutError(
                    f"microbatch {index} lacks the input {'.'.join(path)}, which "
                    f"{graph.name}.forward reads; it has {have}"
                )
        _check_known(graph, index, batch, known | constants | stated)


def _check_rows(index: int, batch: Mapping[str, Any], batch_dims: BatchDims, samples: int) -> None:
    """Raise LayoutError for an input of several rows per sample whose rows do not divide."""
    for name, value in batch.items():
        dim = dim_of(batch_dims, name)
        if dim is not None and has_rows(batch_dims, name) and isinstance(value, torch.Tensor):
            rows_per_sample(f"{name} of microbatch {index}", value.shape[dim], samples)


def _check_known(
    graph: Graph, index: int, batch: Mapping[str, Any], paths: set[tuple[str, ...]]
) -> None:
    """Raise LayoutError for a part of the batch that no placeholder reads, at any depth."""
    todo: list[tuple[tuple[str, ...], Any]] = [((str(key),), batch[key]) for key in batch]
    while todo:
        path, value = todo.pop(0)
        reads = any(path[: len(known)] == known for known in paths)
        holds = any(known[: len(path)] == path for known in paths)
        if value is None or reads:
            continue
        if holds and isinstance(value, Mapping):
            todo += [((*path, str(key)), value[key]) for key in value]
            continue
        known = ", ".join(".".join(path) for path in sorted(paths))
        raise LayoutError(
            f"microbatch {index} has {'.'.join(path)!r}, which {graph.name}.forward does not read; "
            f"it reads {known}. Leave it out, so that nothing is dropped unseen; if it is read "
            "where it is given, give compile() example_inputs that has it."
        )


def _check_size(
    index: int, name: str, value: Any, dim: int | None, sizes: dict[int, tuple[str, int]]
) -> None:
    for path, tensor in tensors_of(value, (name,)):
        if dim is None or tensor.dim() <= dim:
            continue
        here = (f"{'.'.join(path)} of microbatch {index}", tensor.shape[dim])
        first = sizes.setdefault(0, here)
        if first[1] != here[1]:
            raise LayoutError(
                f"{here[0]} has {here[1]} samples in dim {dim}, {first[0]} has {first[1]}: all "
                "inputs of all microbatches hold the same number of samples. If another dim "
                f"holds them, give compile() batch_dims={{{name!r}: ...}}; if dim {dim} holds "
                "items, of which samples have any number, colocc.Items(module)"
            )


def check_divides(graph: Graph, microbatches: int, size: int) -> None:
    """Raise LayoutError unless a step of ``microbatches`` times ``size`` samples can be cut into
    the sink's replicas, and into equal parts of each encoder but those that make rows."""
    sink = graph.layouts[graph.sink]
    if size % sink.dp:
        raise LayoutError(
            f"a global microbatch has {size} samples, {graph.sink} ({sink}) has {sink.dp} dp "
            f"replicas: {size} % {sink.dp} = {size % sink.dp}. Give it a multiple of {sink.dp} "
            "samples."
        )
    for name, layout in graph.layouts.items():
        if name in graph.rows:
            continue
        units = lcm(layout.dp, sink.dp)
        total, replica = microbatches * size, units // sink.dp
        if (total // sink.dp) % replica:
            share = total // sink.dp
            raise LayoutError(
                f"a step of {microbatches} microbatches of {size} = {total} samples gives each of "
                f"the {sink.dp} replicas of {graph.sink} {share}, which {name} ({layout}) must cut "
                f"into {replica} equal parts: {share} % {replica} = {share % replica}. "
                f"Make the step a multiple of {units} samples."
            )


def check_sequences(graph: Graph, microbatches: Sequence[Mapping[str, Any]]) -> None:
    """Raise LayoutError unless every input's sequence can be cut by each module that reads it,
    and so the one in which rows have their place."""
    for node in graph.placeholders():
        path = node.meta["path"]
        dim = graph.sequence_dims.get(path[0])
        for index, batch in enumerate(microbatches if dim is not None else ()):
            for name, tensor in tensors_of(lookup(batch, path), path):
                if dim is not None and tensor.dim() > dim:
                    what = f"{'.'.join(name)} of microbatch {index}"
                    check_length(what, tensor.shape[dim], graph.layouts[node.meta["module"]])
    sink = graph.layouts[graph.sink]
    places = any(place.token is not None for place in graph.rows.values())
    for index, batch in enumerate(microbatches if places and axes_of(sink) else ()):
        what = f"input_ids of microbatch {index}, read by {graph.sink} ({sink}),"
        check_length(what, batch["input_ids"].shape[1], sink)

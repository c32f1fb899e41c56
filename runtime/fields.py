"""The fields of a batch: what each may be, before anything is cut from it.

Only tensors are cut by sample. A list or an array in a batch would reach every rank whole, or
nowhere, so it is refused; a plain value beside the tensors of an encoder's input (an option of it)
is handed on as it is, and must be the same in all microbatches of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from colocc.errors import LayoutError
from colocc.passes.graph import Graph
from colocc.passes.shapes import lookup

PLAIN = (bool, int, float, str, torch.dtype, torch.device)


def plain(batch: Any) -> Any:
    """``batch`` with every mapping in it a dict: what a loader or a processor of Hugging Face
    returns may be a mapping of its own kind."""
    if not isinstance(batch, Mapping):
        return batch
    return {key: plain(value) for key, value in batch.items()}


def check_kinds(graph: Graph, microbatches: Sequence[Mapping[str, Any]]) -> None:
    """Raise LayoutError for a field that is neither a tensor nor a plain value, or a plain value
    that is not the same in all microbatches."""
    placeholders = {node.meta["path"]: node.meta["module"] for node in graph.placeholders()}
    for path, module in sorted(placeholders.items()):
        if path == (graph.packing,):
            continue
        nested = module in graph.rows or path[1:]
        options = PLAIN if graph.guards is None and nested else ()
        kept: dict[tuple[str, ...], Any] = {}
        for index, batch in enumerate(microbatches):
            for where, value in _leaves(lookup(batch, path), path):
                if isinstance(value, torch.Tensor):
                    _check_data(index, where, value)
                    continue
                if value is None:
                    continue
                if not isinstance(value, options):
                    raise LayoutError(_no_tensor(index, where, value))
                if kept.setdefault(where, value) != value:
                    raise LayoutError(
                        f"{'.'.join(where)} is {kept[where]!r} in one microbatch and {value!r} in "
                        f"microbatch {index}: what is no tensor is one for the whole step. Give a "
                        "tensor with an entry for each sample or item."
                    )


def _check_data(index: int, path: tuple[str, ...], value: torch.Tensor) -> None:
    """Raise LayoutError for a tensor that has no data, which an index would read as anything, or
    that is not dense."""
    what = f"{'.'.join(path)} of microbatch {index}"
    if value.is_meta:
        raise LayoutError(f"{what} is on the meta device: it has no data. Give a tensor that has.")
    if value.layout is not torch.strided:
        kind = str(value.layout).removeprefix("torch.")
        raise LayoutError(
            f"{what} is {kind}: only a dense tensor is cut by sample. Give its .to_dense()."
        )


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*path, str(key)))
    else:
        yield path, value


def _no_tensor(index: int, path: tuple[str, ...], value: Any) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    what = f"{'.'.join(path)} of microbatch {index} is a {name}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return (
            f"{what} of {len(value)} tensors: only a tensor is cut by sample. Join them in dim 0, "
            "and pad them or say the rows of each with compile(rows=) where their sizes differ."
        )
    return f"{what}: only a tensor is cut by sample. Give one, such as torch.as_tensor(...)."


def holds_items(graph: Graph, node: fx.Node) -> bool:
    """Whether an input holds items, of which a sample has any number."""
    places = graph.rows.get(node.meta["module"])
    return "items" in node.meta or (places is not None and places.token is not None)


# What torch looks up in a table, or indexes with.
INDICES = (torch.int32, torch.int64)
BY_TOKEN = ("labels", "loss_mask", "position_ids")


def check_by_token(graph: Graph, microbatches: Sequence[Mapping[str, Any]]) -> None:
    """Raise LayoutError for a field with an entry for each token that has another number of them
    than input_ids, labels that are no integers, or a field that only some microbatches have.

    One stage of the pipeline alone reads each: what it raised would leave the others waiting.
    """
    tokens = any(places.token is not None for places in graph.rows.values())
    for name in BY_TOKEN if tokens else ():
        given = [batch.get(name) is not None for batch in microbatches]
        if any(given) and not all(given):
            raise LayoutError(
                f"microbatch {given.index(False)} has no {name}, others of the step have: give it "
                "to all of them, or to none"
            )
        for index, batch in enumerate(microbatches if all(given) else ()):
            value, length = batch[name], batch["input_ids"].shape[1]
            dims = (2, 3) if name == "position_ids" else (2,)
            whole = name == "labels" or (name == "position_ids" and value.dim() == 2)
            odd = whole and value.dtype not in INDICES
            if value.dim() not in dims or value.shape[-1] != length or odd:
                kind = str(value.dtype).removeprefix("torch.")
                raise LayoutError(
                    f"{name} of microbatch {index} is {kind} {list(value.shape)}: give "
                    f"{'int64 or int32 ' * whole}[samples, {length}], as input_ids has {length} "
                    "tokens"
                )


def is_shared(value: Any) -> bool:
    """Whether a mask is one for all samples: [1, 1, s, s]."""
    return isinstance(value, torch.Tensor) and value.shape[:1] == (1,)


def check_masks(graph: Graph, microbatches: Sequence[Mapping[str, Any]]) -> None:
    """Raise LayoutError for a mask that is not [samples or 1, heads or 1, tokens or 1, tokens], or
    one where the language module cannot read it."""
    layout = graph.layouts[graph.sink]
    for index, batch in enumerate(microbatches):
        for name in sorted(graph.masks):
            if (mask := batch.get(name)) is None:
                continue
            what = f"{name} of microbatch {index}"
            if layout.cp > 1:
                raise LayoutError(
                    f"{what}: {graph.sink} ({layout}) cuts the sequence over cp{layout.cp}, a mask "
                    "is of the whole one. Write cp=1, or leave the mask out where the attention "
                    "is causal."
                )
            if batch.get(graph.packing) is not None:
                raise LayoutError(
                    f"{what}: the batch has {graph.packing}, too, whose borders are the mask of "
                    "packed sequences. Leave one of them out."
                )
            tokens = batch["input_ids"].shape[1]
            good = isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[3] == tokens
            if not good or mask.shape[2] not in (1, tokens) or mask.dtype != torch.bool:
                found = type(mask).__name__
                if isinstance(mask, torch.Tensor):
                    found = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
                raise LayoutError(
                    f"{what} is {found}: give bool [samples or 1, heads or 1, {tokens} or 1, "
                    f"{tokens}], True where a position must not be seen"
                )


def check_tokens(graph: Graph, microbatches: Sequence[Mapping[str, Any]]) -> None:
    """Raise LayoutError unless input_ids, in which the placeholders of rows stand, is [b, s], and
    not empty."""
    tokens = any(places.token is not None for places in graph.rows.values())
    for index, batch in enumerate(microbatches if tokens else ()):
        ids = batch.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in INDICES:
            found = (
                f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
                if isinstance(ids, torch.Tensor)
                else f"a {type(ids).__name__}"
            )
            raise LayoutError(
                f"input_ids of microbatch {index} is {found}: give a tensor of int64 or int32 "
                "[samples, tokens]"
            )
        if not ids.numel():
            raise LayoutError(
                f"input_ids of microbatch {index} is {list(ids.shape)}: give at least one sample "
                "of one token"
            )

"""Look for NaN and inf in what a rank reads of a step's batches, and say where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import fx

from colocc.errors import LayoutError
from colocc.passes.rows import dim_of
from colocc.passes.shapes import tensors_of
from colocc.runtime.data import Batches
from colocc.runtime.fields import holds_items

Sample = Callable[[int, int], int]
"""The sample of entry i of n entries of a tensor."""


def check_finite(batches: Batches, placeholders: Sequence[fx.Node]) -> None:
    """Raise LayoutError for the first input with a NaN or inf among the samples of this rank.

    Waits for the device once.
    """
    found = [
        (name, index, tensor, dim, sample_of)
        for node in placeholders
        for name, index, tensor, dim, sample_of in _read(batches, node)
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not found:
        return
    fine = [torch.isfinite(tensor).all() for _, _, tensor, _, _ in found]
    if bool(torch.stack(fine).all()):
        return
    for (name, index, tensor, dim, sample_of), good in zip(found, fine, strict=True):
        if not good:
            raise LayoutError(_where(name, index, tensor, dim, sample_of))


def _where(
    name: str, index: int, tensor: torch.Tensor, dim: int | None, sample_of: Sample | None
) -> str:
    bad = ~torch.isfinite(tensor)
    nans = int(torch.isnan(tensor).sum())
    what = f"{nans} NaN and {int(bad.sum()) - nans} inf"
    text = f"{name} of microbatch {index} has {what}"
    if dim is not None and sample_of is not None:
        entry = int(bad.movedim(dim, 0).flatten(1).any(dim=1).nonzero()[0])
        text += f", the first in sample {sample_of(entry, tensor.shape[dim])}"
    return f"{text}. Skip this batch, or mend what makes it."


Read = tuple[str, int, torch.Tensor, int | None, Sample | None]


def _read(batches: Batches, node: fx.Node) -> Iterator[Read]:
    """What this rank reads of an input: its name, microbatch, tensor, the dim of the samples (None
    where all share it) and whose each entry is."""
    path, module = node.meta["path"], node.meta["module"]
    if holds_items(batches.graph, node):
        # Of items that the reader reads by itself, their encoder sees all.
        if module == batches.graph.sink:
            return
        for index, first, last, value in batches.ragged.held(module, *batches.units(module), path):
            ends = np.cumsum(batches.ragged.items_per_sample(module, index))
            of = _item_owner(batches.ragged.rows_per_item(module, index)[first:last], ends, first)
            for name, tensor in tensors_of(value, path):
                yield ".".join(name), index, tensor, 0 if tensor.dim() else None, of
        return
    dim = dim_of(batches.batch_dims, path[0])
    for index, start, stop in batches.runs(node):
        for name, tensor in tensors_of(batches.cut(node, index, start, stop), path):
            shared = dim is None or tensor.dim() <= dim
            yield ".".join(name), index, tensor, None if shared else dim, _owner(start, stop)


def _owner(start: int, stop: int) -> Sample:
    return lambda entry, entries: start + entry * (stop - start) // entries


def _item_owner(rows: np.ndarray, ends: np.ndarray, first: int) -> Sample:
    """Entries are one for each item, or equally many for each row."""

    def sample(entry: int, entries: int) -> int:
        item = entry
        if entries != len(rows):
            item = int(np.searchsorted(np.cumsum(rows), entry * rows.sum() // entries, "right"))
        return int(np.searchsorted(ends, first + item, side="right"))

    return sample

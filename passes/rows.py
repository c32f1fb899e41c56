"""Which dim of an input holds its samples, and how many rows of it each sample has.

An input may hold items instead (images, clips), any number of them for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from colocc.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Rows:
    """The batch dim of an input whose samples have several rows each, joined in their order.

    ``Rows()`` says that dim 0 holds the rows of all samples, equally many of each: the patches of
    all images, where every sample has one image of one size.
    """

    dim: int = 0


@dataclass(frozen=True, slots=True)
class Items:
    """Instead of a batch dim: dim 0 of the input holds items, and a sample has any number of them.

    ``module`` is the name in the layouts of the module that encodes the items; all inputs that name
    it hold the same ones. An item has one entry in dim 0, or, where ``compile(rows=)`` says how
    many rows the items of ``module`` make, equally many for each row.
    """

    module: str


BatchDim = int | Rows | Items | None
"""The dim that holds one row per sample, Rows, Items, or None for an input that all samples
share."""
BatchDims = Mapping[str, BatchDim]
RowsPerItem = Callable[[Any], torch.Tensor | Sequence[int]]
"""From one microbatch's inputs of a module to the rows that each of its items makes."""


def dim_of(batch_dims: BatchDims, name: str) -> int | None:
    """The dim of the input ``name`` that holds samples, or items; 0 where nothing is said."""
    found = batch_dims.get(name, 0)
    if isinstance(found, Items):
        return 0
    return found.dim if isinstance(found, Rows) else found


def items_of(batch_dims: BatchDims, name: str) -> str | None:
    """The module whose items the input ``name`` holds; None where it holds samples."""
    found = batch_dims.get(name, 0)
    return found.module if isinstance(found, Items) else None


def has_rows(batch_dims: BatchDims, name: str) -> bool:
    """Whether the samples of the input ``name`` have several rows each."""
    return isinstance(batch_dims.get(name, 0), Rows)


def rows_per_sample(name: str, length: int, samples: int) -> int:
    """The rows of each of ``samples`` in ``length``. Raises: LayoutError if that is no integer."""
    if length % samples:
        raise LayoutError(
            f"{name} has {length} rows for {samples} samples: {length} % {samples} = "
            f"{length % samples}. Give every sample the same number of rows, or say that they hold "
            "items of which samples have any number: colocc.Items(module)."
        )
    return length // samples

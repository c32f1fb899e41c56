"""Which dim of an input holds its samples, and how many rows of it each sample has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from colocc.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Rows:
    """The batch dim of an input whose samples have several rows each, joined in their order.

    ``Rows()`` says that dim 0 holds the rows of all samples, equally many of each: the patches of
    all images, where every sample has one image of one size.
    """

    dim: int = 0


BatchDim = int | Rows | None
"""The dim that holds one row per sample, Rows, or None for an input that all samples share."""
BatchDims = Mapping[str, BatchDim]


def dim_of(batch_dims: BatchDims, name: str) -> int | None:
    """The dim of the input ``name`` that holds samples; 0 where nothing is said."""
    found = batch_dims.get(name, 0)
    return found.dim if isinstance(found, Rows) else found


def has_rows(batch_dims: BatchDims, name: str) -> bool:
    """Whether the samples of the input ``name`` have several rows each."""
    return isinstance(batch_dims.get(name, 0), Rows)


def rows_per_sample(name: str, length: int, samples: int) -> int:
    """The rows of each of ``samples`` in ``length``. Raises: LayoutError if that is no integer."""
    if length % samples:
        raise LayoutError(
            f"{name} has {length} rows for {samples} samples: {length} % {samples} = "
            f"{length % samples}. Give every sample the same number of rows."
        )
    return length // samples

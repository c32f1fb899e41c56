"""Rows: what encoders return when samples have different numbers of them, and how they move.

A row belongs to a sample and to the position of its placeholder in the reader's sequence. Both are
known on the host, alike on every rank, before anything runs: so are the rows that each rank holds
and needs at every step of a plan, and nothing but rows is ever sent.

Every rank holds its rows in one order, from its encoder's output to its reader's input: by sample,
in the order of the reader, and by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from colocc.errors import LayoutError
from colocc.passes.solve.boxes import pieces
from colocc.passes.solve.plan import Holding, Plan

Ids = NDArray[np.int64]
Corners = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Pieces of the grid: (low, high), each [pieces, dims]."""


@dataclass(frozen=True)
class Rows:
    """The rows of one module for all samples of a step.

    Samples are in the reader's order: all microbatches of its replica 0, then of replica 1.

    starts     [samples + 1]: sample i has the rows starts[i] to starts[i + 1]
    position   [rows]: the place of the row's placeholder in the sequence, ascending in a sample
    lengths    [samples]: the length of the sequence
    items      [items]: the rows that the encoder makes of each image or clip, in the same order
    unit       [samples]: the unit of each sample; None for equal parts, as ``units_of`` has them
    """

    replicas: int
    microbatches: int
    starts: Ids
    position: Ids
    lengths: Ids
    items: Ids
    unit: Ids | None = None

    @property
    def samples(self) -> int:
        return len(self.lengths)

    @property
    def counts(self) -> Ids:
        """The rows of each sample."""
        return np.diff(self.starts)

    def alike(self, other: Rows) -> bool:
        """Whether both are the same rows of the same samples."""
        if self.unit is None or other.unit is None:
            same = self.unit is other.unit
        else:
            same = np.array_equal(self.unit, other.unit)
        return (
            same
            and (self.replicas, self.microbatches) == (other.replicas, other.microbatches)
            and np.array_equal(self.starts, other.starts)
            and np.array_equal(self.position, other.position)
            and np.array_equal(self.lengths, other.lengths)
            and np.array_equal(self.items, other.items)
        )

    def joined(self) -> Rows:
        """The same rows where all samples of a replica's microbatch are one sequence."""
        size = self.samples // (self.replicas * self.microbatches)
        before = np.arange(self.samples) % size * self.lengths
        _, owner = self.of_samples(np.arange(self.samples))
        return replace(self, position=self.position + before[owner], lengths=self.lengths * size)

    def place_of(self, sample: int) -> str:
        """What the user calls a sample."""
        per_step = self.samples // self.replicas
        replica, inside = divmod(int(sample), per_step)
        microbatch, place = divmod(inside, per_step // self.microbatches)
        place += replica * (per_step // self.microbatches)
        return f"sample {place} of microbatch {microbatch}"

    def items_of(self, samples: Ids) -> Ids:
        """How many items each of ``samples`` has."""
        ends = np.cumsum(self.items)
        first, last = (
            np.searchsorted(ends, self.starts[samples + side], side="right") for side in (0, 1)
        )
        return last - first

    def units(self, count: int) -> Ids:
        """The unit, of ``count`` in a step, of each sample."""
        return units_of(self.samples, self.replicas, count) if self.unit is None else self.unit

    def microbatch_of(self, samples: Ids) -> Ids:
        """The microbatch of each sample."""
        size = self.samples // (self.replicas * self.microbatches)
        return samples // size % self.microbatches

    def of_samples(self, samples: Ids) -> tuple[Ids, Ids]:
        """All rows of ``samples``, and the sample of each."""
        counts = self.counts[samples]
        owner = np.repeat(samples, counts)
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.starts[owner] + offset, owner

    def by_microbatch(self, rows: Ids) -> list[int]:
        """How many of ``rows`` belong to each microbatch."""
        samples = np.searchsorted(self.starts, rows, side="right") - 1
        found: list[int] = np.bincount(
            self.microbatch_of(samples), minlength=self.microbatches
        ).tolist()
        return found


def units_of(samples: int, replicas: int, units: int) -> Ids:
    """The unit of each sample of a step, in the reader's order.

    Unit u of the U units of a replica with n samples holds its samples floor(u * n / U) to
    floor((u + 1) * n / U): n need not divide by U, and a unit may be empty.
    """
    size, share = samples // replicas, units // replicas
    place = (np.arange(1, size + 1) * share - 1) // size if size else np.arange(0)
    return (np.arange(replicas)[:, None] * share + place).ravel()


def samples_in(units: Sequence[tuple[int, int]], unit_of: Ids) -> Ids:
    """The samples of some units, ascending."""
    inside = np.zeros(len(unit_of), dtype=bool)
    for start, stop in units:
        inside |= (start <= unit_of) & (unit_of < stop)
    return np.flatnonzero(inside)


class Cells:
    """Which rows lie in which cells of a plan's grid."""

    def __init__(self, plan: Plan, rows: Rows) -> None:
        self.plan, self.rows = plan, rows
        unit = rows.units(plan.units)
        self.order = np.argsort(unit, kind="stable")
        self.sorted = unit[self.order]
        self.item_starts = np.concatenate([[0], np.cumsum(rows.items)])

    def inside(self, corners: Corners) -> Ids:
        """The rows in disjoint pieces of the grid, ascending."""
        found = [self._piece(low, high) for low, high in zip(*corners, strict=True)]
        return np.sort(np.concatenate(found)) if found else np.arange(0)

    def _piece(self, low: NDArray[Any], high: NDArray[Any]) -> Ids:
        first, last = np.searchsorted(self.sorted, [low[0], high[0]])
        rows, samples = self.rows.of_samples(self.order[first:last])
        keep = np.ones(len(rows), dtype=bool)
        for dim, name in enumerate(self.plan.dims[1:], 1):
            chunks = self.plan.grid[dim]
            if low[dim] > 0 or high[dim] < chunks:
                chunk = self._chunk(name, rows, samples, chunks)
                keep &= (low[dim] <= chunk) & (chunk < high[dim])
        return rows[keep]

    def _chunk(self, dim: str, rows: Ids, samples: Ids, chunks: int) -> Ids:
        if dim == "position":
            place, length = self.rows.position[rows], self.rows.lengths[samples]
        else:
            item = np.searchsorted(self.item_starts, rows, side="right") - 1
            place, length = rows - self.item_starts[item], self.rows.items[item]
        found: Ids = place * chunks // length
        return found


def rows_held(plan: Plan, holding: Holding, rows: Rows, rank: int) -> Ids:
    """The rows that ``rank`` holds under one side of ``plan``, ascending."""
    return Cells(plan, rows).inside(corners_of(holding, rank))


def corners_of(holding: Holding, rank: int) -> Corners:
    found = list(pieces(holding.box(rank)))
    low, high = ([piece[side] for piece in found] for side in (0, 1))
    dims = len(holding.parts)
    return np.array(low).reshape(-1, dims), np.array(high).reshape(-1, dims)


def counted(value: torch.Tensor | None, held: Ids, rows: Rows, who: str) -> torch.Tensor | None:
    """What an encoder made, if these are as many rows as ``held``; None where it made none of none.

    A rank whose samples have no rows encodes something all the same, for the collectives in the
    encoder: it is dropped, and its gradient is zero.
    Raises: LayoutError for another number, with a sample whose placeholders do not match.
    """
    made = 0 if value is None else len(value)
    if len(held) == 0:
        return None if value is None else value[:0]
    if made != len(held):
        raise LayoutError(
            f"{who} made {made} rows, the samples that it encodes there have {len(held)} "
            f"placeholders in input_ids{_first_wrong(made, held, rows)}. Give each sample as many "
            "placeholders as its items make rows."
        )
    return value


def _first_wrong(made: int, held: Ids, rows: Rows) -> str:
    """The first sample that does not have as many placeholders as its items make rows, if these
    are equally many of each item; else the first sample."""
    samples = np.unique(np.searchsorted(rows.starts, held, side="right") - 1)
    counts, items = rows.counts[samples], rows.items_of(samples)
    if counts.sum() != len(held):  # Each rank makes a part of every item.
        return ""
    each, rest = divmod(made, int(items.sum()))
    wrong = np.flatnonzero(items * each != counts)
    first = 0 if rest else int(wrong[0])
    text = f": {rows.place_of(samples[first])} has {counts[first]} for {items[first]} items"
    return text if rest else f"{text}, which make {items[first] * each} rows"

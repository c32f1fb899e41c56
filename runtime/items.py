"""The items of one module in a step: how many each sample has, the rows of each, and the module's
inputs cut by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import sympy
import torch
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.passes.graph import Entries, Places
from colocc.passes.items import check_entries, entries_of_items, rows_stated, size_at
from colocc.passes.rows import RowsPerItem
from colocc.passes.shapes import lookup, tensors_of
from colocc.passes.solve.boxes import Intervals
from colocc.passes.structure import mapped
from colocc.runtime.pairing import rows_each
from colocc.runtime.parts import by_microbatch, in_order
from colocc.runtime.rows import Ids, Rows, samples_in, units_of

Assign = Callable[[Ids], Ids]
"""From the rows of each sample, in the reader's order, to the unit of each."""


@dataclass
class Learned:
    """What steps teach those after them.

    ``templates`` are the inputs of one item of each module, for steps that have none; ``each`` is
    how many rows an item makes, by its shape.
    """

    templates: dict[str, Any] = field(default_factory=dict)
    each: dict[Any, int] = field(default_factory=dict)

    def copy(self) -> Learned:
        return Learned(dict(self.templates), dict(self.each))


@dataclass(frozen=True)
class _Items:
    """The items of one microbatch: how many each sample has, and the rows of each."""

    per_sample: Ids
    rows: Ids
    starts: Ids

    @classmethod
    def make(cls, per_sample: Ids, rows: Ids) -> _Items:
        return cls(per_sample, rows, np.concatenate([[0], np.cumsum(per_sample)]))


class ModuleItems:
    """The rows and items of one module."""

    def __init__(
        self,
        places: Places,
        microbatches: Sequence[Mapping[str, Any]],
        masks: Sequence[np.ndarray],
        replicas: int,
        rows_per_item: RowsPerItem | None,
        learned: Learned,
        *,
        assign: Assign | None = None,
        own: tuple[Intervals, int] | None = None,
        sizes: Sequence[Mapping[Any, int]],
    ) -> None:
        self.name, self.microbatches, self.replicas = places.items, microbatches, replicas
        self.places, self.learned, self.sizes = places, learned, sizes
        self.each = 0
        self.counts = self.placeholders = [mask.sum(axis=1) for mask in masks]
        self.unit = None if assign is None else assign(in_order(self.counts, replicas))
        if own is not None:
            self.counts = self._encoded(*own)
        self.inputs = [self._given(index) for index in range(len(microbatches))]
        if rows_per_item is None:
            self.items = self._alike()
        else:
            self.items = [self._stated(index, rows_per_item) for index in range(len(microbatches))]
        self.rows = self._rows(masks)

    def _encoded(self, units: Intervals, count: int) -> list[Ids]:
        """The placeholders of the samples in ``units``, none of others: only their items are
        here."""
        order = in_order(self.counts, self.replicas)
        unit = units_of(len(order), self.replicas, count) if self.unit is None else self.unit
        mine = np.zeros_like(order)
        samples = samples_in(units, unit)
        mine[samples] = order[samples]
        return by_microbatch(mine, self.replicas, len(self.counts))

    # ------------------------------------------------------------ items

    def _given(self, index: int) -> Any:
        """The inputs of a microbatch that hold its items; None where there are none."""
        found = self.places.given(self.microbatches[index])
        missing = [n for n in self.places.names or () if found is not None and n not in found]
        if missing:
            raise LayoutError(
                f"microbatch {index} has {', '.join(found)} and lacks {', '.join(missing)}, which "
                f"holds the same items of {self.name}. Give both, or neither where there are none."
            )
        return found

    def _number(self, index: int) -> int:
        """The items of a microbatch: dim 0 of its inputs."""
        sizes = {
            ".".join(path): tensor.shape[0]
            for path, tensor in tensors_of(self.inputs[index], self.places.inputs)
            if tensor.dim()
        }
        if len(set(sizes.values())) > 1:
            (first, one), (second, two) = [
                next((n, s) for n, s in sizes.items() if s == size)
                for size in list(dict.fromkeys(sizes.values()))[:2]
            ]
            raise LayoutError(
                f"microbatch {index} has {one} items in {first} and {two} in {second}: dim 0 of "
                f"both counts the items of {self.name}. Make them equal, or say how many rows each "
                f"item makes: compile(..., rows={{{self.name!r}: function of the inputs}})"
            )
        return next(iter(sizes.values()), 0)

    def _alike(self) -> list[_Items]:
        """The items of every microbatch where all of them make equally many rows."""
        numbers = [self._number(index) for index in range(len(self.microbatches))]
        shape = self._shape(numbers)
        known = self._size_of(self.places.each) or self.learned.each.get(shape)
        called = ", ".join(self.places.names or (f"modality_inputs[{self.name!r}]",))
        each = rows_each(self.name, self.counts, numbers, known, called)
        self.each = each or known or 0
        if each:
            self.learned.each[shape] = each
        return [
            _Items.make(count // max(1, each), np.full(number, each))
            for count, number in zip(self.counts, numbers, strict=True)
        ]

    def _shape(self, numbers: Sequence[int]) -> Any:
        """What items with the same of it make equally many rows."""
        index = next((i for i, number in enumerate(numbers) if number), 0)
        found = tensors_of(self.inputs[index], (self.name,))
        return (self.name, *((path, tuple(tensor.shape[1:])) for path, tensor in found))

    def _size_of(self, expr: sympy.Expr | None) -> int | None:
        """``expr`` at the sizes of the first microbatch with items, if it depends on any."""
        index = next((i for i, given in enumerate(self.inputs) if given is not None), None)
        return None if expr is None else size_at(expr, {} if index is None else self.sizes[index])

    def _stated(self, index: int, rows_per_item: RowsPerItem) -> _Items:
        """The items of one microbatch, with the rows that the user's function says."""
        count = self.counts[index]
        rows = rows_stated(self.name, self.inputs[index], rows_per_item)
        ends, borders = np.cumsum(rows), np.cumsum(count)
        stops = np.searchsorted(ends, borders, side="right")
        reached = np.concatenate([[0], ends])[stops]
        bad = np.flatnonzero(reached != borders)
        if len(bad) or int(rows.sum()) != int(count.sum()) or (rows < 1).any():
            sample = int(bad[0]) if len(bad) else len(count) - 1
            first = int(stops[sample - 1]) if sample else 0
            have = rows[first : stops[sample] + 1].tolist() if len(bad) else rows[first:].tolist()
            raise LayoutError(
                f"{self.name}: sample {sample} of microbatch {index} has {count[sample]} "
                f"placeholders in input_ids, its next items make {' + '.join(map(str, have)) or 0} "
                f"rows; the microbatch has {int(count.sum())} placeholders and {len(rows)} items "
                f"of {int(rows.sum())} rows. Make them match."
            )
        self._check_inputs(index, rows)
        return _Items.make(np.diff(stops, prepend=0), rows)

    def _rows(self, masks: Sequence[np.ndarray]) -> Rows:
        """The rows of all samples, in the reader's order."""
        positions, lengths, counts, items = [], [], [], []
        for replica in range(self.replicas):
            for mask, found in zip(masks, self.items, strict=True):
                size = len(mask) // self.replicas
                mine = mask[replica * size : (replica + 1) * size]
                positions.append(mine.nonzero()[1])
                counts.append(mine.sum(axis=1))
                lengths.append(np.full(size, mask.shape[1]))
                first, last = found.starts[[replica * size, (replica + 1) * size]]
                items.append(found.rows[first:last])
        return Rows(
            self.replicas,
            len(masks),
            np.concatenate([[0], np.cumsum(np.concatenate(counts))]),
            np.concatenate(positions),
            np.concatenate(lengths),
            np.concatenate(items),
            self.unit,
        )

    def entries(self, made_of: Entries) -> Rows:
        """The rows, where an entry of a value is not one row."""
        size, counts, items = self._size_of(made_of.size), self.rows.counts, self.rows.items
        if size is None:  # Nothing was given that has such a size.
            size = 0
        if made_of.by_row:
            counts, items = counts * size, items * size
        else:
            counts, items = counts // max(1, self.each) * size, np.full_like(items, size)
        starts = np.concatenate([[0], np.cumsum(counts)])
        # No layout cuts positions here: an entry need not have one.
        return replace(self.rows, starts=starts, position=np.zeros(starts[-1]), items=items)

    # ------------------------------------------------------------ inputs

    def template(self) -> Any:
        """This module's inputs of one item; None where no microbatch has any."""
        index = next((i for i, found in enumerate(self.items) if len(found.rows)), None)
        if index is None:
            return None
        return narrowed(self._cut(index, 0, 1, self.inputs[index]), _kept)

    def cut(self, samples: Ids, path: tuple[str, ...]) -> list[tuple[int, int, int, Any]]:
        """The items of ``samples``, in runs of neighbours within a microbatch: (microbatch, first,
        last, their inputs)."""
        size = self.rows.samples // (self.replicas * len(self.items))
        replica, inside = np.divmod(samples, size * len(self.items))
        microbatch, place = np.divmod(inside, size)
        place = replica * size + place
        runs: list[list[int]] = []
        for index, sample in zip(microbatch.tolist(), place.tolist(), strict=True):
            starts = self.items[index].starts
            first, last = int(starts[sample]), int(starts[sample + 1])
            if first == last:
                continue
            if runs and runs[-1][0] == index and runs[-1][2] == first:
                runs[-1][2] = last
            else:
                runs.append([index, first, last])
        return [
            (index, first, last, self._items_of(index, first, last, path))
            for index, first, last in runs
        ]

    def _items_of(self, index: int, first: int, last: int, path: tuple[str, ...]) -> Any:
        return self._cut(index, first, last, lookup(self.microbatches[index], path))

    def _cut(self, index: int, first: int, last: int, value: Any) -> Any:
        """The items ``first`` to ``last`` of a microbatch's input."""
        rows = self.items[index].rows

        def narrow(leaf: torch.Tensor) -> torch.Tensor:
            start, stop = entries_of_items(leaf.shape[0], rows, first, last)
            whole = stop - start == leaf.shape[0]
            return leaf if whole else leaf.narrow(0, start, stop - start)

        return narrowed(value, narrow)

    def _check_inputs(self, index: int, rows: Ids) -> None:
        """Raise LayoutError for a tensor that has entries neither for each item nor for each
        row."""
        found = tensors_of(self.inputs[index], self.places.inputs)
        tensors = [(".".join(path), tensor) for path, tensor in found]
        check_entries(self.name, f"microbatch {index}", tensors, rows)


def _kept(leaf: torch.Tensor) -> torch.Tensor:
    """A copy for later steps: the batch's memory may hold another by then. Zero times NaN is NaN,
    so that what counts for nothing must be finite."""
    if not leaf.is_floating_point():
        return leaf.detach().clone()
    return torch.nan_to_num(leaf.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def narrowed(value: Any, cut: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with each tensor in it that has a dim cut."""
    return mapped(
        lambda leaf: cut(leaf) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf, value
    )


def check_alike(parts: Sequence[tuple[int, int, int, Any]], path: tuple[str, ...]) -> None:
    """Raise LayoutError for parts of an input, each (microbatch, first, last, its tensors), that
    cannot be one: their tensors, or the sizes of these but for the number of items, differ."""

    def sizes(value: Any) -> dict[str, str]:
        return {
            ".".join(where): f"[{', '.join(['items', *map(str, found.shape[1:])])}]"
            for where, found in tensors_of(value, path)
        }

    for index, _, _, value in parts[1:]:
        first, *_, other = parts[0]
        one, two = sizes(other), sizes(value)
        for name in one | two:
            if one.get(name) != two.get(name):
                raise LayoutError(
                    f"{name} is {one.get(name, 'not given')} in microbatch {first} and "
                    f"{two.get(name, 'not given')} in microbatch {index}, whose items are encoded "
                    "together. Make them alike, or encode a microbatch at a time: "
                    "schedule='lookahead=1' at pp1, 'filled' at pp > 1."
                )


def joined(parts: list[Any]) -> Any:
    """The parts of one input as one: their tensors along dim 0."""
    if len(parts) == 1:
        return parts[0]

    def join(*leaves: Any) -> Any:
        whole = isinstance(leaves[0], torch.Tensor) and leaves[0].dim()
        return torch.cat(leaves) if whole else leaves[0]

    return pytree.tree_map(join, *parts)

"""Which images a sample has, which rows they make, and the encoder inputs of this rank's samples.

An encoder's input holds items (images, clips), some number of them for each sample; each makes
rows, one for each of its placeholders (places in ``input_ids``, or true ones of a mask that a
recorded model makes). The placeholders say how many rows a sample has. How many items these are
follows if all items make equally many rows, or from ``rows``: a function of one microbatch's
encoder inputs that returns the rows of each item.

All of this is host arithmetic on the global batch: every rank finds the same, and the same errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.passes.graph import Entries, Places
from colocc.passes.items import check_entries, entries_of_items, rows_stated, size_at
from colocc.passes.rows import RowsPerItem
from colocc.passes.shapes import lookup, tensors_of
from colocc.passes.solve.boxes import Intervals
from colocc.runtime.guards import value_of
from colocc.runtime.pairing import rows_each
from colocc.runtime.parts import Run, by_microbatch, in_order
from colocc.runtime.rows import Ids, Rows, samples_in, units_of

Assign = Callable[[Ids], Ids]
"""From the rows of each sample, in the reader's order, to the unit of each."""


def on_host(ids: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The tensors as arrays; one wait for all of them where they are on a device."""
    copies = [
        torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True)
        if t.is_cuda
        else t
        for t in ids
    ]
    if any(t.is_cuda for t in ids):
        torch.cuda.current_stream().synchronize()
    return [copy.numpy() for copy in copies]


def masks_of(
    places: Mapping[str, Places], microbatches: Sequence[Mapping[str, Any]]
) -> dict[str, list[np.ndarray]]:
    """Of each module, the placeholders in each microbatch: [samples, tokens]."""
    wanted: dict[Any, list[torch.Tensor]] = {}
    for place in places.values():
        if place.mask not in wanted:
            wanted[place.mask] = [
                batch["input_ids"] if place.mask is None else value_of(place.mask, batch)
                for batch in microbatches
            ]
    arrays = iter(on_host([tensor for found in wanted.values() for tensor in found]))
    hosts = {mask: [next(arrays) for _ in found] for mask, found in wanted.items()}
    return {
        name: [
            found == place.token if place.mask is None else found.reshape(len(found), -1)
            for found in hosts[place.mask]
        ]
        for name, place in places.items()
    }


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


class Ragged:
    """The rows and items of all modules that make rows, for the microbatches of one step."""

    def __init__(
        self,
        microbatches: Sequence[Mapping[str, Any]],
        places: Mapping[str, Places],
        *,
        replicas: int,
        rows_per_item: Mapping[str, RowsPerItem] | None = None,
        learned: Learned | None = None,
        packed: bool = False,
        assign: Mapping[str, Assign] | None = None,
        own: Mapping[str, tuple[Intervals, int]] | None = None,
        sizes: Sequence[Mapping[Any, int]] | None = None,
    ) -> None:
        """``places`` are those of each module; ``replicas`` the reader's dp. ``learned`` is from
        the steps before, and learns from this one. Where sequences are ``packed``, a replica reads
        the samples of a microbatch joined: so positions count. ``assign`` chooses the units of a
        module's samples. ``own`` is given where the inputs hold only the items of this rank: the
        units that it encodes, and how many a step has. ``sizes`` are those that the microbatches of
        a recorded model have.

        Raises: LayoutError for items and placeholders that do not match, with the first sample.
        """
        given = rows_per_item or {}
        self.learned = Learned() if learned is None else learned
        self.sizes = [{} for _ in microbatches] if sizes is None else sizes
        masks = masks_of(places, microbatches)
        self.modules = {
            name: _Module(
                place,
                microbatches,
                masks[name],
                replicas,
                given.get(place.items),
                self.learned,
                assign=(assign or {}).get(name),
                own=(own or {}).get(name),
                sizes=self.sizes,
            )
            for name, place in places.items()
        }
        for module in self.modules.values() if packed else ():
            module.rows = module.rows.joined()
        for name, module in self.modules.items():
            template = module.template()
            if template is not None:
                self.learned.templates[name] = template

    @property
    def rows(self) -> dict[str, Rows]:
        return {name: module.rows for name, module in self.modules.items()}

    def moved(self, node: fx.Node) -> Rows:
        """The rows of a value that crosses to the reader, entry by entry of its dim 0."""
        module = self.modules[node.meta["rows"].src.module]
        made_of = node.meta.get("entries")
        return module.rows if made_of is None else module.entries(made_of)

    def encoder_input(self, name: str, units: Intervals, count: int, path: tuple[str, ...]) -> Any:
        """The part of an input of module ``name`` that holds the items of ``units``, of ``count``
        in a step.

        Where there are none, one item of the step, or of one before it, or of the example: encoders
        need not take an empty batch, and yet run the collectives of their peers; its rows count for
        nothing. None where there has been no item.
        """
        parts = [part for *_, part in self.held(name, units, count, path)]
        return _join(parts) if parts else self._spare(name, path)

    def reader_input(self, name: str, microbatch: int, replica: int, path: tuple[str, ...]) -> Any:
        """The part of an input of module ``name`` that holds the items of the samples that a
        ``replica`` of the reader has in a microbatch; none of them where it has none."""
        module = self.modules[name]
        size = module.rows.samples // (module.rows.replicas * module.rows.microbatches)
        first = (replica * module.rows.microbatches + microbatch) * size
        parts = [part for *_, part in module.cut(np.arange(first, first + size), path)]
        if parts:
            return _join(parts)
        return _narrow(self._spare(name, path), lambda leaf: leaf[:0])

    def _spare(self, name: str, path: tuple[str, ...]) -> Any:
        """One item of module ``name`` that counts for nothing."""
        module = self.modules[name]
        template = self.learned.templates.get(name)
        if template is None and module.places.mask is not None:
            raise LayoutError(
                f"{name} has seen no item: this step has none, and compile() was given an example "
                "without data. Give it example_inputs with data, or a first step with an item."
            )
        if template is None:
            return None
        found = lookup(template, path[len(module.places.inputs) :])
        if template is not module.places.template:
            return found
        device = lookup(module.microbatches[0], min(module.places.read)).device
        return _narrow(found, lambda leaf: leaf.to(device))

    def held(
        self, name: str, units: Intervals, count: int, path: tuple[str, ...]
    ) -> list[tuple[int, int, int, Any]]:
        """The items of ``units``, of ``count`` in a step: (microbatch, first, last, their part of
        the input)."""
        module = self.modules[name]
        samples = samples_in(units, module.rows.units(count))
        return module.cut(samples, path)

    def items_per_sample(self, name: str, microbatch: int) -> Ids:
        """How many items each sample of a microbatch has."""
        return self.modules[name].items[microbatch].per_sample

    def rows_per_item(self, name: str, microbatch: int) -> Ids:
        """The rows of each item of a microbatch."""
        return self.modules[name].items[microbatch].rows

    def input_of_runs(self, name: str, runs: Sequence[Run], path: tuple[str, ...]) -> Any:
        """The part of an input of module ``name`` that holds the items of the samples in ``runs``,
        each (microbatch, start, stop)."""
        module = self.modules[name]
        per_step = module.rows.samples // module.rows.replicas
        size = per_step // module.rows.microbatches
        found = []
        for microbatch, start, stop in runs:
            replica, place = np.divmod(np.arange(start, stop), size)
            found.append(replica * per_step + microbatch * size + place)
        return _join([part for *_, part in module.cut(np.concatenate(found), path)])


@dataclass(frozen=True)
class _Items:
    """The items of one microbatch: how many each sample has, and the rows of each."""

    per_sample: Ids
    rows: Ids
    starts: Ids

    @classmethod
    def make(cls, per_sample: Ids, rows: Ids) -> _Items:
        return cls(per_sample, rows, np.concatenate([[0], np.cumsum(per_sample)]))


class _Module:
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
        self.counts = [mask.sum(axis=1) for mask in masks]
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
        return None if index is None else self._cut(index, 0, 1, self.inputs[index])

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
            return leaf.narrow(0, start, stop - start)

        return _narrow(value, narrow)

    def _check_inputs(self, index: int, rows: Ids) -> None:
        """Raise LayoutError for a tensor that has entries neither for each item nor for each
        row."""
        found = tensors_of(self.inputs[index], self.places.inputs)
        tensors = [(".".join(path), tensor) for path, tensor in found]
        check_entries(self.name, f"microbatch {index}", tensors, rows)


def _narrow(value: Any, cut: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return pytree.tree_map(
        lambda leaf: cut(leaf) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf, value
    )


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]

    def join(*leaves: Any) -> Any:
        whole = isinstance(leaves[0], torch.Tensor) and leaves[0].dim()
        return torch.cat(leaves) if whole else leaves[0]

    return pytree.tree_map(join, *parts)

"""Which images a sample has, which rows they make, and the encoder inputs of this rank's samples.

An encoder's input holds items (images, clips), some number of them for each sample; each makes
rows, one for each of its placeholders in ``input_ids``. The placeholders say how many rows a sample
has. How many items these are follows if all items make equally many rows, or from ``rows``: a
function of one microbatch's encoder inputs that returns the rows of each item.

All of this is host arithmetic on the global batch: every rank finds the same, and the same errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.passes.shapes import lookup, tensors_of
from colocc.passes.solve.boxes import Intervals
from colocc.runtime.pairing import rows_each
from colocc.runtime.parts import Run, by_microbatch, in_order
from colocc.runtime.rows import Ids, Rows, samples_in, units_of

RowsPerItem = Callable[[Any], "torch.Tensor | Sequence[int]"]
Assign = Callable[[Ids], Ids]
"""From the rows of each sample, in the reader's order, to the unit of each."""
INPUTS = "modality_inputs"


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
        tokens: Mapping[str, int],
        *,
        replicas: int,
        rows_per_item: Mapping[str, RowsPerItem] | None = None,
        learned: Learned | None = None,
        packed: bool = False,
        assign: Mapping[str, Assign] | None = None,
        own: Mapping[str, tuple[Intervals, int]] | None = None,
    ) -> None:
        """``tokens`` is the placeholder of each module; ``replicas`` the reader's dp. ``learned``
        is from the steps before, and learns from this one. Where sequences are ``packed``, a
        replica reads the samples of a microbatch joined: so positions count. ``assign`` chooses
        the units of a module's samples. ``own`` is given where the inputs hold only the items of
        this rank: the units that it encodes, and how many a step has.

        Raises: LayoutError for items and placeholders that do not match, with the first sample.
        """
        ids = on_host([batch["input_ids"] for batch in microbatches]) if tokens else []
        given = rows_per_item or {}
        self.learned = Learned() if learned is None else learned
        self.modules = {
            name: _Module(
                name,
                microbatches,
                ids,
                token,
                replicas,
                given.get(name),
                self.learned,
                assign=(assign or {}).get(name),
                own=(own or {}).get(name),
            )
            for name, token in tokens.items()
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

    def encoder_input(self, name: str, units: Intervals, count: int, path: tuple[str, ...]) -> Any:
        """The part of an input of module ``name`` that holds the items of ``units``, of ``count``
        in a step.

        Where there are none, one item of the step, or of one before it: encoders need not take an
        empty batch, and yet run the collectives of their peers; its rows count for nothing. None
        where no step has had an item.
        """
        parts = [part for *_, part in self.held(name, units, count, path)]
        if not parts:
            return lookup({INPUTS: self.learned.templates}, path)
        return _join(parts)

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
        name: str,
        microbatches: Sequence[Mapping[str, Any]],
        ids: Sequence[np.ndarray],
        token: int,
        replicas: int,
        rows_per_item: RowsPerItem | None,
        learned: Learned,
        *,
        assign: Assign | None = None,
        own: tuple[Intervals, int] | None = None,
    ) -> None:
        self.name, self.microbatches, self.replicas = name, microbatches, replicas
        self.learned = learned
        masks = [found == token for found in ids]
        self.counts = [mask.sum(axis=1) for mask in masks]
        self.unit = None if assign is None else assign(in_order(self.counts, replicas))
        if own is not None:
            self.counts = self._encoded(*own)
        self.inputs = [lookup(batch, (INPUTS, name)) for batch in microbatches]
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

    def _number(self, index: int) -> int:
        """The items of a microbatch: dim 0 of its inputs."""
        sizes = {
            ".".join(path): tensor.shape[0]
            for path, tensor in tensors_of(self.inputs[index], (INPUTS, self.name))
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
        each = rows_each(self.name, self.counts, numbers, self.learned.each.get(shape))
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

    def _stated(self, index: int, rows_per_item: RowsPerItem) -> _Items:
        """The items of one microbatch, with the rows that the user's function says."""
        given, count = self.inputs[index], self.counts[index]
        said = [] if given is None else rows_per_item(given)
        rows = np.asarray(torch.as_tensor(said).cpu(), dtype=np.int64).ravel()
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

    # ------------------------------------------------------------ inputs

    def template(self) -> Any:
        """This module's inputs of one item; None where no microbatch has any."""
        index = next((i for i, found in enumerate(self.items) if len(found.rows)), None)
        return None if index is None else self._items_of(index, 0, 1, (INPUTS, self.name))

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
        found = self.items[index]
        before = np.concatenate([[0], np.cumsum(found.rows)])

        def narrow(leaf: torch.Tensor) -> torch.Tensor:
            if leaf.shape[0] == len(found.rows):
                return leaf.narrow(0, first, last - first)
            per_row = leaf.shape[0] // int(before[-1])
            start, stop = int(before[first]) * per_row, int(before[last]) * per_row
            return leaf.narrow(0, start, stop - start)

        return _narrow(lookup(self.microbatches[index], path), narrow)

    def _check_inputs(self, index: int, rows: Ids) -> None:
        """Raise LayoutError for a tensor that has entries neither for each item nor for each
        row."""
        total = int(rows.sum())
        for path, tensor in tensors_of(self.inputs[index], (INPUTS, self.name)):
            size = tensor.shape[0] if tensor.dim() else len(rows)
            if size != len(rows) and (total == 0 or size % total):
                raise LayoutError(
                    f"{'.'.join(path)} of microbatch {index} has {size} entries in dim 0: neither "
                    f"one for each of the {len(rows)} items nor equally many for each of their "
                    f"{total} rows"
                )


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

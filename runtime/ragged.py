"""Which images a sample has, which rows they make, and the encoder inputs of this rank's samples.

An encoder's input holds items (images, clips), some number of them for each sample; each makes
rows, one for each of its placeholders (places in ``input_ids``, or true ones of a mask that a
recorded model makes). The placeholders say how many rows a sample has. How many items these are
follows if all items make equally many rows, or from ``rows``: a function of one microbatch's
encoder inputs that returns the rows of each item.

All of this is host arithmetic on the global batch: every rank finds the same, and the same errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from colocc.errors import LayoutError
from colocc.passes.graph import Places
from colocc.passes.rows import RowsPerItem
from colocc.passes.shapes import lookup
from colocc.passes.solve.boxes import Intervals
from colocc.runtime.guards import value_of
from colocc.runtime.items import (
    Assign,
    Learned,
    ModuleItems,
    check_alike,
    joined,
    narrowed,
)
from colocc.runtime.parts import Run
from colocc.runtime.rows import Ids, Rows, samples_in

Masks = dict[str, list[np.ndarray]]
"""Of each module, the placeholders in each microbatch: [samples, tokens]."""


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


def masks_of(places: Mapping[str, Places], microbatches: Sequence[Mapping[str, Any]]) -> Masks:
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
        masks: Masks | None = None,
    ) -> None:
        """``places`` are those of each module; ``replicas`` the reader's dp. ``learned`` is from
        the steps before, and learns from this one. Where sequences are ``packed``, a replica reads
        the samples of a microbatch joined: so positions count. ``assign`` chooses the units of a
        module's samples. ``own`` is given where the inputs hold only the items of this rank: the
        units that it encodes, and how many a step has. ``sizes`` are those that the microbatches of
        a recorded model have. ``masks`` are those of ``masks_of``, where they are known.

        Raises: LayoutError for items and placeholders that do not match, with the first sample.
        """
        given = rows_per_item or {}
        self.learned = Learned() if learned is None else learned
        self.sizes = [{} for _ in microbatches] if sizes is None else sizes
        masks = masks_of(places, microbatches) if masks is None else masks
        self.modules = {
            name: ModuleItems(
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
        held = self.held(name, units, count, path)
        check_alike(held, path)
        parts = [part for *_, part in held]
        return joined(parts) if parts else self._spare(name, path)

    def reader_input(self, name: str, microbatch: int, replica: int, path: tuple[str, ...]) -> Any:
        """The part of an input of module ``name`` that holds the items of the samples that a
        ``replica`` of the reader has in a microbatch; none of them where it has none."""
        module = self.modules[name]
        size = module.rows.samples // (module.rows.replicas * module.rows.microbatches)
        first = (replica * module.rows.microbatches + microbatch) * size
        parts = [part for *_, part in module.cut(np.arange(first, first + size), path)]
        if parts:
            return joined(parts)
        return narrowed(self._spare(name, path), lambda leaf: leaf[:0])

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
        return narrowed(found, lambda leaf: leaf.to(device))

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
        return joined([part for *_, part in module.cut(np.concatenate(found), path)])

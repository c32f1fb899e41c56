"""Cut a global batch into what this rank reads, for each module's layout.

A step has M microbatches of B samples. The sink's replica d reads samples d*b to (d+1)*b of every
microbatch, b = B / dp. An encoder's slots hold parts of the step in the order of the sink's
replicas, microbatch by microbatch: position p is sample ``p % (M*b)`` of replica ``p // (M*b)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from colocc.layout import Layout
from colocc.passes.graph import Graph
from colocc.passes.rows import BatchDims, RowsPerItem, dim_of, rows_per_sample
from colocc.passes.shapes import lookup
from colocc.passes.solve.boxes import Intervals
from colocc.passes.structure import mapped
from colocc.runtime.checks import check_batches, check_divides, check_inputs, check_sequences
from colocc.runtime.fields import (
    check_by_token,
    check_kinds,
    check_masks,
    check_tokens,
    holds_items,
    is_shared,
)
from colocc.runtime.guards import check_guards
from colocc.runtime.holdings import assigner, deals, holding_of, sample_runs, units_held
from colocc.runtime.items import Learned
from colocc.runtime.megatron.packing import packings
from colocc.runtime.parts import Parts, Run, size_of_step, whole_inputs
from colocc.runtime.ragged import Masks, Ragged, masks_of
from colocc.sequence import axes_of, cuts, part_of


class Batches:
    """The microbatches of one step, alike on every rank, and what this rank reads of them."""

    def __init__(
        self,
        graph: Graph,
        microbatches: Sequence[Mapping[str, Any]],
        rank: int,
        batch_dims: BatchDims,
        optional: frozenset[str] = frozenset(),
        *,
        rows_per_item: Mapping[str, RowsPerItem] | None = None,
        learned: Learned | None = None,
        balance: bool = False,
        local: Graph | None = None,
        encodes: bool = True,
        in_chunks: bool = False,
        of: tuple[Batches, range] | None = None,
    ) -> None:
        """``balance``: samples are dealt to slots by their rows, not in order. ``local`` is given
        where the microbatches hold the samples of this rank alone: what it runs of ``graph``.
        ``encodes`` is false where the encoders do not run over these microbatches as a whole.
        ``in_chunks``: they run over chunks of them, each of which is given the step that it is
        ``of``, and which of its microbatches it has: the step has checked them."""
        self.graph, self.rank, self.batch_dims = graph, rank, batch_dims
        self.microbatches = microbatches
        self.optional = optional
        self.sink = graph.layouts[graph.sink]
        self.replica = int(self.sink.coordinates("dp")[rank])
        self.parts: Parts | None = None
        self.chunks: Sequence[Batches] = ()
        self._masks: Masks | None = None
        if of is not None:
            self._cut_from(*of)
        else:
            self._check(local, encodes=encodes)
        self._ragged = partial(
            self._find_rows, rows_per_item, learned, balance=balance, local=local, encodes=encodes
        )
        if in_chunks:
            self._masks = masks_of(graph.rows, microbatches)
        else:
            self.ragged = self._ragged()

    @cached_property
    def ragged(self) -> Ragged:
        """The rows and items of the modules that make rows. A step in chunks, which know theirs,
        finds its own only when asked."""
        return self._ragged()

    def _check(self, local: Graph | None, *, encodes: bool) -> None:
        """Raise LayoutError or CaptureError for microbatches that cannot be cut."""
        graph, microbatches = self.graph, self.microbatches
        if local is None:
            self.size = check_batches(graph, microbatches, self.batch_dims, self.optional)
        else:
            self.size = size_of_step(graph, microbatches, self.batch_dims)
        check_tokens(graph, microbatches)
        self.packings = packings(graph.packing, microbatches, (graph.sink, self.sink))
        check_masks(graph, microbatches)
        check_divides(graph, len(microbatches), self.size)
        if local is not None:
            self.parts = self._parts(local, encodes)
        check_by_token(graph, microbatches)
        check_sequences(graph, microbatches)

    def _cut_from(self, step: Batches, place: range) -> None:
        """Take over what ``step`` knows of the microbatches at ``place``. Raises: LayoutError if
        these cannot be cut by themselves."""
        inside = slice(place.start, place.stop)
        self.size = step.size
        self.packings = None if step.packings is None else step.packings[inside]
        check_divides(self.graph, len(place), self.size)
        if step._masks is not None:
            self._masks = {name: found[inside] for name, found in step._masks.items()}

    def _find_rows(
        self,
        rows_per_item: Mapping[str, RowsPerItem] | None,
        learned: Learned | None,
        *,
        balance: bool,
        local: Graph | None,
        encodes: bool,
    ) -> Ragged:
        graph, modules = self.graph, self.graph.rows if encodes else {}
        return Ragged(
            self.microbatches,
            modules,
            masks=self._masks,
            replicas=self.sink.dp,
            rows_per_item=rows_per_item,
            learned=learned,
            packed=self.packings is not None,
            assign={n: assigner(graph, n) for n in modules if deals(graph, n)} if balance else None,
            own=None if local is None else {name: self.units(name) for name in modules},
            sizes=[graph.guards.known(batch, self.size) for batch in self.microbatches]
            if graph.guards is not None
            else None,
        )

    @property
    def sizes(self) -> Sequence[Mapping[Any, int]]:
        """The sizes of each microbatch that a recorded graph knows; none of another graph."""
        return self.ragged.sizes

    @property
    def tokens(self) -> list[int]:
        """The tokens of a sample of each microbatch."""
        return [batch["input_ids"].shape[1] for batch in self.microbatches]

    @property
    def hidden(self) -> tuple[int, int]:
        """The tokens and the samples of the language module's hidden states, in a microbatch of
        one replica."""
        samples, tokens = self.size // self.sink.dp, self.tokens[0]
        return (tokens, samples) if self.packings is None else (samples * tokens, 1)

    def _parts(self, mine: Graph, encodes: bool) -> Parts:
        """Where this rank's samples lie in its parts, which hold what they must."""
        count, sink = len(self.microbatches), self.graph.sink
        encoders = [name for name in self.graph.layouts if name not in self.graph.rows and encodes]
        runs = {name: self.runs_of(name) for name in (*encoders, sink)}
        parts = Parts(self.graph, self.size, runs)
        check_inputs(mine, self.microbatches, self.optional, self.graph)
        parts.check(mine, self.microbatches, self.batch_dims)
        check_kinds(mine, self.microbatches)
        for index in range(count):
            shapes = parts.as_whole(self.microbatches[index], index, self.batch_dims)
            check_guards(self.graph, shapes, self.size, f"microbatch {index}")
        return parts

    def common(self) -> list[Mapping[str, Any]]:
        """What all ranks have alike: all, or of local parts what is whole."""
        if self.parts is None:
            return list(self.microbatches)
        names = [name for (name,) in whole_inputs(self.graph)]
        whole = [{name: batch[name] for name in names} for batch in self.microbatches]
        return [{"samples": self.size, "microbatches": len(whole)}, *whole]

    def encoder_input(self, node: fx.Node, runs: list[Run] | None = None) -> Any:
        """The samples ``runs`` of an encoder's input; if not given, those that this rank encodes of
        the whole step."""
        module = node.meta["module"]
        if holds_items(self.graph, node):
            path = node.meta["path"]
            if runs is not None:
                return self.ragged.input_of_runs(module, runs, path)
            return self.ragged.encoder_input(module, *self.units(module), path)
        if runs is None:
            runs = self.runs(node)
        # A slot without samples still has an input, of none.
        parts = [self.cut(node, mb, start, stop) for mb, start, stop in runs or [(0, 0, 0)]]
        if len(parts) == 1:
            return parts[0]
        dim = dim_of(self.batch_dims, node.meta["path"][0])

        def join(*leaves: Any) -> Any:
            whole = dim is not None and isinstance(leaves[0], torch.Tensor)
            return torch.cat(leaves, dim=dim) if whole and leaves[0].dim() > dim else leaves[0]

        return pytree.tree_map(join, *parts)

    def units(self, module: str) -> tuple[Intervals, int]:
        """The units of a step that this rank holds of ``module``, and how many there are."""
        by_rank, count = units_held(self.graph, module)
        return by_rank[self.rank], count

    def runs(self, node: fx.Node) -> list[Run]:
        """The samples of an input that this rank reads in the whole step."""
        return self.runs_of(node.meta["module"])

    def runs_of(self, module: str) -> list[Run]:
        """The samples that this rank reads of the inputs of ``module`` in the whole step."""
        count = len(self.microbatches)
        if module != self.graph.sink:
            holding = holding_of(self.graph, module)
            return sample_runs(holding, self.sink.dp, count, self.size, self.rank)
        return [(index, *self._replica()) for index in range(count)]

    def _replica(self) -> tuple[int, int]:
        """The samples of a microbatch that this rank's replica of the sink reads."""
        size = self.size // self.sink.dp
        return self.replica * size, (self.replica + 1) * size

    def placeholders(self) -> dict[str, list[int]]:
        """How many placeholders this rank's replica of the sink reads in each microbatch, of each
        module whose rows have their places in input_ids."""
        if self.chunks:
            found = [chunk.placeholders() for chunk in self.chunks]
            return {name: [n for chunk in found for n in chunk[name]] for name in found[0]}
        first, last = self._replica()
        return {
            name: [int(found[first:last].sum()) for found in module.placeholders]
            for name, module in self.ragged.modules.items()
            if module.places.mask is None
        }

    def sink_input(self, node: fx.Node, microbatch: int) -> Any:
        """The samples of one microbatch that this rank's replica of the sink reads."""
        name = node.meta["path"][0]
        if holds_items(self.graph, node):
            path = node.meta["path"]
            return self.ragged.reader_input(node.meta["items"], microbatch, self.replica, path)
        if self.packings is None:
            return self.cut(node, microbatch, *self._replica())
        if name == self.graph.packing:
            return self.packings[microbatch].of_replica(self.replica)
        dim = dim_of(self.batch_dims, name)
        value = self.cut(node, microbatch, *self._replica())
        if dim is None or not isinstance(value, torch.Tensor) or value.dim() <= dim + 1:
            return value
        return value.flatten(dim, dim + 1).unsqueeze(dim)

    def cut(self, node: fx.Node, microbatch: int, start: int, stop: int) -> Any:
        """The samples from ``start`` to ``stop`` of an input, and of them this rank's part of the
        sequence, if its layout cuts that."""
        path = node.meta["path"]
        dim, name = dim_of(self.batch_dims, path[0]), ".".join(path)
        layout = self.graph.layouts[node.meta["module"]]
        sequence = self.graph.sequence_dims.get(path[0])
        size = self.size
        if self.parts is not None:
            where = self.parts.place(path, node.meta["module"], microbatch, start, stop)
            start, stop, size = where

        def narrow(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            shared = path[0] in self.graph.masks and is_shared(value)
            if dim is not None and value.dim() > dim and not shared:
                rows = rows_per_sample(name, value.shape[dim], max(1, size))
                if (stop - start) * rows != value.shape[dim]:
                    value = value.narrow(dim, start * rows, (stop - start) * rows)
            if path[0] in self.graph.masks and value.shape[1] > 1:
                value = value.chunk(layout.tp, dim=1)[int(layout.coordinates("tp")[self.rank])]
            if sequence is None or value.dim() <= sequence:
                return value
            return cut_sequence(value, sequence, layout, self.rank)

        return mapped(narrow, lookup(self.microbatches[microbatch], path))


def cut_sequence(value: torch.Tensor, dim: int, layout: Layout, rank: int) -> torch.Tensor:
    """The part of the sequence in dim ``dim`` that ``rank`` holds: a view where it is one run."""
    if not axes_of(layout):
        return value
    chunks, parts = cuts(layout)
    size = value.shape[dim] // chunks
    runs = parts[int(part_of(layout)[rank])]
    found = [value.narrow(dim, start * size, (stop - start) * size) for start, stop in runs]
    return found[0] if len(found) == 1 else torch.cat(found, dim)

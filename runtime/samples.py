"""Which samples of a step each rank reads, and how evenly their rows lie on the encoders' slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from colocc.errors import LayoutError
from colocc.passes.graph import Graph
from colocc.passes.solve.balance import loads, units_between
from colocc.runtime.data import Batches
from colocc.runtime.holdings import assigner, deals, holding_of, sample_runs
from colocc.runtime.parts import in_order
from colocc.runtime.rows import Ids, samples_in, units_of

Pairs = list[tuple[int, int]]
"""(microbatch, sample) of each sample."""
RowCounts = Mapping[str, Sequence[Sequence[int]]]
"""Of each module, the rows of each sample of each microbatch."""


def step_samples(
    graph: Graph, chunks: Sequence[range], size: int, rank: int, rows: RowCounts | None
) -> dict[str, Pairs]:
    """For each module, the samples that ``rank`` reads of a step, in order.

    ``chunks`` are the microbatches that are encoded together, ``size`` the samples of each.
    ``rows`` is given where samples are dealt to slots by their rows.
    """
    dp = graph.layouts[graph.sink].dp
    found: dict[str, Pairs] = {}
    for name in graph.layouts:
        counts = _counts(graph, name, rows, chunks[-1].stop, size)
        found[name] = []
        for chunk in chunks:
            if counts is not None:
                pairs = _dealt(graph, name, [counts[index] for index in chunk], rank)
            else:
                runs = sample_runs(holding_of(graph, name), dp, len(chunk), size, rank)
                pairs = [(index, sample) for index, a, b in runs for sample in range(a, b)]
            found[name] += [(chunk.start + index, sample) for index, sample in pairs]
    return found


def _counts(
    graph: Graph, module: str, rows: RowCounts | None, microbatches: int, size: int
) -> list[Ids] | None:
    """The rows of each microbatch's samples; None where samples are not dealt by them."""
    if rows is None or not deals(graph, module):
        return None
    given = [np.asarray(found, dtype=np.int64) for found in rows.get(module, ())]
    if [found.shape for found in given] != [(size,)] * microbatches:
        raise LayoutError(
            f"samples of {module} are dealt to slots by their rows: give rows={{{module!r}: the "
            f"rows of each of {size} samples, for each of {microbatches} microbatches}}, or write "
            "compile(..., balance=False)"
        )
    return given


def _dealt(graph: Graph, module: str, counts: Sequence[Ids], rank: int) -> Pairs:
    dp = graph.layouts[graph.sink].dp
    order = in_order(counts, dp)
    unit = assigner(graph, module)(order)
    places = [np.arange(len(found)) for found in counts]
    micros = [np.full(len(found), index) for index, found in enumerate(counts)]
    mine = samples_in(holding_of(graph, module).units()[rank], unit)
    pairs = np.stack([in_order(micros, dp)[mine], in_order(places, dp)[mine]], axis=1)
    return [(microbatch, sample) for microbatch, sample in pairs.tolist()]


def imbalances(graph: Graph, chunks: Sequence[Batches]) -> dict[str, tuple[float, float]]:
    """For each module that makes rows, the most rows of a slot over the mean: with samples in
    order, and as they are dealt. Slots wait for each other once a chunk."""
    found = {}
    for name in graph.rows:
        units = units_between(graph.layouts[name], graph.layouts[graph.sink])
        most, mean = np.zeros(2), 0.0
        for chunk in chunks:
            rows = chunk.ragged.rows[name]
            before = units_of(rows.samples, rows.replicas, len(units.slot))
            sides = [loads(units, rows.counts, u) for u in (before, rows.units(len(units.slot)))]
            most += [load.max() for load in sides]
            mean += float(sides[0].mean())
        found[name] = (float(most[0] / mean), float(most[1] / mean)) if mean else (1.0, 1.0)
    return found

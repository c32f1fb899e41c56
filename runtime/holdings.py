"""Which samples of a step each rank holds for a module, in the order of the sink's replicas."""

from __future__ import annotations

from functools import lru_cache

from colocc.layout import Layout
from colocc.passes.graph import Graph
from colocc.passes.solve.balance import balanced, units_between
from colocc.passes.solve.boxes import Intervals, distinct
from colocc.passes.solve.plan import Holding
from colocc.passes.solve.solver import holdings
from colocc.runtime.items import Assign
from colocc.runtime.parts import Run
from colocc.runtime.rows import units_of


def holding_of(graph: Graph, module: str) -> Holding:
    """Which units of a step each dp slot of ``module`` holds."""
    sink = (graph.sink, graph.layouts[graph.sink])
    return _holding((module, graph.layouts[module]), sink)


@lru_cache(maxsize=256)
def _holding(module: tuple[str, Layout], sink: tuple[str, Layout]) -> Holding:
    """Asked several times a microbatch, so solved once."""
    found, _, _ = holdings(module, sink, sink, ("sample",))
    return found


def units_held(graph: Graph, module: str) -> tuple[tuple[Intervals, ...], int]:
    """The units of a step that each rank holds of ``module``, and how many there are."""
    sink = (graph.sink, graph.layouts[graph.sink])
    return _units_held((module, graph.layouts[module]), sink)


@lru_cache(maxsize=256)
def _units_held(
    module: tuple[str, Layout], sink: tuple[str, Layout]
) -> tuple[tuple[Intervals, ...], int]:
    holding = _holding(module, sink)
    return holding.units(), units_in(holding)


def units_in(holding: Holding) -> int:
    """The units of a whole step."""
    return sum(stop - start for slot in holding.slots for start, stop in slot)


def sample_runs(holding: Holding, dp: int, microbatches: int, size: int, rank: int) -> list[Run]:
    """The samples of ``rank`` as runs of neighbours, in order.

    ``dp`` is the sink's, ``size`` the samples of one global microbatch. Of the U units of a replica
    of n samples, unit u holds those from floor(u * n / U) on; where they do not divide, some hold
    more than others, or none.
    """
    units = units_in(holding)
    replica_size, part, replica_units = microbatches * size // dp, size // dp, units // dp

    def first_of(unit: int) -> int:
        replica, inside = divmod(unit, replica_units)
        return replica * replica_size + inside * replica_size // replica_units

    runs: list[Run] = []
    for first, last in holding.box(rank)[0]:
        position, stop = first_of(first), first_of(last)
        while position < stop:
            replica, inside = divmod(position, replica_size)
            microbatch, offset = divmod(inside, part)
            count = min(stop - position, part - offset)
            start = replica * part + offset
            if runs and runs[-1][0] == microbatch and runs[-1][2] == start:
                runs[-1] = (microbatch, runs[-1][1], start + count)
            else:
                runs.append((microbatch, start, start + count))
            position += count
    return runs


def deals(graph: Graph, module: str) -> bool:
    """Whether the samples of ``module`` can lie in one slot or another."""
    sink = graph.layouts[graph.sink]
    return module in graph.rows and _has_choice(graph.layouts[module], sink)


@lru_cache(maxsize=256)
def _has_choice(src: Layout, sink: Layout) -> bool:
    units = units_between(src, sink)
    pairs, _ = distinct(units.replica, units.slot)
    return int(pairs.shape[1]) > len(units.block)


def assigner(graph: Graph, module: str) -> Assign:
    """What deals the samples of ``module``, by their rows, to its slots."""
    src, sink = graph.layouts[module], graph.layouts[graph.sink]
    units, count = units_between(src, sink), units_in(holding_of(graph, module))
    return lambda rows: balanced(units, rows, units_of(len(rows), sink.dp, count))

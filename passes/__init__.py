"""The road: a graph in, a graph out. Nothing here touches a process group or a device."""

if __name__ != "colocc.passes":
    raise ImportError(f"import colocc.passes, not {__name__}")

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from colocc.layout import Layout
from colocc.passes.capture import capture
from colocc.passes.capture import find_targets as capture_targets
from colocc.passes.graph import Graph, Reduction, Traits, token_places
from colocc.passes.merge import merge
from colocc.passes.phases import phases
from colocc.passes.propagate import propagate
from colocc.passes.redistribute import redistribute
from colocc.passes.rows import BatchDims, RowsPerItem
from colocc.passes.specialize import specialize
from colocc.passes.verify import verify

Pass = Callable[..., Graph]
Between = Callable[[Graph, str], None]

PIPELINE: tuple[Pass, ...] = (propagate, merge, redistribute, phases)
"""The passes between capture, which makes the graph, and specialize, which cuts out one rank's
part."""


def run(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    *,
    reductions: Mapping[str, Reduction],
    example_inputs: Mapping[str, Any] | None = None,
    traits: Traits | None = None,
    batch_dims: BatchDims | None = None,
    sequence_dims: Mapping[str, int] | None = None,
    ranks_per_node: int | None = None,
    rows: Mapping[str, RowsPerItem] | None = None,
    between: Sequence[Between] = (),
) -> Graph:
    """Return the graph of all ranks. ``between`` is called with it after each pass, once
    verified."""
    sizes = {path: sum(p.numel() for p in m.parameters()) for path, m in model.named_modules()}
    options: dict[Pass, dict[str, Any]] = {
        propagate: {"traits": traits, "weights": sizes},
        merge: {"traits": traits},
        redistribute: {"sequence_dims": sequence_dims, "ranks_per_node": ranks_per_node},
    }
    graph = capture(
        model,
        layouts,
        example_inputs=example_inputs,
        traits=traits,
        batch_dims=batch_dims,
        rows=rows,
    )
    graph.reductions = dict(reductions)
    if traits is not None:
        graph.rows, graph.packing = token_places(traits.rows), traits.packing
        graph.masks = frozenset(name for names in traits.handed.values() for name in names)
    check(graph, "capture", between)
    for step in PIPELINE:
        graph = partial(step, **options.get(step, {}))(graph)
        check(graph, step.__name__, between)
    return graph


def check(graph: Graph, after: str, between: Sequence[Between]) -> None:
    """Verify ``graph`` after a pass, then show it to ``between``."""
    verify(graph, after=after)
    for show in between:
        show(graph, after)


__all__ = [
    "PIPELINE",
    "capture",
    "capture_targets",
    "check",
    "merge",
    "phases",
    "propagate",
    "redistribute",
    "run",
    "specialize",
    "verify",
]

"""Scatters: rows of an encoder written where a mask is true.

``masked_scatter`` and ``x[mask] = y`` take the rows in order, through all samples. On each rank
that is right only if every sample has as many true places as it has rows: then the rows of a rank's
samples go to these samples. The mask is made from inputs, which every rank has whole, so the counts
are checked on the whole batch, sample by sample, by a guard.
"""

from __future__ import annotations

import sympy
from torch import fx

from colocc.passes.graph import Graph, Method, first_type
from colocc.passes.guards import ScatterGuard
from colocc.passes.record import assigned
from colocc.passes.sizes import Number

SAME_PLACES = frozenset(["expand_as", "to", "bool", "contiguous", "clone"])
"""Methods after which a mask is true in the same places, each standing for as many elements."""


def scatter_guard(graph: Graph, node: fx.Node) -> ScatterGuard | None:
    """The guard under which the scatter ``node`` keeps samples apart; None if nothing shows that
    it does."""
    found = scattered(node)
    if found is None or graph.guards is None:
        return None
    whole, mask, rows = found
    elements = [sympy.prod(n.meta["sizes"]) for n in (whole, mask, rows)]
    per_sample = sympy.cancel(elements[2] / graph.guards.batch)
    per_place = sympy.cancel(elements[0] / elements[1])
    return ScatterGuard(mask, per_place, per_sample, node.name, node.meta["line"])


def scattered(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The value that the scatter ``node`` writes to, its mask, made of inputs alone, and the rows,
    in dim 0 of each samples or items; None if it is no such scatter."""
    found = _operands(node)
    if found is None:
        return None
    whole, mask, rows = found
    types = [first_type(n.meta.get("types")) for n in found]
    if any(t is None or t.open or t.batch != 0 for t in types):
        return None
    while mask.op == "call_method" and mask.target in SAME_PLACES and _is_bool(mask.args[0]):
        mask = mask.args[0]  # type: ignore[assignment]
    known = all("sizes" in n.meta for n in (whole, mask, rows))
    return (whole, mask, rows) if known and _from_inputs(mask) else None


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The value that is written to, the mask, and the rows."""
    args = list(node.args)
    for name in ("mask", "source"):
        if name in node.kwargs:
            args.append(node.kwargs[name])
    if node.target is not assigned and node.target not in ("masked_scatter", "masked_scatter_"):
        return None
    if len(args) != 3 or not all(isinstance(arg, fx.Node) for arg in args):
        return None
    if not _is_bool(args[1]):
        return None
    return args[0], args[1], args[2]  # type: ignore[return-value]


def _is_bool(value: object) -> bool:
    found = first_type(value.meta.get("types")) if isinstance(value, fx.Node) else None
    return found is not None and found.dtype == "bool"


def _from_inputs(node: fx.Node) -> bool:
    """Whether a value is made of inputs alone, by glue."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        glue = node.op == "placeholder" or (
            node.op in ("call_function", "call_method") and not isinstance(node.target, Method)
        )
        if not glue or node.meta.get("open"):
            return False
        if not isinstance(node.target, Number):
            todo += node.all_input_nodes
    return True

"""Insert a redistribution on every edge whose reader runs on another layout.

Algorithm:
1. Mark which dim of each value is its sequence, and cut it as the layouts say (sequences.py).
2. For every value and every other module that reads it, solve one plan; readers of one module share
   it.
3. Insert one call of a module that owns the plan after the value, and point the readers at it. Its
   forward and backward are opaque to torch.fx and never removed.
4. Record which samples each module's dp slots hold: the batch is cut by that.

    before    images   = images(x)           bf16[8@dp,576,4096] on images
              language = language(ids, images)
    after     images   = images(x)
            + images_language = redistribute(images)             on language
              language = language(ids, images_language)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.passes.graph import Graph, first_type
from colocc.passes.items import entries
from colocc.passes.sequences import sequences
from colocc.passes.shared import check_shared
from colocc.passes.solve.solver import check_pair, solve
from colocc.sequence import axes_of
from colocc.types import Type

WHOLE = ("sample",)
"""The dims that are cut of a value whose sequence nothing cuts."""
PLACED = ("sample", "position")
"""The dims of rows that have a place in the reader's sequence."""
ROWS = ("sample", "row", "position")
"""The same where the source makes a part of each item's rows."""
PREFIX = "colocc."
"""Targets of inserted calls start with this; no submodule path of a user can."""


def redistribute(
    graph: Graph,
    *,
    sequence_dims: Mapping[str, int] | None = None,
    ranks_per_node: int | None = None,
) -> Graph:
    """Return ``graph`` with every mismatch bridged; a graph without one gets no new node.

    ``sequence_dims`` says which dim of a module's output, or of an input, is the sequence; groups
    that span nodes of ``ranks_per_node`` ranks are crossed once.
    Raises: LayoutError for a pair of layouts that no plan covers, or a value that cannot be moved.
    """
    graph.sequence_dims = dict(sequence_dims or {})
    sequences(graph, graph.sequence_dims)
    sink = (graph.sink, graph.layouts[graph.sink])
    for name, layout in graph.layouts.items():
        if name != graph.sink:
            check_pair((name, layout), sink)
    for node in graph.nodes:
        for module in sorted({user.meta["module"] for user in node.users}):
            if module == node.meta["module"]:
                continue
            if _moves(node):
                _bridge(graph, node, module, ranks_per_node)
            else:
                check_shared(graph, node, module)
    return graph


def _moves(node: fx.Node) -> bool:
    """Whether the value differs between samples, so that ranks hold different parts of it."""
    leaves = pytree.tree_leaves(node.meta["types"])
    return any(isinstance(leaf, Type) and leaf.batch is not None for leaf in leaves)


def _bridge(graph: Graph, node: fx.Node, module: str, ranks_per_node: int | None) -> None:
    source = node.meta["module"]
    src, dst = graph.layouts[source], graph.layouts[module]
    users = [user for user in node.users if user.meta["module"] == module]
    value = node.meta["types"]
    dims = dims_of(graph, node, module)
    rows = "position" in dims
    plan = solve(
        (source, src),
        (module, dst),
        sink=(graph.sink, graph.layouts[graph.sink]),
        dims=dims,
        scale=graph.scale(source, module, whole=is_whole(dims)),
        value=value if isinstance(value, Type) else None,
        ranks_per_node=None if rows else ranks_per_node,
    )
    if not isinstance(value, Type) and (plan.moves or (rows and "items" in node.meta)):
        raise LayoutError(
            f"{users[0].name} on {module} ({dst}) reads {node.name} of {source} ({src}), which "
            "is not one "
            f"tensor. Read its parts one by one, or give {source} and {module} one layout."
        )
    if "items" in node.meta and (rows or plan.moves):
        node.meta["entries"] = entries(graph, node, module)
    if rows:
        node.meta["rows"] = plan
    if not plan.moves:
        return
    assert isinstance(value, Type)
    name = _free_name(graph, f"{node.name}_{module}")
    with graph.fx.inserting_after(node):
        call = graph.fx.create_node("call_module", PREFIX + name, (node,), {}, name=name)
    types = value.on(module, dst, plan.dst.stages)
    call.meta = {"module": module, "types": types, "line": node.meta["line"], "inserted": True}
    for name in ("rows", "entries"):
        if name in node.meta:
            call.meta[name] = node.meta.pop(name)
    if "items" in node.meta:
        call.meta["items"] = node.meta["items"]
    graph.plans[call.name] = plan
    for user in users:
        user.replace_input_with(node, call)


def dims_of(graph: Graph, node: fx.Node, reader: str) -> tuple[str, ...]:
    """The dims of a value that its module and the module ``reader`` may cut: the sequence only
    where it is known and one of them does."""
    source = node.meta["module"]
    made = source in graph.rows and ("items" in node.meta or graph.rows[source].token is not None)
    if made and reader == graph.sink:
        return ROWS if graph.layouts[source].sp else PLACED
    found = node.meta["types"]
    known = isinstance(found, Type) and found.sequence is not None
    cuts = axes_of(graph.layouts[source]) or axes_of(graph.layouts[reader])
    return (*WHOLE, "sequence") if known and cuts else WHOLE


def is_whole(dims: tuple[str, ...]) -> bool:
    """Whether each cp rank of the source makes all of a sample."""
    return not {"sequence", "row"} & set(dims)


def _free_name(graph: Graph, wish: str) -> str:
    taken = {node.name for node in graph.fx.nodes}
    name, count = wish, 1
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    return name


def is_redistribution(node: fx.Node) -> bool:
    """Whether this pass inserted ``node``."""
    return bool(node.meta.get("inserted"))


def value_type(node: fx.Node) -> Type | None:
    """The first tensor type of a node."""
    return first_type(node.meta.get("types"))

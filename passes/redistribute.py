"""Insert a redistribution on every edge whose reader runs on another layout.

Algorithm:
1. For every value and every other module that reads it, solve one plan; readers of one module share
   it.
2. Insert one call of a module that owns the plan after the value, and point the readers at it. Its
   forward and backward are opaque to torch.fx and never removed.
3. Record which samples each module's dp slots hold: the batch is cut by that.

    before    images   = images(x)           bf16[8@dp,576,4096] on images
              language = language(ids, images)
    after     images   = images(x)
            + images_language = redistribute(images)             on language
              language = language(ids, images_language)
"""

from __future__ import annotations

from torch import fx
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.passes.graph import Graph, first_type
from colocc.passes.solve.solver import check_pair, solve
from colocc.types import Type

PREFIX = "colocc."
"""Targets of inserted calls start with this; no submodule path of a user can."""


def redistribute(graph: Graph) -> Graph:
    """Return ``graph`` with every mismatch bridged; a graph without one gets no new node.

    Raises: LayoutError for a pair of layouts that no plan covers, or a value that cannot be moved.
    """
    sink = (graph.sink, graph.layouts[graph.sink])
    for name, layout in graph.layouts.items():
        if name != graph.sink:
            check_pair((name, layout), sink)
    for node in graph.nodes:
        for module in sorted({user.meta["module"] for user in node.users}):
            if module != node.meta["module"] and _moves(node):
                _bridge(graph, node, module)
    return graph


def _moves(node: fx.Node) -> bool:
    """Whether the value differs between samples, so that ranks hold different parts of it."""
    leaves = pytree.tree_leaves(node.meta["types"])
    return any(isinstance(leaf, Type) and leaf.batch is not None for leaf in leaves)


def _bridge(graph: Graph, node: fx.Node, module: str) -> None:
    source = node.meta["module"]
    src, dst = graph.layouts[source], graph.layouts[module]
    scale = graph.scale(source, module)
    users = [user for user in node.users if user.meta["module"] == module]
    if src.same_grid(dst) and scale == 1:
        return
    if not isinstance(node.meta["types"], Type):
        raise LayoutError(
            f"{users[0].name} on {module} ({dst}) reads {node.name} of {source} ({src}), which "
            "is not one "
            f"tensor. Read its parts one by one, or give {source} and {module} one layout."
        )
    if module != graph.sink:
        raise LayoutError(
            f"{module} ({dst}) reads {node.name} of {source} ({src}): between two encoders the "
            f"layouts must be one, only {graph.sink} may differ. Write {module} as {src}."
        )
    plan = solve((source, src), (module, dst), scale=scale)
    if not plan.moves:
        return
    name = _free_name(graph, f"{node.name}_{module}")
    with graph.fx.inserting_after(node):
        call = graph.fx.create_node("call_module", PREFIX + name, (node,), {}, name=name)
    types = node.meta["types"].on(module, dst, plan.dst.stages)
    call.meta = {"module": module, "types": types, "line": node.meta["line"], "inserted": True}
    graph.plans[call.name] = plan
    for user in users:
        user.replace_input_with(node, call)


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

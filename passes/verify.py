"""What must hold of the graph, before the first pass and after every one.

after          must hold
always         fx's own lint; one output; unique names; nothing unread but inputs and
               redistributions
propagate      every node has a module of the layouts, and types that name its layout
merge          rows are put into a sequence that is cut by nothing but the merge in its parts
redistribute   every edge is on one layout, or both layouts place every rank, sample and position
               alike; every plan is proved by walking each rank's cells through it; its gradient
               scale is the modules' ratio
phases         no edge goes back to an earlier phase; a value of the first stage is not read by the
               last
specialize     every redistribution is still there: all ranks issue the same collectives

Each message is a bug report: a graph that fails here was made wrong by colocc, not by the user.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch.utils import _pytree as pytree

from colocc.errors import VerifyError
from colocc.passes.dump import excerpt
from colocc.passes.graph import Graph
from colocc.passes.merge import Merge
from colocc.passes.redistribute import WHOLE, dims_of, is_redistribution, is_whole
from colocc.passes.solve.check import check
from colocc.passes.solve.slots import slots_of
from colocc.sequence import axes_of, same_sequence
from colocc.types import Type

ORDER = ("capture", "propagate", "merge", "redistribute", "phases", "specialize")


def verify(graph: Graph, *, after: str) -> None:
    """Return if ``graph`` keeps the promises of every pass up to ``after``.

    Raises: VerifyError with the lines of the graph around the node, marked ``<-- here``.
    """
    _check_always(graph)
    done = ORDER.index(after) if after in ORDER else -1
    for name, holds in CHECKS:
        if ORDER.index(name) <= done:
            holds(graph)


def _fail(graph: Graph, node: fx.Node | None, problem: str) -> VerifyError:
    lines = excerpt(graph, node) if node is not None else ""
    return VerifyError(
        f"{problem}\n{lines}This is a bug in colocc: please report it with the dump."
    )


def _check_always(graph: Graph) -> None:
    try:
        graph.fx.lint()
    except RuntimeError as error:
        raise _fail(graph, None, f"the graph is malformed: {error}") from error
    names = [node.name for node in graph.fx.nodes]
    if len(names) != len(set(names)):
        raise _fail(graph, None, "two nodes have one name")
    if sum(node.op == "output" for node in graph.fx.nodes) != 1:
        raise _fail(graph, None, "a graph has one output")


def _check_types(graph: Graph) -> None:
    for node in graph.fx.nodes:
        module = node.meta.get("module")
        if module not in graph.layouts:
            raise _fail(graph, node, f"{node.name} runs on {module!r}, which is no layout")
        if "types" not in node.meta:
            raise _fail(graph, node, f"{node.name} has no type")
        if node.op == "output":
            continue
        for leaf in pytree.tree_leaves(node.meta["types"]):
            if isinstance(leaf, Type) and leaf.layout != graph.layouts[module]:
                raise _fail(
                    graph, node, f"{node.name} runs on {module}, its type is on {leaf.module}"
                )


def _check_merge(graph: Graph) -> None:
    if not graph.rows or not axes_of(graph.layouts[graph.sink]):
        return
    for node in graph.fx.nodes:
        sources = [n for n in node.all_input_nodes if n.meta["module"] in graph.rows]
        rows = [n for n in node.all_input_nodes if "rows" in n.meta] or sources
        reads = node.meta["module"] == graph.sink and node.op != "output"
        if rows and reads and not is_redistribution(node) and not isinstance(node.target, Merge):
            raise _fail(graph, node, f"{node.name} reads the rows {rows[0].name} outside a merge")


def _check_edges(graph: Graph) -> None:
    for node in graph.fx.nodes:
        for source in node.all_input_nodes:
            _check_edge(graph, source, node)
        if is_redistribution(node) != (node.name in graph.plans):
            raise _fail(graph, node, f"{node.name} has no plan, or a plan without being inserted")
        if node.name in graph.plans:
            _check_plan(graph, node)
    missing = set(graph.plans) - {node.name for node in graph.fx.nodes}
    if missing:
        raise _fail(graph, None, f"the redistributions {sorted(missing)} were dropped")


def _check_edge(graph: Graph, source: fx.Node, reader: fx.Node) -> None:
    left, right = source.meta["module"], reader.meta["module"]
    leaves = pytree.tree_leaves(source.meta["types"])
    varies = any(isinstance(leaf, Type) and leaf.batch is not None for leaf in leaves)
    if left == right or not varies or is_redistribution(reader):
        return
    src, dst = graph.layouts[left], graph.layouts[right]
    cut = dims_of(graph, source, right) != WHOLE
    sink = graph.layouts[graph.sink]
    alike = (
        src.same_grid(dst)
        and slots_of(src, sink) == slots_of(dst, sink)
        and (same_sequence(src, dst) if cut else dst.cp == 1)
        and graph.scale(left, right, whole=not cut) == 1
    )
    if not alike:
        raise _fail(
            graph,
            reader,
            f"{reader.name} on {right} ({dst}) reads {source.name} as {left} ({src}) holds it",
        )


def _check_plan(graph: Graph, node: fx.Node) -> None:
    plan, source = graph.plans[node.name], node.all_input_nodes[0]
    ends = (source.meta["module"], node.meta["module"])
    if (plan.src.module, plan.dst.module) != ends:
        raise _fail(
            graph, node, f"the plan of {node.name} goes {plan.src.module} -> {plan.dst.module}"
        )
    if (plan.src.layout, plan.dst.layout) != tuple(graph.layouts[name] for name in ends):
        raise _fail(graph, node, f"the plan of {node.name} was solved for other layouts")
    dims = dims_of(graph, source, ends[1])
    if tuple(dim for dim in plan.dims if dim != "slice") != dims:
        raise _fail(
            graph, node, f"the plan of {node.name} cuts {plan.dims}, its value is cut by {dims}"
        )
    types = source.meta["types"]
    try:
        check(
            plan,
            scale=graph.scale(*ends, whole=is_whole(dims)),
            value=types if isinstance(types, Type) else None,
            sink=(graph.sink, graph.layouts[graph.sink]),
        )
    except VerifyError as error:
        raise _fail(graph, node, str(error)) from error


def _check_phases(graph: Graph) -> None:
    place = {"encode": 0, "language": 1}
    stages = {"first": 0, "all": 1, "last": 2}
    for node in graph.fx.nodes:
        if node.meta.get("phase") not in place or node.meta.get("stage") not in stages:
            raise _fail(graph, node, f"{node.name} has no phase or no stage")
        for source in node.all_input_nodes:
            if place[source.meta["phase"]] > place[node.meta["phase"]]:
                raise _fail(graph, node, f"{node.name} (encode) reads {source.name} (language)")
            if node.op == "output" or graph.module_of(node) == graph.sink:
                continue
            if source.meta["stage"] == "first" and node.meta["stage"] == "last":
                raise _fail(
                    graph, node, f"{node.name} (last stage) reads {source.name} (first stage)"
                )


CHECKS: tuple[tuple[str, Callable[[Graph], None]], ...] = (
    ("propagate", _check_types),
    ("merge", _check_merge),
    ("redistribute", _check_edges),
    ("phases", _check_phases),
)

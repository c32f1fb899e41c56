"""Give every value a layout and a type.

Algorithm:
1. A module runs on its own layout. Glue runs on the layout of its arguments; where these differ, or
   a known method says so, on the layout of the module that reads it next.
2. An input, and glue made from inputs alone, is copied for each layout that reads it: every rank
   can cut it from the batch, so nothing needs to move.
3. Types come from the example at two batch sizes (shapes.py).
4. Glue must keep samples apart (batch.py): on each rank it sees only some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from colocc.errors import CaptureError
from colocc.passes.batch import check_glue
from colocc.passes.capture import Method
from colocc.passes.graph import Graph, Traits
from colocc.passes.shapes import infer_types


def propagate(
    graph: Graph,
    *,
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    traits: Traits | None = None,
    batch_dims: Mapping[str, int] | None = None,
) -> Graph:
    """Return ``graph`` with ``module`` and ``types`` on every node.

    Raises: CaptureError for a module that the forward never calls, glue that mixes samples, or glue
    without ``example_inputs``.
    """
    traits = traits or Traits()
    graph.sink = find_sink(graph)
    _place(graph, traits)
    _copy_free(graph)
    _check_examples(graph, example_inputs)
    infer_types(graph, model, example_inputs, traits, batch_dims or {})
    if example_inputs is not None:
        check_glue(graph)
    return graph


def find_sink(graph: Graph) -> str:
    """The module that no other module reads: the last one called among those, pipelined ones
    first."""
    calls = [(graph.module_of(node), node) for node in graph.fx.nodes if graph.module_of(node)]
    called = {name for name, _ in calls}
    for name in graph.layouts:
        if name not in called:
            raise CaptureError(
                f"layouts names {name!r} ({graph.targets[name]}), but {graph.name}.forward never "
                "calls it. Remove it from layouts, or call it."
            )
    feeding: set[str | None] = set()
    for caller, node in calls:
        feeding |= {graph.module_of(n) for n in _ancestors(node)} - {None, caller}
    last = [caller for caller, _ in calls if caller is not None and caller not in feeding]
    if not last:
        raise CaptureError(
            f"{graph.name}.forward calls its modules in a circle: {sorted(feeding, key=str)}"
        )
    return max(last, key=lambda name: (graph.layouts[name].pp, last.index(name)))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        source = todo.pop()
        if source not in seen:
            seen.add(source)
            todo += source.all_input_nodes
    return seen


def _place(graph: Graph, traits: Traits) -> None:
    readers = _next_modules(graph)
    forced = {glue.method: glue.module for glue in traits.glue}
    for node in graph.fx.nodes:
        own = graph.module_of(node)
        if isinstance(node.target, Method):
            own = forced[node.target.name]
        if node.op == "output":
            own = graph.sink
        if own is None:
            sources = {n.meta["module"] for n in node.all_input_nodes} - {None}
            if len(sources) == 1:
                own = sources.pop()
            elif sources:
                own = readers[node]
        node.meta["module"] = own


def _next_modules(graph: Graph) -> dict[fx.Node, str]:
    """The module that reads each value next, through glue; the sink if none or several do."""
    following: dict[fx.Node, set[str]] = {}
    for node in reversed(graph.fx.nodes):
        found: set[str] = set()
        for user in node.users:
            name = graph.module_of(user)
            found |= {name} if name is not None else following[user]
        following[node] = found
    return {n: next(iter(f)) if len(f) == 1 else graph.sink for n, f in following.items()}


def _copy_free(graph: Graph) -> None:
    """Give each input, and glue made from inputs alone, to every layout that reads it."""
    for node in reversed(graph.nodes):
        if node.meta["module"] is not None:
            continue
        modules = sorted({user.meta["module"] for user in node.users} or {graph.sink})
        # The sink keeps the plain name.
        modules.sort(key=lambda name: name != graph.sink)
        node.meta["module"] = modules[0]
        for module in modules[1:]:
            with graph.fx.inserting_after(node):
                copy = graph.fx.create_node(
                    node.op, node.target, node.args, node.kwargs, name=f"{node.name}_{module}"
                )
            copy.meta = {**node.meta, "module": module}
            for user in [user for user in node.users if user.meta["module"] == module]:
                user.replace_input_with(node, copy)


def _check_examples(graph: Graph, example_inputs: Mapping[str, Any] | None) -> None:
    if example_inputs is not None:
        return
    for node in graph.fx.nodes:
        known = node.op in ("placeholder", "output") or graph.module_of(node) is not None
        if not known and not isinstance(node.target, Method) and not _is_item(node):
            raise CaptureError(
                f"{graph.name} computes {node.name} between its modules ({node.meta['line']}): "
                "whether that keeps samples apart depends on shapes. Give compile() one batch as "
                "example_inputs=."
            )


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"

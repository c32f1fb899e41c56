"""Give every value a layout and a type.

Algorithm:
1. A module runs on its own layout. Glue runs on the layout of its arguments; where these differ, or
   a known method says so, on the layout of the module that reads it next.
2. An input, and glue made from inputs alone, is copied for each layout that reads it: every rank
   can cut it from the batch, so nothing needs to move.
3. A projector or a head on the language module's grid runs with it: nothing moves between them.
4. Glue must keep samples apart (batch.py): on each rank it sees only some of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from colocc.errors import CaptureError
from colocc.passes.batch import check_glue
from colocc.passes.graph import Graph, Method, Traits
from colocc.passes.items import place_items
from colocc.passes.prune import prune
from colocc.passes.shapes import infer_types
from colocc.passes.structure import Rebuilt
from colocc.sequence import same_sequence


def propagate(
    graph: Graph,
    *,
    traits: Traits | None = None,
    weights: Mapping[str, int] | None = None,
) -> Graph:
    """Return ``graph`` with ``module`` and ``types`` on every node.

    ``weights`` is the number of parameters by submodule path. Raises: CaptureError for a module
    that the forward never calls, glue that mixes samples, or glue of a graph without an example.
    """
    traits = traits or Traits()
    graph.sink = find_sink(graph, weights or {})
    _place(graph, traits)
    _keep_home(graph)
    _copy_free(graph)
    known = graph.guards is not None
    if not known:
        _check_examples(graph)
    infer_types(graph)
    if known:
        place_items(graph)
        check_glue(graph)
    return graph


def find_sink(graph: Graph, weights: Mapping[str, int]) -> str:
    """The module that no other module reads: the last one called among those, pipelined ones
    first.

    Modules on its grid that read other modules (a projector, a language model with its head after
    it) run with it as one place: then the largest of them is the sink, the others' home.
    """
    calls = [(graph.owner_of(node), node) for node in graph.fx.nodes if graph.owner_of(node)]
    called = {caller for caller, _ in calls}
    for name in graph.layouts:
        if name not in called:
            raise CaptureError(
                f"layouts names {name!r} ({graph.targets[name]}), but {graph.name}.forward never "
                "calls it. Remove it from layouts, or call it."
            )
    reads = {name: set[str]() for name in graph.layouts}
    for caller, node in calls:
        found = {graph.owner_of(n) for n in _ancestors(node)} - {None, caller}
        reads[str(caller)] |= {str(name) for name in found}
    feeding = {name for names in reads.values() for name in names}
    last = [caller for caller, _ in calls if caller is not None and caller not in feeding]
    if not last:
        raise CaptureError(f"{graph.name}.forward calls its modules in a circle: {sorted(feeding)}")
    final = max(last, key=lambda name: (graph.layouts[name].pp, last.index(name)))
    alike = [final]
    if graph.layouts[final].pp == 1:
        alike += [n for n in reads if n != final and reads[n] and _one_place(graph, n, final)]
    sink = max(alike, key=lambda name: (weights.get(graph.targets[name], 0), name == final))
    graph.homes = dict.fromkeys(alike, sink)
    return sink


def _one_place(graph: Graph, name: str, sink: str) -> bool:
    """Whether nothing must be moved or scaled between two modules."""
    left, right = graph.layouts[name], graph.layouts[sink]
    same = left.same_grid(right) and same_sequence(left, right)
    return same and graph.scale(name, sink) == 1


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
        owner = graph.owner_of(node)
        own = graph.home(owner) if owner is not None else None
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
            name = graph.owner_of(user)
            found |= {graph.home(name)} if name is not None else following[user]
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


def _keep_home(graph: Graph) -> None:
    """Leave out of a dataclass that is returned what stays on an encoder's layout.

    Such fields are by-products (Hugging Face's ``image_hidden_states``): moving them each step
    would cost as much as the embeddings. What is returned by itself, or in a tuple or dict, is
    moved.
    """
    output = graph.output()
    for node in output.all_input_nodes:
        if not isinstance(node.target, Rebuilt) or not node.target.is_record:
            continue
        kept = [arg for arg in node.args if _module(arg) in (None, graph.sink)]
        away = sorted({str(_module(arg)) for arg in node.args if arg not in kept})
        if away:
            graph.notes.append(
                f"what {' and '.join(away)} made is None in the {node.target.__name__}: return it "
                "in a tuple or a dict to have it moved each step"
            )
        node.args = tuple(arg if arg in kept else None for arg in node.args)
        node.meta["module"] = graph.sink
    prune(graph.fx)


def _module(value: object) -> str | None:
    return value.meta["module"] if isinstance(value, fx.Node) else None


def _check_examples(graph: Graph) -> None:
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

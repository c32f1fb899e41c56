"""Label every node with the phase that runs it, and the pipeline stages that do.

    encode     encoders, their glue and the redistributions: the whole step's samples at once
    language   everything on the sink's layout: microbatch by microbatch, pipelined where pp > 1

The values that cross from encode to language are the cut: there the autograd graph is detached,
each microbatch gets its own leaf, and the encoders' backward starts from the gradients of these
leaves.

In the pipeline, what the sink's call is made from runs on the first stage, what is made from it on
the last; inputs are everywhere.
"""

from __future__ import annotations

import operator

from torch import fx

from colocc.errors import CaptureError
from colocc.passes.graph import Graph, Method, depends
from colocc.passes.redistribute import is_redistribution


def phases(graph: Graph) -> Graph:
    """Return ``graph`` with ``phase`` and ``stage`` on every node.

    Raises: CaptureError if an encoder reads the sink, or a pipelined sink is called more than once.
    """
    made_from = depends(graph)
    calls = [node for node in graph.fx.nodes if graph.module_of(node) == graph.sink]
    if len(calls) > 1 and graph.layouts[graph.sink].pp > 1:
        raise CaptureError(
            f"{graph.name}.forward calls {graph.sink} {len(calls)} times "
            f"({', '.join(call.meta['line'] for call in calls)}): with pp > 1 it can be called once"
        )
    for node in graph.fx.nodes:
        encodes = node.meta["module"] != graph.sink or is_redistribution(node)
        node.meta["phase"] = "encode" if encodes and node.op != "output" else "language"
        node.meta["stage"] = _stage(graph, node, calls, made_from)
    for node in graph.fx.nodes:
        crosses = any(user.meta["phase"] == "language" for user in node.users)
        node.meta["cut"] = node.meta["phase"] == "encode" and crosses
        late = [n for n in node.all_input_nodes if n.meta["phase"] == "language"]
        if node.meta["phase"] == "encode" and late:
            raise CaptureError(
                f"{node.meta['line'] or node.name}: {node.name} of {node.meta['module']} reads "
                f"{late[0].name} of {graph.sink}: encoders run before {graph.sink}"
            )
    return graph


def _stage(
    graph: Graph,
    node: fx.Node,
    calls: list[fx.Node],
    made_from: dict[fx.Node, set[fx.Node]],
) -> str:
    if graph.layouts[graph.sink].pp == 1 or node.op == "placeholder" or node in calls:
        return "all"
    if node.meta["phase"] == "encode":
        return "all"
    if any(call in made_from[node] for call in calls):
        return "last"
    if isinstance(node.target, Method):
        return node.target.stage
    # The parts of what every stage computes are everywhere, too.
    parts = node.target is operator.getitem and all(
        n.op != "placeholder" and n.meta["stage"] == "all" for n in node.all_input_nodes
    )
    return "all" if parts else "first"


def cut(graph: Graph) -> list[fx.Node]:
    """The values that cross from encode to language, in graph order.

    They are marked once, on the graph of all ranks: a later stage reads none of them, and yet takes
    part in returning their gradients.
    """
    return [node for node in graph.fx.nodes if node.meta.get("cut")]

"""Keep what one rank runs: drop the nodes of pipeline stages that it is not on.

A later stage gets its hidden states from the stage before it, so what only the first stage computes
(the text embedding, the merge of embeddings) is None there; a stage before the last hands on what
the sink returns. Redistributions stay on every rank: they are collective.
"""

from __future__ import annotations

import copy

from torch import fx

from colocc.passes.graph import Graph


def specialize(graph: Graph, *, rank: int) -> Graph:
    """Return the graph of ``rank``; ``graph`` itself is left as it is."""
    layout = graph.layouts[graph.sink]
    stage = int(layout.coordinates("pp")[rank])
    runs = _runs(stage, layout.pp)
    mine = copy.copy(graph)
    mine.fx = fx.Graph()
    made: dict[fx.Node, fx.Node | None] = {}
    for node in graph.fx.nodes:
        if node.op == "output" and "last" not in runs:
            call = next(n for n in graph.nodes if graph.module_of(n) == graph.sink)
            new = mine.fx.output(made[call])
            new.meta = dict(node.meta)
        elif node.op == "output" or node.meta["stage"] in runs:
            new = mine.fx.node_copy(node, lambda source: made[source])
            new.meta = dict(node.meta)
            _keep_name(new, node.name)
            made[node] = new
        else:
            made[node] = None
    _drop_unread(mine)
    return mine


def _runs(stage: int, stages: int) -> set[str]:
    names = {"all"}
    if stage == 0:
        names.add("first")
    if stage == stages - 1:
        names.add("last")
    return names


def _keep_name(node: fx.Node, name: str) -> None:
    if node.name != name:
        node._rename(name)


def _drop_unread(graph: Graph) -> None:
    """Inputs that this stage no longer reads need not be loaded by it."""
    for node in reversed(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.fx.erase_node(node)

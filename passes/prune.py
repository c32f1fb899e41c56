"""Drop what nothing reads: but for opaque calls, a node of a recording has no side effects."""

from __future__ import annotations

from torch import fx


def prune(graph: fx.Graph) -> None:
    """Erase unread glue, unread parts of results and unread inputs.

    What the forward takes and never reads is no input: a batch that has it is refused. A module of
    the layouts and a leaf stay, because what they do inside is their own affair.
    """
    for node in reversed(graph.nodes):
        opaque = node.op == "call_module" or hasattr(node.target, "colocc_leaf")
        if not node.users and node.op != "output" and not opaque:
            graph.erase_node(node)

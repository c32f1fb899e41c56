"""Hand an input of the forward to a module that its caller gives None.

Megatron's colocated MimoModel takes an attention_mask and gives its language model None; the
forward of its other modes hands it on, and so does the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx


def hand_on(
    graph: fx.Graph, targets: Mapping[str, str], handed: Mapping[str, tuple[str, ...]]
) -> None:
    """Let every call of a module of ``handed`` read the inputs of these names, where it is given
    None for them. Unread inputs are still in ``graph``."""
    inputs = {node.meta["path"]: node for node in graph.nodes if node.op == "placeholder"}
    for module, names in handed.items():
        for node in graph.nodes:
            if node.op != "call_module" or node.target != targets.get(module):
                continue
            for name in names:
                if name in node.kwargs and node.kwargs[name] is None and (name,) in inputs:
                    node.update_kwarg(name, inputs[(name,)])

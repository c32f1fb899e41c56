"""Merge the embeddings of text and of other modalities in the reader's part of the sequence.

Where the sink's layout cuts the sequence (cp, sp), a model that merges first and cuts afterwards
holds on every rank what only its part is read of. The merge is pushed through the cut:

    before    text     = text(input_ids)                    whole sequence
              merged   = merged({images, text}, input_ids)  whole sequence
              sharded  = sharded(merged, labels, ...)       this rank's part
    after   + merge    = merge(input_ids, {images})         this rank's part
              sharded  = sharded(None, labels, ...)         labels and masks as before

``merge`` embeds the text of the part and puts in the rows whose positions are in it, so that no
more than these rows need to come here.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from colocc.errors import CaptureError
from colocc.passes.graph import Graph, Method, Traits, first_type
from colocc.sequence import axes_of


class Merge:
    """The merge in this rank's part of the sequence, as the target of a node; the program binds it
    to the model. Its arguments: input_ids, position_ids, and the rows by module."""

    __name__ = "merge"

    def __repr__(self) -> str:
        return "merge"

    def __call__(self, *args: Any) -> Any:
        raise CaptureError(f"{self!r} is bound to a model by the program that runs the graph")


def merge(graph: Graph, *, traits: Traits | None = None) -> Graph:
    """Return ``graph`` with its merge in the shard; as it is where no sequence is cut.

    Raises: CaptureError for a forward that does not cut what it merged.
    """
    merging = traits.merging if traits is not None else None
    if merging is None or not axes_of(graph.layouts[graph.sink]):
        return graph
    sharded = _call(graph, merging.sharded)
    merged = _call(graph, merging.merged)
    text = _call(graph, merging.text)
    whole = [node for node in sharded.users if _item(node) == 0]
    if sharded.kwargs.get("embeddings") is not merged or set(merged.users) != {sharded}:
        raise CaptureError(
            f"{graph.name} reads {merged.name} ({merged.meta['line']}) elsewhere than in "
            f"{merging.sharded}: no rank of {graph.sink} has the embeddings of the whole sequence "
            f"({graph.layouts[graph.sink]}). Read them behind the cut, or leave out cp and sp."
        )
    given = merged.kwargs["modality_embeddings"]
    assert isinstance(given, dict)
    rows = {name: value for name, value in given.items() if value is not text}
    with graph.fx.inserting_before(sharded):
        arguments = (text.kwargs["input_ids"], text.kwargs.get("position_ids"), rows)
        node = graph.fx.create_node("call_function", Merge(), arguments, {}, name="merge")
    types = whole[0].meta["types"] if whole else merged.meta["types"]
    node.meta = {
        "module": graph.sink,
        "types": _in_part(types),
        "line": merged.meta["line"],
        "added": True,
    }
    for item in whole:
        item.replace_all_uses_with(node)
        graph.fx.erase_node(item)
    sharded.update_kwarg("embeddings", None)
    for spent in (merged, text):
        graph.fx.erase_node(spent)
    return graph


def _call(graph: Graph, method: str) -> fx.Node:
    """The one call of a method of the model."""
    found: list[fx.Node] = [
        node
        for node in graph.fx.nodes
        if isinstance(node.target, Method) and node.target.name == method
    ]
    if len(found) != 1:
        raise CaptureError(
            f"{graph.name}.forward calls {method} {len(found)} times: with cp or sp on "
            f"{graph.sink} ({graph.layouts[graph.sink]}) it is called once"
        )
    return found[0]


def _item(node: fx.Node) -> Any:
    return node.args[1] if node.target is operator.getitem else None


def _in_part(types: Any) -> Any:
    """The type of the embeddings [sequence, sample, hidden] with their sequence cut."""
    found = first_type(types)
    return types if found is None or found.open else found.cut(0, "merge")

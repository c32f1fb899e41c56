"""Which dim of each value holds the sequence, which layouts cut over cp, and over tp with sp.

The user names the dim for modules, whose output it is, and for inputs. Glue that works element by
element keeps it; other glue on such a value is refused where a layout cuts the sequence, because a
rank would see only a part of what it mixes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError
from colocc.passes.batch import LAST_DIM, NORMS, POINTWISE
from colocc.passes.graph import Graph, depends, first_type
from colocc.passes.sizes import Number
from colocc.sequence import axes_of
from colocc.types import Type


def sequences(graph: Graph, sequence_dims: Mapping[str, int]) -> None:
    """Set ``sequence`` of the types of every value that has one, and cut it as its layout says.

    ``sequence_dims`` gives the dim by module or input. Values that the sink makes keep what the
    user says of them alone.
    Raises: LayoutError for a dim that is not there or cannot be cut; CaptureError for glue that may
    mix positions.
    """
    if not sequence_dims:
        return
    cuts = any(axes_of(layout) for layout in graph.layouts.values())
    made_from = depends(graph)
    late = {n for n in made_from if any(graph.module_of(s) == graph.sink for s in made_from[n])}
    for node in graph.fx.nodes:
        if node.op == "output":
            continue
        name = taken_from(graph, node)
        if node.op == "placeholder":
            name = node.meta["path"][0]
        if name is not None:
            if name in sequence_dims:
                _set(node, sequence_dims[name], name)
            continue
        # Nothing is said of what a part of a module makes.
        if node in late or graph.owner_of(node) is not None:
            continue
        if isinstance(node.target, Number) and not late.issuperset(node.users):
            _check_number(node, node.target)
        if not any(_sequence(source) is not None for source in node.all_input_nodes):
            continue
        found = _through(node)
        if found is not None:
            _set(node, found, node.name)
        elif cuts and first_type(node.meta["types"]) is not None:
            raise CaptureError(
                f"{node.meta['line'] or node.name}: {_name(node)} on a value whose sequence is cut "
                "may mix positions: each rank sees only some of them. Move it into a module that "
                "the layouts name, and give sequence_dims the dim of its output."
            )


def _check_number(node: fx.Node, number: Number) -> None:
    """Raise CaptureError for a size made from the length of an input that a rank sees a part of."""
    for place, origin in number.origins.values():
        source = node.args[place]
        assert isinstance(source, fx.Node)
        found = first_type(source.meta["types"])
        if found is not None and found.sequence == origin.dim and axes_of(found.layout):
            raise CaptureError(
                f"{node.meta['line'] or node.name}: it reads the length of {source.name}, whose "
                f"sequence {found.module} ({found.layout}) cuts: each rank sees only a part. Move "
                "it into a module that the layouts name."
            )


def taken_from(graph: Graph, node: fx.Node) -> str | None:
    """The module that makes a value, or the several tensors that it is one of."""
    while node.target in (operator.getitem, getattr):
        (source,) = node.all_input_nodes[:1]
        if isinstance(source.meta["types"], Type):
            return None
        node = source
    return graph.module_of(node)


def _sequence(node: fx.Node) -> int | None:
    found = first_type(node.meta.get("types"))
    return None if found is None else found.sequence


def _set(node: fx.Node, dim: int, name: str) -> None:
    what = f"{name} ({node.meta['line']})" if node.meta.get("line") else name

    def cut(leaf: Any) -> Any:
        # Of an input, tensors without such a dim are the same for every position.
        small = isinstance(leaf, Type) and node.op == "placeholder" and dim >= len(leaf.dims)
        return leaf.cut(dim, what) if isinstance(leaf, Type) and not small else leaf

    node.meta["types"] = pytree.tree_map(
        cut, node.meta["types"], is_leaf=lambda leaf: isinstance(leaf, Type)
    )


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.meta["kind"]).lower()
    return str(getattr(node.target, "__name__", node.target)).lower().strip("_")


def _through(node: fx.Node) -> int | None:
    """The dim that holds the sequence after glue, None where that cannot be told."""
    out, name = first_type(node.meta["types"]), _name(node)
    types = [first_type(source.meta.get("types")) for source in node.all_input_nodes]
    known = [t for t in types if t is not None and t.sequence is not None]
    if out is None or out.open or any(t.open for t in known):
        return None
    places = {len(t.dims) - t.sequence for t in known if t.sequence is not None}
    first = known[0]
    assert first.sequence is not None
    if name == "unsqueeze":
        dim = _argument(node, 1)
        at = dim % len(out.dims) if isinstance(dim, int) else None
        return None if at is None else first.sequence + (at <= first.sequence)
    if name == "embedding":
        return first.sequence
    if name in LAST_DIM or name in NORMS:
        keeps = first.sequence < len(first.dims) - _normalized(node, name)
        return first.sequence if keeps and len(out.dims) >= len(first.dims) else None
    if name not in POINTWISE or len(places) != 1:
        return None
    place = places.pop()
    # A tensor that is long where the others have their sequence was not cut with them.
    whole = [t for t in types if t is not None and t.sequence is None and len(t.dims) >= place]
    if any(t.dims[len(t.dims) - place].size != 1 for t in whole) or len(out.dims) < place:
        return None
    return len(out.dims) - place


def _normalized(node: fx.Node, name: str) -> int:
    """How many of the last dims are read at once."""
    if name not in NORMS or node.op == "call_module":
        return 1
    shape = node.kwargs.get("normalized_shape", _argument(node, 1))
    return len(shape) if isinstance(shape, (list, tuple)) else 1


def _argument(node: fx.Node, index: int) -> Any:
    found = node.kwargs.get("dim", node.kwargs.get("axis"))
    return found if found is not None or len(node.args) <= index else node.args[index]

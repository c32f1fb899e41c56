"""Items: inputs of a recorded model of which a sample has any number, such as images.

The example is recorded with one item for each sample, all alike; their number is a size of its own.
Every value that grows with it holds items, and glue treats it as any value that is split by sample.
Nothing may mix the two but the scatter that puts an encoder's rows where placeholders are: that
tells how many rows, and so how many items, a sample has. A module then makes as many entries for
each item as it did for the example's, or, where ``compile(rows=)`` says how many rows each item
makes, for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError, LayoutError
from colocc.passes.graph import Entries, Graph, Places, first_type
from colocc.passes.rows import BatchDims, RowsPerItem, items_of
from colocc.passes.scatter import scattered
from colocc.passes.shapes import tensors_of
from colocc.passes.sizes import Number, evaluated
from colocc.passes.solve.boxes import Counts
from colocc.passes.structure import Rebuilt
from colocc.sequence import axes_of
from colocc.types import Type

REMEDY = (
    "Items reach samples only where masked_scatter, or x[mask] = y, puts their rows at the "
    "placeholders of inputs."
)


# ---------------------------------------------------------------- the example


def rows_stated(name: str, given: Any, rows_per_item: RowsPerItem) -> Counts:
    """What the user's function says of the rows of each item of module ``name``."""
    said = [] if given is None else rows_per_item(given)
    try:
        found = torch.as_tensor(said).detach()
        numbers = found.cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(said).__name__
        if isinstance(said, torch.Tensor):
            kind = f"tensor on {said.device.type}"
        raise LayoutError(
            f"rows of {name} returned a {kind}: give a list or a tensor of the rows of each item"
        ) from error
    whole = not found.is_complex() and found.dtype != torch.bool
    if not whole or not bool((numbers == numbers.round()).all()):
        kind = str(found.dtype).removeprefix("torch.")
        raise LayoutError(
            f"rows of {name} returned {kind} {numbers.ravel()[:4].tolist()}: give the rows of each "
            "item, which are integers"
        )
    return numbers.numpy().astype(np.int64).ravel()


def entries_of_items(length: int, rows: Counts, first: int, last: int) -> tuple[int, int]:
    """Where in dim 0, of ``length``, the items ``first`` to ``last`` stand: it holds one entry for
    each item, or equally many for each of their ``rows``."""
    if length == len(rows):
        return first, last
    before = np.concatenate([[0], np.cumsum(rows)])
    per_row = length // int(before[-1])
    return int(before[first]) * per_row, int(before[last]) * per_row


def one_item_each(
    example_inputs: Mapping[str, Any],
    batch_dims: BatchDims,
    rows: Mapping[str, RowsPerItem],
    samples: int,
) -> tuple[dict[str, Any], dict[str, Places]]:
    """The example with one item for each of its samples, all alike; and what holds items, by what
    the user calls their module.

    Raises: CaptureError for an example without an item, or whose items cannot be told apart.
    """
    found = _plain(example_inputs)
    streams: dict[str, Places] = {}
    for name in batch_dims:
        stream = items_of(batch_dims, name)
        if stream is not None and stream not in streams:
            names = tuple(
                n
                for n in batch_dims
                if items_of(batch_dims, n) == stream and example_inputs.get(n) is not None
            )
            streams[stream] = Places(stream, (), names, stated=stream in rows)
    for stream, places in streams.items():
        given = places.given(found)
        item = _one_item(stream, given, rows.get(stream))
        alike = pytree.tree_map(
            lambda leaf: leaf.repeat(samples, *[1] * (leaf.dim() - 1)) if _holds(leaf) else leaf,
            item,
        )
        found.update(alike)
        whole = not any(leaf.is_meta for leaf in pytree.tree_leaves(item) if _holds(leaf))
        streams[stream] = replace(places, template=item if whole else None)
    return found, streams


def _plain(value: Any) -> Any:
    """``value`` with every mapping in it a dict."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _holds(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _one_item(stream: str, given: Any, rows_per_item: RowsPerItem | None) -> Any:
    """The inputs of that item of the example that makes most rows."""
    tensors = [(".".join(path), leaf) for path, leaf in tensors_of(given or {}) if _holds(leaf)]
    if not tensors or any(len(leaf) == 0 for _, leaf in tensors):
        raise CaptureError(
            f"example_inputs has no item of {stream}: the forward is recorded with one. Give a "
            "batch with at least one as the example; those of the steps may have none."
        )
    if rows_per_item is None:
        sizes = {len(leaf): name for name, leaf in tensors}
        if len(sizes) > 1:
            (one, first), (two, second) = list(sizes.items())[:2]
            raise CaptureError(
                f"example_inputs has {one} items in {first} and {two} in {second}: dim 0 of both "
                f"counts the items of {stream}. If items make different numbers of rows, say how "
                f"many: compile(..., rows={{{stream!r}: function of these inputs}})"
            )
        rows, index = np.ones(len(tensors[0][1]), dtype=np.int64), 0
    else:
        if any(leaf.is_meta for _, leaf in tensors):
            raise CaptureError(
                f"example_inputs: rows of {stream} cannot be asked about tensors on meta. Give an "
                "example with data."
            )
        rows = rows_stated(stream, given, rows_per_item)
        index = int(rows.argmax())
        check_entries(stream, "example_inputs", tensors, rows)

    def cut(leaf: Any) -> Any:
        if not _holds(leaf):
            return leaf
        start, stop = entries_of_items(len(leaf), rows, index, index + 1)
        return leaf.detach()[start:stop].clone()

    return pytree.tree_map(cut, given)


def check_entries(
    name: str, where: str, tensors: list[tuple[str, torch.Tensor]], rows: Counts
) -> None:
    """Raise LayoutError for a tensor that has entries neither for each item nor for each row."""
    total = int(rows.sum())
    for path, tensor in tensors:
        size = tensor.shape[0] if tensor.dim() else len(rows)
        if size != len(rows) and (total == 0 or size % total):
            raise LayoutError(
                f"{path} of {where} has {size} entries in dim 0: neither one for each of the "
                f"{len(rows)} items of {name} nor equally many for each of their {total} rows"
            )


# ---------------------------------------------------------------- the graph


def place_items(graph: Graph) -> None:
    """Set ``rows`` of a recorded graph whose inputs hold items.

    Raises: CaptureError, with the user's line, where items are mixed with samples.
    """
    if not graph.items:
        return
    found: dict[str, tuple[fx.Node, fx.Node, sympy.Expr]] = {}
    for node in graph.fx.nodes:
        kinds = _kinds(node)
        if len(kinds) < 2 or isinstance(node.target, (Number, Rebuilt)) or node.op == "output":
            continue
        stream = next(kind for kind in kinds if kind is not None)
        place = _place(graph, node, stream) if len(kinds) == 2 and None in kinds else None
        if place is None:
            shown = " with ".join(
                "samples" if kind is None else f"items of {kind}" for kind in sorted(kinds, key=str)
            )
            raise CaptureError(
                f"{node.meta['line'] or node.name}: {_called(node)} mixes {shown}: which belong to "
                f"which is not known there. {REMEDY}"
            )
        mask, each = place
        if stream in found and found[stream][1] is not mask:
            raise CaptureError(
                f"{node.meta['line']}: rows of the items of {stream} are put at other places than "
                f"at {found[stream][0].meta['line']}. Inputs that name one module in Items() hold "
                "one kind of item."
            )
        found.setdefault(stream, (node, mask, each))
    for stream, places in graph.items.items():
        _register(graph, places, found.get(stream))


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _kinds(node: fx.Node) -> set[str | None]:
    """What the values that a node reads hold: items, by the name of their module, or samples."""
    reads = [source for source in node.all_input_nodes if _splits(source)]
    return {source.meta.get("items") for source in reads}


def _splits(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("types"))
    return any(isinstance(leaf, Type) and leaf.batch is not None for leaf in leaves)


def _place(graph: Graph, node: fx.Node, stream: str) -> tuple[fx.Node, sympy.Expr] | None:
    """The mask of a scatter of items of ``stream`` into samples, and how many of its places the
    rows of one item fill; None if it is no such scatter."""
    operands = scattered(node)
    if operands is None or graph.guards is None or node.meta["module"] != graph.sink:
        return None
    if [n.meta.get("items") for n in operands] != [None, None, stream]:
        return None
    elements = [sympy.prod(n.meta["sizes"]) for n in operands]
    per_item = sympy.cancel(elements[2] / graph.guards.items[stream])
    per_place = sympy.cancel(elements[0] / elements[1])
    each = sympy.cancel(per_item / per_place)
    mixed = {graph.guards.batch, *graph.guards.items.values()} & each.free_symbols
    return None if mixed or not _at_example(graph, each).is_Integer else (operands[1], each)


def _at_example(graph: Graph, expr: sympy.Expr) -> sympy.Expr:
    assert graph.guards is not None
    return expr.xreplace({s: sympy.Integer(n) for s, n in graph.guards.hints.items()})


def _register(
    graph: Graph, places: Places, found: tuple[fx.Node, fx.Node, sympy.Expr] | None
) -> None:
    """Say of every module that encodes the items where its rows belong."""
    stream = places.items
    held = [n for n in graph.fx.nodes if n.meta.get("items") == stream and n.op != "output"]
    modules = [n for n in graph.layouts if n != graph.sink and _makes(held, n)]
    if found is None:
        raise CaptureError(
            f"{graph.name} never puts the rows that {stream} makes of its items into samples, so "
            f"nothing says which belong to which. {REMEDY} Or give every sample equally many: "
            "colocc.Rows()."
        )
    if stream not in modules:
        raise CaptureError(
            f"batch_dims has Items({stream!r}), and that is no module that encodes these inputs on "
            f"a layout of its own: {', '.join(modules) or 'none does'}. Name one of those."
        )
    for name in (*(n for n in modules if graph.layouts[n].sp), graph.sink):
        if axes_of(graph.layouts[name]):
            raise LayoutError(_whole_sequences(graph, stream, name))
    scatter, mask, each = found
    for node in graph.fx.nodes:
        if node.meta["module"] in modules and _splits(node) and node.meta.get("items") is None:
            raise CaptureError(
                f"{node.meta['line'] or node.name}: {node.meta['module']} encodes items of "
                f"{stream}, and {node.name} holds samples. Give it a module of its own."
            )
    for name in graph.rows.keys() & set(modules):
        raise CaptureError(
            f"{name} encodes items of {graph.rows[name].items} and of {stream}: Items() of all its "
            "inputs name one module, and these hold one kind of item"
        )
    graph.rows |= {n: replace(places, mask=mask, each=each) for n in modules}
    assert graph.guards is not None
    rows = "what rows= says" if places.stated else f"{graph.guards.shown(each)} times"
    graph.notes.append(
        f"a sample has any number of items of {stream} ({', '.join(places.names or ())}); "
        f"{mask.name} is true {rows} for each, {scatter.meta['line']}"
    )


def _whole_sequences(graph: Graph, stream: str, name: str) -> str:
    return (
        f"{name} ({graph.layouts[name]}) cuts sequences, and the items of {stream} have different "
        "numbers of rows in each sample: a recorded model puts them into whole sequences. Leave cp "
        f"and sp out of {name}."
    )


def _makes(nodes: list[fx.Node], module: str) -> bool:
    return any(node.meta["module"] == module for node in nodes)


def entries(graph: Graph, node: fx.Node, reader: str) -> Entries:
    """What an entry is of a value made of items that the module ``reader`` reads elsewhere.

    Raises: LayoutError for layouts, or a value, whose items cannot move.
    """
    stream, module, found = node.meta["items"], node.meta["module"], first_type(node.meta["types"])
    places = graph.rows[module]
    if found is not None and found.sequence is not None and axes_of(graph.layouts[module]):
        raise LayoutError(_whole_sequences(graph, stream, module))
    if reader != graph.sink:
        raise LayoutError(
            f"{reader} ({graph.layouts[reader]}) reads items of {stream} from {module} "
            f"({graph.layouts[module]}), and is not the module that puts them into samples. Give "
            f"{reader} the layout of {module}, or that of {graph.sink} "
            f"({graph.layouts[graph.sink]})."
        )
    assert graph.guards is not None and places.each is not None
    if found is None or found.batch != 0 or "sizes" not in node.meta:
        raise LayoutError(
            f"{node.name} of {module} holds items of {stream} in another dim than 0: move its "
            "items to dim 0 before another module reads them"
        )
    per_item = sympy.cancel(node.meta["sizes"][0] / graph.guards.items[stream])
    if not places.stated:
        return Entries(per_item, by_row=False)
    one, rows = (_at_example(graph, expr) for expr in (per_item, places.each))
    if rows == 1 or one % rows:
        raise LayoutError(
            f"rows of {stream} are said to differ, and {node.name} ({node.meta['line']}) has {one} "
            f"entries for an item of {rows} rows: it must have equally many for each row. Leave "
            f"rows={{{stream!r}: ...}} out where all items make equally many, or give an example "
            "whose items make several rows."
        )
    return Entries(sympy.Integer(one // rows), by_row=True)


def size_at(expr: sympy.Expr, known: Mapping[sympy.Symbol, int]) -> int | None:
    """``expr`` as a number; None where a size is not known."""
    return int(evaluated(expr, known)) if expr.free_symbols <= set(known) else None

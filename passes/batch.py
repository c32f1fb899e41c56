"""Does glue keep samples apart?

On each rank glue sees only some of the batch, so row i of its result may depend on row i of its
arguments alone. Operations that work element by element always do; those that name dims do unless
they name the batch dim; anything else is refused, with the remedy, because a wrong answer would be
silent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from colocc.errors import CaptureError
from colocc.passes.graph import Graph, Method, first_type
from colocc.passes.scatter import scatter_guard, scattered
from colocc.passes.sizes import Number
from colocc.passes.structure import Rebuilt
from colocc.types import Type

POINTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "neg",
        "abs",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
        "xor",
        "invert",
        "not_",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "radd",
        "rsub",
        "rmul",
        "where",
        "masked_fill",
        "clamp",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "sigmoid",
        "tanh",
        "relu",
        "gelu",
        "silu",
        "dropout",
        "identity",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "long",
        "int",
        "bool",
        "clone",
        "contiguous",
        "detach",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "maximum",
        "minimum",
        "logical_and",
        "logical_or",
        "logical_not",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
        "isnan",
        "isinf",
        "nan_to_num",
        "sin",
        "cos",
        "erf",
        "square",
        "getattr",
        "size",
        "dim",
        "shape",
        "device",
        "dtype",
        "numel",
    ]
)
# Operations with a dim argument that must not be the batch dim: where it stands, and its default.
BY_DIM: dict[str, tuple[int, Any]] = {
    "sum": (1, None),
    "mean": (1, None),
    "amax": (1, None),
    "amin": (1, None),
    "argmax": (1, None),
    "softmax": (1, None),
    "log_softmax": (1, None),
    "cumsum": (1, None),
    "cat": (1, 0),
    "concat": (1, 0),
    "flip": (1, None),
    "sort": (1, -1),
    "chunk": (2, 0),
    "split": (2, 0),
    "narrow": (1, None),
    "select": (1, None),
    "unbind": (1, 0),
    "index_select": (1, None),
    "repeat_interleave": (2, None),
    "normalize": (2, 1),
}
# Operations that move or reshape dims: the two runs at different batch sizes show where the batch
# went.
SHAPING = frozenset(
    [
        "transpose",
        "permute",
        "movedim",
        "unsqueeze",
        "squeeze",
        "stack",
        "expand",
        "expand_as",
        "t",
        "swapaxes",
    ]
)
FLATTENING = frozenset(["reshape", "view", "flatten", "unflatten"])
LAST_DIM = frozenset(["linear", "embedding"])
NORMS = frozenset(["layer_norm", "rms_norm"])
# Operations that read numbers as sizes of their result; what full() fills it with is a value.
FILLED = frozenset(["full", "new_full"])
SIZED = FLATTENING | FILLED
SIZED |= frozenset(["expand", "broadcast_to", "repeat", "tile", "split", "split_with_sizes"])
SIZED |= frozenset(
    ["zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty"]
)


def check_glue(graph: Graph) -> None:
    """Raise CaptureError for glue that may mix samples and is not the user's own loss: what the
    sink's layout computes for no module, or from what the sink made, sees its microbatch."""
    after, before = _after_sink(graph), _before_modules(graph)
    for node in graph.fx.nodes:
        own = node in after or (node.meta["module"] == graph.sink and node not in before)
        if not _is_glue(graph, node):
            continue
        _check_numbers(graph, node, own)
        # Replicas have equally many samples, and any number of items.
        items = any("items" in n.meta for n in node.all_input_nodes) and not node.meta.get("apart")
        if items or (not own and _reads_batch(node)):
            _check(graph, node)


def _after_sink(graph: Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if graph.module_of(node) == graph.sink or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _before_modules(graph: Graph) -> set[fx.Node]:
    """What any module of the layouts is called with."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in found or graph.owner_of(node) is not None:
            found.update(node.all_input_nodes)
    return found


def _is_glue(graph: Graph, node: fx.Node) -> bool:
    if node.op in ("placeholder", "output", "get_attr") or graph.owner_of(node) is not None:
        return False
    opaque = (Method, Number, Rebuilt)
    return not isinstance(node.target, opaque) and not hasattr(node.target, "colocc_leaf")


def _reads_batch(node: fx.Node) -> bool:
    return any(_batch(source) is not None for source in node.all_input_nodes)


def _batch(node: Any) -> int | None:
    found = first_type(node.meta.get("types")) if isinstance(node, fx.Node) else None
    return found.batch if found is not None else None


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.meta["kind"]).lower()
    return str(getattr(node.target, "__name__", node.target)).lower().strip("_")


def _check_numbers(graph: Graph, node: fx.Node, own: bool) -> None:
    """Raise CaptureError for an operation that reads the number of samples, or of items, as a
    value: each rank has its own. The user's ``own`` loss may be a mean over its samples."""
    if graph.guards is None:
        return
    things = {} if own else {graph.guards.batch: "samples"}
    things |= {symbol: f"items of {name}" for name, symbol in graph.guards.items.items()}
    name = _name(node)
    fill = (*node.args[2 if node.op == "call_method" else 1 :], node.kwargs.get("fill_value"))
    for source in node.all_input_nodes:
        if not isinstance(source.target, Number) or (
            name in SIZED and not (name in FILLED and source in fill)
        ):
            continue
        grows = next((s for s in things if s in source.target.expr.free_symbols), None)
        if grows is not None:
            raise CaptureError(
                f"{node.meta['line'] or node.name}: {name} takes the number of {things[grows]} for "
                "a plain number, and each rank sees only some of them. Use it for shapes alone, or "
                "move that code into a function marked @colocc.leaf or a module that the layouts "
                "name."
            )


def _check(graph: Graph, node: fx.Node) -> None:
    if scattered(node) is not None and any("items" in n.meta for n in node.all_input_nodes):
        return
    guard = scatter_guard(graph, node)
    if guard is not None and graph.guards is not None:
        graph.guards.scatters.append(guard)
        return
    name = _name(node)
    checks: list[tuple[bool, Callable[[fx.Node, str], bool]]] = [
        (name in POINTWISE, _same_batch),
        (name in BY_DIM, _other_dim),
        (name in SHAPING, lambda n, _: _one_batch(n)),
        (name in FLATTENING, lambda n, _: _leading(n)),
        (name == "linear", lambda n, _: _not_last(n)),
        (name == "embedding", lambda n, _: _looked_up(n)),
        (name == "pad", lambda n, _: _pad(n)),
        (name in NORMS, lambda n, _: _norm(n)),
        (name in ("matmul", "bmm", "einsum"), lambda n, _: name != "einsum" and _matmul(n)),
        (name == "getitem", lambda n, _: _getitem(n)),
        (name == "assigned", lambda n, _: _assigned(n)),
    ]
    for applies, holds in checks:
        if applies and holds(node, name):
            return
    raise CaptureError(
        f"{node.meta['line'] or node.name}: {name} on a tensor that is split by sample may mix "
        f"samples: each rank sees only some of them ({_signature(node)}). Keep samples apart, "
        "or, if it does, "
        "move it into a function marked @colocc.leaf or a module that the layouts name."
    )


def _signature(node: fx.Node) -> str:
    shown = [str(first_type(n.meta.get("types"))) for n in node.all_input_nodes]
    return f"{', '.join(shown)} -> {first_type(node.meta.get('types'))}"


def _types(node: fx.Node) -> list[Type]:
    found = [first_type(source.meta.get("types")) for source in node.all_input_nodes]
    return [t for t in found if t is not None]


def _one_batch(node: fx.Node) -> bool:
    out = first_type(node.meta.get("types"))
    return out is None or out.batch is not None


def _same_batch(node: fx.Node, name: str) -> bool:
    """Broadcasting aligns dims from the right, so the batch must be equally far from there."""
    out = first_type(node.meta.get("types"))
    if out is None:
        return True
    places = {len(t.dims) - t.batch for t in [*_types(node), out] if t.batch is not None}
    # A tensor without a batch that has a long dim where the others have samples was cut for all
    # ranks.
    place = len(out.dims) - (out.batch or 0)
    flat = [t for t in _types(node) if t.batch is None and len(t.dims) >= place]
    return len(places) == 1 and all(t.dims[len(t.dims) - place].size == 1 for t in flat)


def _argument(node: fx.Node, index: int, default: Any) -> Any:
    for name in ("dim", "axis"):
        if name in node.kwargs:
            return node.kwargs[name]
    return node.args[index] if len(node.args) > index else default


def _other_dim(node: fx.Node, name: str) -> bool:
    index, default = BY_DIM[name]
    dims = _argument(node, index, default)
    ndims = [(t.batch, len(t.dims)) for t in _types(node) if t.batch is not None]
    if dims is None or not ndims:
        return False
    named = dims if isinstance(dims, (list, tuple)) else [dims]
    return all(d % n != batch for d in named for batch, n in ndims) and _one_batch(node)


def _leading(node: fx.Node) -> bool:
    """A reshape keeps samples whole if the batch leads before and after."""
    out = first_type(node.meta.get("types"))
    return out is not None and out.batch == 0 and all(t.batch in (0, None) for t in _types(node))


def _not_last(node: fx.Node) -> bool:
    found = [t for t in _types(node) if t.batch is not None]
    return all(t.batch != len(t.dims) - 1 or len(t.dims) == 1 for t in found) and _one_batch(node)


def _looked_up(node: fx.Node) -> bool:
    """The table is the same for all samples: its rows are no samples."""
    tables = [t for t in _types(node) if t.dtype[0] not in "iu"]
    return all(t.batch is None for t in tables) and _one_batch(node)


def _pad(node: fx.Node) -> bool:
    """Two numbers for each of the last dims."""
    widths = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(widths, (list, tuple)):
        return False
    return all(t.batch is None or t.batch < len(t.dims) - len(widths) // 2 for t in _types(node))


def _norm(node: fx.Node) -> bool:
    """The dims that are normalized are the last ones, as many as the shape that is named has."""
    shape = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(shape, (list, tuple)):
        return False
    return all(t.batch is None or t.batch < len(t.dims) - len(shape) for t in _types(node)[:1])


def _matmul(node: fx.Node) -> bool:
    left, right = (first_type(a.meta.get("types")) for a in node.args[:2] if isinstance(a, fx.Node))
    if left is None or right is None:
        return False
    inner = left.batch == len(left.dims) - 1 or right.batch == max(0, len(right.dims) - 2)
    return not inner and _one_batch(node)


def _assigned(node: fx.Node) -> bool:
    """A constant written by mask, or a constant or the same samples written to a slice."""
    whole, index, new = node.args
    if isinstance(index, fx.Node):
        return not isinstance(new, fx.Node) and _same_batch(node, "assigned")
    aligned = not isinstance(new, fx.Node) or _batch(new) == 0
    return aligned and _batch(whole) == 0 and _keeps_batch(_types(node)[0], index)


def _getitem(node: fx.Node) -> bool:
    source, index = node.args[0], node.args[1]
    types = source.meta.get("types") if isinstance(source, fx.Node) else None
    if not isinstance(types, Type) or types.batch is None:
        return True
    return _keeps_batch(types, index)


def _keeps_batch(types: Type, index: Any) -> bool:
    """Whether an index takes all samples, in their order."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if types.batch is None or any(isinstance(part, fx.Node) for part in parts):
        return False
    dims = [part for part in parts if part is not None]
    if Ellipsis in dims:
        place = dims.index(Ellipsis)
        dims[place : place + 1] = [slice(None)] * (len(types.dims) - len(dims) + 1)
    return len(dims) <= types.batch or dims[types.batch] == slice(None)

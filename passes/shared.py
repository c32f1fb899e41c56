"""Values that all samples share, and weights: do their gradients reach every replica's reader?

A value without samples is not moved: every rank has it. Its gradient is that of the reader's part
on this rank, and the data parallel group of the module that made it takes the mean. That is the
mean over all of the reader's parts only if the group has equally many ranks of each part.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Graph, first_type, made_from
from colocc.types import Type


def check_shared(graph: Graph, node: fx.Node, module: str) -> None:
    """Raise LayoutError if ``module`` reads a value of another, without samples, whose gradient
    would be that of some samples alone. A number that is made from samples, such as a loss beside
    the embeddings, has a gradient that is alike on every rank."""
    source, types = node.meta["module"], node.meta["types"]
    if not node.meta.get("learns") or (_is_number(types) and _sees_samples(node)):
        return
    src, dst = graph.layouts[source], graph.layouts[module]
    if sees_all(src, dst):
        return
    raise LayoutError(
        f"{node.name} of {source} ({src}) is one value for all samples, and {module} ({dst}) reads "
        f"it ({node.meta['line']}): ranks get gradients of different samples, and the groups over "
        f"dp of {source} do not have equally many of each. Give {source} the layout of {module}, "
        "or dp over all ranks."
    )


def _is_number(types: object) -> bool:
    return isinstance(types, Type) and not types.dims


def _sees_samples(node: fx.Node) -> bool:
    found = (first_type(source.meta.get("types")) for source in made_from(node))
    return any(kind is not None and kind.batch is not None for kind in found)


def sees_all(src: Layout, dst: Layout) -> bool:
    """Whether each data parallel group of ``src`` has equally many ranks of each part that ``dst``
    cuts its batch into."""
    part = (dst.coordinates("dp") * dst.cp + dst.coordinates("cp")).tolist()
    for group in src.groups("dp", "cp"):
        counts = Counter(part[rank] for rank in group)
        if len(counts) != dst.dp * dst.cp or len(set(counts.values())) != 1:
            return False
    return True


def check_tied(model: nn.Module, layouts: dict[str, Layout], targets: dict[str, str]) -> None:
    """Raise LayoutError for a weight that modules of different layouts share: each would reduce
    its gradient over other ranks."""
    owners: dict[int, str] = {}
    for name, path in targets.items():
        for weight, parameter in model.get_submodule(path).named_parameters():
            first = owners.setdefault(id(parameter), name)
            if parameter.requires_grad and not layouts[first].same_grid(layouts[name]):
                raise LayoutError(
                    f"{first} ({layouts[first]}) and {name} ({layouts[name]}) share the weight "
                    f"{path}.{weight}, whose gradient each would reduce over other ranks. Give "
                    "them one layout, or each its own copy."
                )

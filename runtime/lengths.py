"""What modules make of sequences that a layout cuts: as long as the layout and the recording say.

A module whose input is cut, and which is not said to make a part, makes one all the same; one that
is said to make a part, and has the whole, makes the whole. What reads it would take either for
something else, so the lengths are looked at where they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import sympy
import torch
from torch import fx

from colocc.errors import LayoutError
from colocc.passes.graph import Graph
from colocc.passes.sequences import taken_from
from colocc.passes.sizes import evaluated
from colocc.types import Type

Sizes = Mapping[sympy.Symbol, int]


class Lengths:
    """The lengths that the modules of a recorded ``graph`` make, where it names sequences."""

    def __init__(self, graph: Graph) -> None:
        self._wanted: dict[fx.Node, tuple[str, list[tuple[int, sympy.Expr, int]]]] = {}
        for node in graph.fx.nodes if graph.sequence_dims else ():
            name, kind = taken_from(graph, node), node.meta.get("types")
            sizes = node.meta.get("sizes")
            if name is None or sizes is None or "items" in node.meta or not isinstance(kind, Type):
                continue
            parts = [prod(kind.layout.sizes[axis] for axis in dim.axes) for dim in kind.dims]
            dims = [
                (dim, expr, parts[dim] if dim < len(parts) else 1)
                for dim, expr in enumerate(sizes)
                if dim != kind.batch and expr.free_symbols
            ]
            if dims:
                self._wanted[node] = name, dims

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._wanted

    def check(self, node: fx.Node, value: Any, sizes: Sizes) -> None:
        """Raise LayoutError if ``node`` made another length than this rank's part of what it makes
        of inputs of these ``sizes``."""
        name, dims = self._wanted[node]
        for dim, expr, parts in dims:
            if not isinstance(value, torch.Tensor) or not expr.free_symbols <= set(sizes):
                continue
            whole = evaluated(expr, sizes)
            if value.shape[dim] * parts != whole:
                kind = node.meta["types"]
                raise LayoutError(
                    f"{name} ({kind.layout}) made {value.shape[dim]} positions in dim {dim} of "
                    f"{node.name}, of {whole} a rank has {whole // parts}. Give sequence_dims both "
                    f"the inputs that {name} reads and {name} itself, or neither, and let it make "
                    "as many as without a layout."
                )

"""The values made of rows that cross from encode to language, and what this rank has of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from colocc.runtime.data import Batches
from colocc.runtime.row_moves import RowRedistribution
from colocc.runtime.rows import Cells, Ids, Rows, corners_of, counted

if TYPE_CHECKING:
    from colocc.runtime.redistribution import Redistribution


class Crossing:
    """The values ``cut``, some through one of ``moves``; ``empty`` makes what has no rows."""

    def __init__(
        self,
        cut: Sequence[fx.Node],
        moves: Mapping[str, Redistribution | RowRedistribution],
        rank: int,
        empty: Callable[[], torch.Tensor],
    ) -> None:
        self.cut, self.moves, self.rank, self.empty = cut, moves, rank, empty
        self._corners = {
            node: corners_of(node.meta["rows"].dst, rank)
            for node in cut
            if node.meta.get("rows") is not None
        }
        self._rows: dict[fx.Node, tuple[Ids, Rows]] = {}

    def expect(self, batches: Batches) -> None:
        """The rows of ``batches`` are encoded next."""
        for node, corners in self._corners.items():
            rows, move = batches.ragged.moved(node), self.moves.get(node.name)
            _, known = self._rows.get(node, (None, None))
            if known is None or not known.alike(rows):
                self._rows[node] = Cells(node.meta["rows"], rows).inside(corners), rows
            if isinstance(move, RowRedistribution):
                move.rows = rows

    def check(self, values: Mapping[fx.Node, Any]) -> None:
        """Raise LayoutError if a value, or what is redistributed to it, has other rows than its
        samples have placeholders."""
        for node in self.cut:
            move = self.moves.get(node.name)
            if isinstance(move, RowRedistribution):
                move.counted(values[node.all_input_nodes[0]])
            elif node in self._rows:
                self._counted(node, values[node])

    def outline(self, values: Mapping[fx.Node, Any]) -> str:
        """What is made of rows, but for how many: alike on all ranks, or they could not move it."""
        found = []
        for node in self._rows:
            source = node.all_input_nodes[0] if node.name in self.moves else node
            found.append(f"{source.name} {_kind(values[source])}")
        return ", ".join(found)

    def kept(self, values: Sequence[Any]) -> list[Any]:
        """The values of ``cut``, of which those that no redistribution reads are cut to the rows
        that count."""
        found = list(values)
        for place, node in enumerate(self.cut):
            if node in self._rows and node.name not in self.moves:
                value = self._counted(node, found[place])
                found[place] = self.empty() if value is None else value
        return found

    def _counted(self, node: fx.Node, value: Any) -> Any:
        held, rows = self._rows[node]
        return counted(value, held, rows, f"{node.name} on rank {self.rank}")

    def counts(self) -> dict[fx.Node, list[int]]:
        """Of the values that are made of rows, this rank's rows in each microbatch."""
        return {node: rows.by_microbatch(held) for node, (held, rows) in self._rows.items()}


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    dtype, shape = str(value.dtype).removeprefix("torch."), ["rows", *map(str, value.shape[1:])]
    grad = " with a gradient" if value.requires_grad else ""
    return f"{dtype} [{', '.join(shape)}] on {value.device.type}{grad}"

"""Covers passes/sequences.py: where the sequence is, through glue, and glue that may mix it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from colocc.errors import CaptureError
from colocc.layout import Layout
from colocc.passes.graph import Graph
from colocc.types import Type
from tests.passes.kit import Pair, graph_of

CUT = Layout(tp=2, cp=2, dp=2)
WHOLE = Layout(tp=2, dp=4)
BATCH = {"images": torch.zeros(8, 16, 16), "mask": torch.ones(8, 16, 1)}


def graph_with(
    glue: Callable[[Tensor, Tensor], Tensor],
    dims: Mapping[str, int] | None = None,
    language: Layout = CUT,
) -> Graph:
    layouts = {"vision": WHOLE, "language": language}
    given = {"vision": 1, "mask": 1} if dims is None else dims
    return graph_of(Pair(glue), layouts, BATCH, sequence_dims=given)


def read_by_language(graph: Graph) -> Type:
    (node,) = next(n for n in graph.nodes if graph.module_of(n) == "language").all_input_nodes
    found = node.meta["types"]
    assert isinstance(found, Type)
    return found


KEEP: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, int]] = {
    "mul": (lambda x, mask: x * mask, "f32[8@dp,16@cp,8]", 1),
    "where": (lambda x, mask: torch.where(mask > 0, x, -x), "f32[8@dp,16@cp,8]", 1),
    "unsqueeze behind": (lambda x, mask: x.unsqueeze(2), "f32[8@dp,16@cp,1,8]", 1),
    "unsqueeze before": (lambda x, mask: x.unsqueeze(1), "f32[8@dp,1,16@cp,8]", 2),
    "layer_norm": (lambda x, mask: functional.layer_norm(x, [8]), "f32[8@dp,16@cp,8]", 1),
    "a number": (lambda x, mask: (x + 1) * x.shape[2], "f32[8@dp,16@cp,8]", 1),
}


@pytest.mark.parametrize("name", KEEP)
def test_glue_that_keeps_positions_apart(name: str) -> None:
    glue, text, dim = KEEP[name]
    found = read_by_language(graph_with(glue))
    assert (str(found), found.sequence) == (text, dim)


MIX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, mask: x.sum(1, keepdim=True),
    "softmax": lambda x, mask: x.softmax(1),
    "getitem": lambda x, mask: x[:, 1:],
    "flip": lambda x, mask: x.flip(1),
    "layer_norm": lambda x, mask: functional.layer_norm(x, [16, 8]),
    "cat": lambda x, mask: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("name", MIX)
def test_glue_that_may_mix_positions_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match=rf"{name} on a value whose sequence is cut may mix"):
        graph_with(MIX[name])
    # Where no layout cuts the sequence, glue may do what it likes.
    assert graph_with(MIX[name], language=Layout(tp=4, dp=2)).plans


def test_an_input_that_is_not_named_is_not_cut_with_the_others() -> None:
    with pytest.raises(CaptureError, match="mul on a value whose sequence is cut"):
        graph_with(lambda x, mask: x * mask, {"vision": 1})


class Several(nn.Linear):
    """Its output twice, side by side and in a dict."""

    def forward(self, x: Tensor) -> Any:
        made = super().forward(x)
        return made, {"states": [made * 2]}


@pytest.mark.parametrize("which", [0, 1])
def test_a_part_of_what_a_module_makes_has_its_sequence(which: int) -> None:
    class Model(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.vision = Several(16, 8)

        def forward(self, images: Tensor, mask: Tensor) -> Tensor:
            plain, more = self.vision(images)
            out: Tensor = self.language([plain, more["states"][0]][which] * mask)
            return out

    layouts = {"vision": WHOLE, "language": CUT}
    graph = graph_of(Model(), layouts, BATCH, sequence_dims={"vision": 1, "mask": 1})
    assert str(read_by_language(graph)) == "f32[8@dp,16@cp,8]"


class After(Pair):
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.language(self.vision(images))
        return out.sum(1)


def test_what_the_reader_makes_is_its_own() -> None:
    layouts = {"vision": WHOLE, "language": CUT}
    graph = graph_of(After(), layouts, BATCH, sequence_dims={"vision": 1, "language": 1})
    types = {node.name: node.meta["types"] for node in graph.nodes if node.op != "output"}
    assert str(types["language"]) == "f32[8@dp,16@cp,8]"
    assert types["sum_1"].sequence is None


class Embeds(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.zeros(4, 16))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.language(self.vision(functional.embedding(mask, self.table)))
        return out


def test_ids_of_an_embedding_have_the_sequence() -> None:
    layouts = {"vision": Layout(cp=2, dp=4), "language": WHOLE}
    batch = {"mask": torch.zeros(8, 16, dtype=torch.int64)}
    graph = graph_of(Embeds(), layouts, batch, sequence_dims={"vision": 1, "mask": 1})
    assert str(graph.nodes[0].meta["types"]) == "i64[8@dp,16@cp]"
    assert str(read_by_language(graph)) == "f32[8@dp,16,8]"

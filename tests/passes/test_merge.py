"""Covers passes/merge.py: the merge of a MimoModel's embeddings behind the cut of its sequence."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn

from colocc.errors import CaptureError, VerifyError
from colocc.layout import Layout
from colocc.passes.capture import capture
from colocc.passes.dump import page
from colocc.passes.graph import Glue, Graph, Merging, Traits, token_places
from colocc.passes.merge import Merge, merge
from colocc.passes.propagate import propagate
from colocc.passes.verify import verify

TRAITS = Traits(
    glue=(
        Glue("embed", "text", "language"),
        Glue("align", "merged", "language"),
        Glue("shard", "sharded", "language", stage="all"),
    ),
    rows={"vision": 9},
    merging=Merging("embed", "align", "shard"),
)
IMAGES = {"vision": Layout(dp=8), "language": Layout(tp=2, cp=2, dp=2, sp=True, zigzag=True)}


class Model(nn.Module):
    """A forward in the shape of MimoModel's: embed, align, shard, language model."""

    def __init__(self, *, peeks: bool = False) -> None:
        super().__init__()
        self.vision, self.language = nn.Linear(4, 8), nn.Linear(8, 8)
        self.peeks = peeks

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return input_ids

    def align(
        self, modality_embeddings: dict[str, torch.Tensor], input_ids: torch.Tensor
    ) -> torch.Tensor:
        return input_ids

    def shard(self, embeddings: torch.Tensor | None, labels: torch.Tensor) -> tuple[Any, Any]:
        return embeddings, labels

    def forward(
        self,
        images: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> Any:
        found = {"vision": self.vision(images)}
        found["text"] = self.embed(input_ids=input_ids, position_ids=position_ids)
        merged = self.align(modality_embeddings=found, input_ids=input_ids)
        embeddings, labels = self.shard(embeddings=merged, labels=labels)
        out = self.language(embeddings)
        return (out, labels, merged) if self.peeks else (out, labels)


def merged(layouts: dict[str, Layout], **options: Any) -> Graph:
    model = Model(**options)
    graph = propagate(capture(model, layouts, traits=TRAITS), traits=TRAITS)
    graph.rows = token_places(TRAITS.rows)
    return merge(graph, traits=TRAITS)


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.fx.nodes]


def test_the_merge_takes_the_place_of_text_and_merged() -> None:
    graph = merged(IMAGES)
    assert "text" not in names(graph) and "merged" not in names(graph)
    (call,) = [node for node in graph.fx.nodes if isinstance(node.target, Merge)]
    ids, positions, rows = call.args
    assert (ids.name, positions.name) == ("input_ids", "position_ids")
    assert {name: node.name for name, node in rows.items()} == {"vision": "vision"}
    language = next(n for n in graph.fx.nodes if graph.module_of(n) == "language")
    assert language.args == (call,)
    sharded = next(n for n in graph.fx.nodes if n.name == "sharded")
    assert sharded.kwargs["embeddings"] is None
    # Labels are cut as before.
    assert [u.args[1] for u in sharded.users if u.target is operator.getitem] == [1]
    assert "+ %merge" in page(graph, "merge")


@pytest.mark.parametrize("language", [Layout(tp=4, dp=2), Layout(tp=2, pp=2, dp=2)])
def test_a_whole_sequence_is_merged_by_the_model(language: Layout) -> None:
    graph = merged({"vision": Layout(dp=8), "language": language})
    assert {"text", "merged", "sharded"} <= set(names(graph))


def test_reading_the_whole_sequence_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"no rank of language has the embeddings of the whole"):
        merged(IMAGES, peeks=True)


def test_verify_sees_rows_that_are_read_whole() -> None:
    graph = merged(IMAGES)
    verify(graph, after="merge")
    (call,) = [node for node in graph.fx.nodes if isinstance(node.target, Merge)]
    call.target = operator.getitem
    with pytest.raises(VerifyError, match="merge reads the rows vision outside a merge"):
        verify(graph, after="merge")

"""Covers runtime/guards.py: a batch that breaks a guard is one error, which says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from colocc import CaptureError, passes
from colocc.passes.graph import Graph
from colocc.runtime.guards import check_guards, check_modes
from tests.passes.kit import PAIR_LAYOUTS, refusal

PLACE = 9


class Model(nn.Module):
    """Glue that branches on sizes and on ``training``, and merges by mask."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(4, 8)
        self.language = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3))

    def forward(self, ids: Tensor, pixels: Tensor, scale: float = 1.0) -> Tensor:
        embeds = self.language[0](ids)
        if ids.shape[1] > 4:
            embeds = embeds * scale
        if self.training:
            embeds = embeds * 2
        features = self.vision(pixels)
        embeds = embeds.masked_scatter((ids == PLACE).unsqueeze(-1), features)
        out: Tensor = self.language[1](embeds)
        return out


def batch(length: int = 6, size: int = 8) -> dict[str, Any]:
    ids = torch.zeros(size, length, dtype=torch.long)
    ids[:, 1:3] = PLACE
    return {"ids": ids, "pixels": torch.zeros(size, 2, 4), "scale": 2.0}


@pytest.fixture
def graph() -> Graph:
    return passes.run(Model(), PAIR_LAYOUTS, reductions={}, example_inputs=batch())


def test_what_the_graph_takes_for_granted(graph: Graph) -> None:
    assert graph.guards is not None
    shown = [f"{what} | {line.partition(' ')[2][:35]}" for what, line in graph.guards.lines()]
    assert_expected_inline(
        "\n".join(shown),
        """\
ids.shape[1] > 4 | if ids.shape[1] > 4:
pixels.shape[2] == 4 | takes no other
scale is 2.0 | in the example
model.training is True | if self.training:
unsqueeze is true pixels.shape[1] times in each sample | embeds = embeds.masked_scatter((ids""",
    )


def broken(graph: Graph, **changed: Any) -> str:
    given = {**batch(), **changed}
    size = given["ids"].shape[0]
    return refusal(CaptureError, lambda: check_guards(graph, given, size, "microbatch 0"))


def test_a_batch_like_the_example_passes(graph: Graph) -> None:
    for length, size in ((6, 8), (9, 4), (5, 16)):
        check_guards(graph, batch(length, size), size, "microbatch 0")


def test_a_size_on_the_other_side_of_a_branch(graph: Graph) -> None:
    assert_expected_inline(
        broken(graph, ids=batch(4)["ids"]),
        """\
microbatch 0: this batch has ids.shape[1] = 4, and the graph holds where ids.shape[1] > 4
    (runtime/test_guards.py:30 if ids.shape[1] > 4:). Compile again with such a batch as
    example_inputs, or give batches like the example's.""",
    )


def test_a_constant_of_another_value(graph: Graph) -> None:
    assert_expected_inline(
        broken(graph, scale=3.0),
        """\
microbatch 0: this batch has scale 3.0, and the graph holds where scale is 2.0. Compile again
    with such a batch as example_inputs, or give batches like the example's.""",
    )


def test_an_input_of_another_dtype(graph: Graph) -> None:
    given = batch()
    text = broken(graph, pixels=given["pixels"].double())
    assert "this batch has pixels 'float64', and the graph holds where pixels.dtype is" in text


def test_a_sample_with_another_number_of_placeholders(graph: Graph) -> None:
    ids = batch()["ids"]
    ids[5, 4] = PLACE
    assert_expected_inline(
        broken(graph, ids=ids),
        """\
microbatch 0: sample 5 has 3 places for embeddings and 2 embeddings (masked_scatter,
    runtime/test_guards.py:35 embeds = embeds.masked_scatter((ids == PLACE).unsqueeze(-1),
    features)). Give each sample as many placeholder tokens as its encoder makes embeddings. 1
    of 8 samples differ. Where samples have different numbers of items, say so of the encoder's
    inputs: compile(..., batch_dims={input: colocc.Items(module)}).""",
    )


def test_a_model_in_another_mode(graph: Graph) -> None:
    model = Model()
    check_modes(graph.guards, model)
    assert_expected_inline(
        refusal(CaptureError, lambda: check_modes(graph.guards, model.eval())),
        """\
model.training is False, and the graph holds where model.training is True
    (runtime/test_guards.py:32 if self.training:). Compile again in this mode, or call .train().""",
    )

"""Phases: encoders before the language model, the cut between them, and the stages of glue."""

from __future__ import annotations

import pytest
import torch

from colocc.errors import CaptureError
from colocc.layout import Layout
from colocc.passes.phases import cut
from tests.passes.kit import PAIR_LAYOUTS, Pair, graph_of, pair_graph, trio_graph

PIPELINED = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=2, pp=2, dp=2)}


def test_each_node_has_its_phase_and_stage() -> None:
    labels = {n.name: (n.meta["phase"], n.meta["stage"]) for n in trio_graph().fx.nodes}
    assert labels == {
        "images": ("encode", "all"),
        "clips": ("encode", "all"),
        "vision": ("encode", "all"),
        "vision_language": ("encode", "all"),
        "audio": ("encode", "all"),
        "audio_language": ("encode", "all"),
        "mask": ("language", "all"),
        "unsqueeze": ("language", "first"),
        "where": ("language", "first"),
        "language": ("language", "all"),
        "output": ("language", "last"),
    }


def test_without_a_pipeline_every_rank_runs_everything() -> None:
    graph = trio_graph(language=Layout(tp=4, dp=2))
    assert {n.meta["stage"] for n in graph.fx.nodes} == {"all"}


def test_the_cut_is_what_the_language_phase_reads() -> None:
    assert [n.name for n in cut(trio_graph())] == ["vision_language", "audio_language"]
    same = graph_of(
        Pair(),
        {"vision": Layout(tp=8), "language": Layout(tp=8)},
        {"images": torch.zeros(8, 16)},
    )
    assert [n.name for n in cut(same)] == ["vision"]
    assert [n.name for n in cut(pair_graph())] == ["vision_language"]


class Scored(Pair):
    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.vision(images))
        return (out * mask).mean()


def test_what_is_made_from_the_language_model_runs_on_the_last_stage() -> None:
    batch = {"images": torch.zeros(8, 16), "mask": torch.ones(8, 1)}
    stages = {n.name: n.meta["stage"] for n in graph_of(Scored(), PIPELINED, batch).fx.nodes}
    assert (stages["mul"], stages["mean"], stages["output"]) == ("last", "last", "last")
    assert stages["language"] == "all"


class Twice(Pair):
    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.language(self.vision(images)))
        return out


def test_a_pipelined_language_model_is_called_once() -> None:
    batch = {"images": torch.zeros(8, 16)}
    with pytest.raises(CaptureError) as info:
        graph_of(Twice(), PIPELINED, batch)
    message = str(info.value)
    assert message.startswith("Twice.forward calls language 2 times (passes/test_phases.py:")
    assert message.endswith("): with pp > 1 it can be called once")
    assert len(graph_of(Twice(), PAIR_LAYOUTS, batch).plans) == 1


class Late(Pair):
    """An encoder that reads the language model, and a head that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 8)

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.vision(images))
        head: torch.Tensor = self.head(mask)
        return out + head


def test_two_modules_that_none_reads_pipelined_one_is_the_language_model() -> None:
    batch = {"images": torch.zeros(8, 16), "mask": torch.zeros(8, 8)}
    graph = graph_of(Late(), {**PIPELINED, "head": Layout(tp=4, dp=2)}, batch)
    assert graph.sink == "language"
    phase = {n.name: n.meta["phase"] for n in graph.fx.nodes}
    assert (phase["head"], phase["head_language"]) == ("encode", "encode")


class Backwards(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 8)

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.language(self.vision(images))
        out: torch.Tensor = self.language(self.head(x))
        return out


def test_an_encoder_that_reads_the_language_model_is_refused() -> None:
    layouts = {name: Layout(tp=4, dp=2) for name in ("vision", "language", "head")}
    with pytest.raises(CaptureError, match=r"calls its modules in a circle|encoders run before"):
        graph_of(Backwards(), layouts, {"images": torch.zeros(8, 16)})

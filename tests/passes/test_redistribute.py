"""Redistribute: one inserted call per value and reading module, and none where nothing differs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes import run
from colocc.passes.redistribute import PREFIX, is_redistribution
from tests.passes.kit import (
    PAIR_BATCH,
    TRIO_BATCH,
    Pair,
    Trio,
    graph_of,
    pair_graph,
    refusal,
    trio_graph,
)


def test_a_mismatch_is_bridged_after_the_value() -> None:
    graph = pair_graph()
    names = [n.name for n in graph.fx.nodes]
    assert names == ["images", "vision", "vision_language", "language", "output"]
    node = graph.nodes[2]
    assert is_redistribution(node)
    assert node.target == PREFIX + "vision_language"
    assert node.meta["module"] == "language"
    assert node.meta["line"] == graph.nodes[1].meta["line"]
    assert str(node.meta["types"]) == str(graph.nodes[1].meta["types"])
    assert node.meta["types"].layout == graph.layouts["language"]
    assert [user.name for user in graph.nodes[1].users] == ["vision_language"]


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-pp-dp", "tp-dp"])
def test_one_grid_needs_no_node(order: str) -> None:
    layouts = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=2, dp=4, order=order)}
    graph = graph_of(Pair(), layouts, PAIR_BATCH)
    assert not graph.plans
    assert len(graph.nodes) == 4


def test_one_layout_with_other_rank_orders_is_a_mismatch() -> None:
    layouts = {"vision": Layout(tp=2, dp=4, order="dp-tp"), "language": Layout(tp=2, dp=4)}
    (plan,) = graph_of(Pair(), layouts, PAIR_BATCH).plans.values()
    assert plan.kind == "equal"
    assert plan.moves


def test_each_source_has_a_plan_of_its_own() -> None:
    graph = trio_graph()
    assert list(graph.plans) == ["vision_language", "audio_language"]
    assert [plan.scale for plan in graph.plans.values()] == [Fraction(2), Fraction(1, 2)]


def test_gradients_that_are_summed_need_no_scale() -> None:
    reductions: dict[str, Any] = {"vision": "sum", "audio": "mean", "language": "sum"}
    layouts = {"vision": Layout(dp=8), "audio": Layout(tp=4, dp=2), "language": Layout(tp=8)}
    graph = run(Trio(), layouts, reductions=reductions, example_inputs=TRIO_BATCH)
    assert [plan.scale for plan in graph.plans.values()] == [Fraction(1), Fraction(2)]


class Twice(Pair):
    """The language side reads one value in two places."""

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.vision(images)
        out: torch.Tensor = self.language(x)
        return out + x


def test_readers_of_one_module_share_a_redistribution() -> None:
    layouts = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=4, dp=2)}
    graph = graph_of(Twice(), layouts, {"images": torch.zeros(8, 16)})
    (name,) = graph.plans
    node = next(n for n in graph.fx.nodes if n.name == name)
    assert sorted(user.name for user in node.users) == ["add", "language"]


class Chain(Trio):
    def forward(
        self, images: torch.Tensor, clips: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        out: torch.Tensor = self.language(self.audio(self.vision(images)[:, :, :4]))
        return out


def test_between_two_encoders_the_layouts_must_be_one() -> None:
    layouts = {
        "vision": Layout(tp=2, dp=4),
        "audio": Layout(tp=8),
        "language": Layout(tp=4, dp=2),
    }
    batch = {"images": TRIO_BATCH["images"]}
    call = lambda: graph_of(Chain(), layouts, batch)  # noqa: E731
    assert_expected_inline(
        refusal(LayoutError, call),
        """\
audio (tp8 dp1) reads getitem of vision (tp2 dp4): between two encoders the layouts must be one,
    only language may differ. Write audio as tp2 dp4.""",
    )
    assert list(graph_of(Chain(), {**layouts, "audio": layouts["vision"]}, batch).plans) == [
        "audio_language"
    ]


class Both(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, y * 2


class Sum(nn.Linear):
    def forward(self, pair: Any) -> torch.Tensor:
        return super().forward(pair[0] + pair[1])


def test_the_parts_of_a_value_that_is_not_one_tensor_are_moved_one_by_one() -> None:
    model = Pair()
    model.vision, model.language = Both(16, 8), Sum(8, 8)
    layouts = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=4, dp=2)}
    graph = graph_of(model, layouts, {"images": torch.zeros(8, 16)})
    assert list(graph.plans) == ["getitem_language", "getitem_1_language"]


def test_layouts_that_no_plan_covers_are_refused() -> None:
    layouts = {"vision": Layout(tp=4, dp=3), "language": Layout(tp=3, dp=4)}
    batch = {"images": torch.zeros(12, 16)}
    with pytest.raises(LayoutError, match="4 % 3 = 1, neither divides the other"):
        graph_of(Pair(), layouts, batch)


def test_the_name_of_an_inserted_node_is_free() -> None:
    layouts = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=4, dp=2)}
    graph = graph_of(
        Named(), layouts, {"images": torch.zeros(8, 16), "mul_language": torch.zeros(8, 1)}
    )
    assert list(graph.plans) == ["mul_language_2"]


class Named(Pair):
    def forward(self, images: torch.Tensor, mul_language: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.vision(images) * mul_language)
        return out

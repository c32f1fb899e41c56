"""Redistribute: one inserted call per value and reading module, and none where nothing differs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from colocc.errors import CaptureError, LayoutError
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


def test_between_two_encoders_layouts_may_differ() -> None:
    layouts = {
        "vision": Layout(tp=2, dp=4),
        "audio": Layout(tp=8),
        "language": Layout(tp=4, dp=2),
    }
    graph = graph_of(Chain(), layouts, {"images": TRIO_BATCH["images"]})
    assert list(graph.plans) == ["getitem_audio", "audio_language"]
    plan = graph.plans["getitem_audio"]
    assert (plan.src.module, plan.dst.module) == ("vision", "audio")
    layouts["audio"] = layouts["vision"]
    graph = graph_of(Chain(), layouts, {"images": TRIO_BATCH["images"]})
    assert list(graph.plans) == ["audio_language"]


def test_encoders_hold_the_samples_of_the_sink_s_replicas() -> None:
    layouts = {
        "vision": Layout(dp=8),
        "audio": Layout(tp=4, dp=2),
        "language": Layout(tp=2, pp=2, dp=2),
    }
    graph = graph_of(Chain(), layouts, {"images": TRIO_BATCH["images"]})
    first, second = graph.plans.values()
    # What vision hands to audio is what audio hands on, in a finer grid.
    finer = first.units // second.units
    assert finer == 4
    for read, held in zip(first.dst.units(), second.src.units(), strict=True):
        assert read == tuple((start * finer, stop * finer) for start, stop in held)


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


def test_layouts_whose_dp_do_not_divide_are_bridged() -> None:
    layouts = {"vision": Layout(tp=4, dp=3), "language": Layout(tp=3, dp=4)}
    graph = graph_of(Pair(), layouts, {"images": torch.zeros(12, 16)})
    (plan,) = graph.plans.values()
    assert (plan.units, plan.kind, plan.ratio) == (12, "fan_out", Fraction(4, 3))
    assert plan.scale == Fraction(3, 4)


# ---------------------------------------------------------------- the sequence


CUT = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=2, cp=2, dp=2, sp=True, zigzag=True)}
LONG = {"images": torch.zeros(8, 16, 16), "mask": torch.ones(8, 16)}


class Masked(Pair):
    """Glue on the reader's side takes an input that has the same sequence."""

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.vision(images) * mask.unsqueeze(-1))
        return out


def test_a_sequence_that_is_known_is_cut_for_its_reader() -> None:
    sequence_dims = {"vision": 1, "mask": 1}
    graph = graph_of(Masked(), CUT, LONG, sequence_dims=sequence_dims)
    (plan,) = graph.plans.values()
    assert (plan.dims, plan.grid) == (("sample", "sequence"), (4, 4))
    assert plan.dst.partial == ()
    types = {node.name: str(node.meta["types"]) for node in graph.fx.nodes if node.op != "output"}
    assert types["vision"] == "f32[8@dp,16,8]"
    assert types["mul_language"] == "f32[8@dp,16@tp@cp,8]"
    assert types["mask"] == "f32[8@dp,16]"


def test_a_sequence_that_is_not_known_is_read_whole() -> None:
    (plan,) = graph_of(Masked(), CUT, LONG).plans.values()
    assert (plan.dims, plan.dst.partial) == (("sample",), ("cp",))


def test_equal_grids_that_cut_the_sequence_otherwise_are_a_mismatch() -> None:
    layouts = {"vision": Layout(tp=2, dp=4), "language": Layout(tp=2, dp=4, sp=True)}
    assert not graph_of(Pair(), layouts, {"images": LONG["images"]}).plans
    graph = graph_of(Pair(), layouts, {"images": LONG["images"]}, sequence_dims={"vision": 1})
    (plan,) = graph.plans.values()
    assert [step.kind for step in plan.forward + plan.backward] == ["narrow", "all_gather"]


def test_equal_layouts_with_cp_add_the_gradients_of_what_all_read() -> None:
    layout = Layout(tp=2, cp=2, dp=2)
    (plan,) = graph_of(
        Pair(), dict.fromkeys(CUT, layout), {"images": LONG["images"]}
    ).plans.values()
    assert plan.forward == ()
    assert [step.kind for step in plan.backward] == ["all_reduce"]
    # The source's gradient is averaged over its cp ranks, which are alike.
    assert plan.scale == Fraction(1, 2)


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    call = lambda: graph_of(  # noqa: E731
        Pair(), CUT, {"images": torch.zeros(8, 10, 16)}, sequence_dims={"vision": 1}
    )
    assert_expected_inline(
        refusal(LayoutError, call),
        """\
what language reads of vision, on language (tp2 cp2 dp2 sp zigzag), has a sequence of 10, which
    cp2 and tp2 sp (2 chunks for each cp rank) cut into 4 equal chunks: 10 % 4 = 2. Make it a
    multiple of 4.""",
    )


def test_a_value_without_the_dim_is_refused() -> None:
    call = lambda: graph_of(  # noqa: E731
        Pair(), CUT, {"images": torch.zeros(8, 16)}, sequence_dims={"vision": 2}
    )
    assert_expected_inline(
        refusal(LayoutError, call),
        """\
vision (passes/kit.py:36 x = self.vision(images)): f32[8@dp,8] on vision (tp2 dp4) has no dim 2,
    which is to hold the sequence. Give sequence_dims a dim below 2.""",
    )


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


class Averaged(Pair):
    """Glue before the reader computes with the length of an input."""

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.vision(images) * mask.unsqueeze(-1) / mask.shape[1]
        out: torch.Tensor = self.language(x)
        return out


def test_a_length_that_is_cut_is_refused_before_the_reader() -> None:
    glue = {"vision": Layout(tp=2, cp=2, dp=2), "language": CUT["language"]}
    with pytest.raises(CaptureError, match=r"reads the length of (images|mask), whose sequence"):
        graph_of(Averaged(), glue, LONG, sequence_dims={"vision": 1, "images": 1, "mask": 1})
    # Nothing cuts the mask where the glue runs.
    graph = graph_of(Averaged(), CUT, LONG, sequence_dims={"vision": 1, "mask": 1})
    assert len(graph.plans) == 1


class Loss(Pair):
    """The user's own loss, of this rank's part, takes lengths as they are here."""

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.vision(images)) * mask.unsqueeze(-1)
        return out.reshape(mask.shape[0] * mask.shape[1], -1)


def test_a_length_that_is_cut_is_local_behind_the_reader() -> None:
    graph = graph_of(Loss(), CUT, LONG, sequence_dims={"vision": 1, "mask": 1})
    assert len(graph.plans) == 1


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.projector, self.language = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.projector(self.vision(images)))
        return out


@pytest.mark.parametrize("sp", [False, True])
def test_a_projector_runs_with_its_reader_where_both_cut_the_sequence_alike(sp: bool) -> None:
    layouts = {
        "vision": Layout(tp=8),
        "projector": Layout(tp=2, dp=4),
        "language": Layout(tp=2, dp=4, sp=sp),
    }
    batch = {"images": torch.zeros(8, 16, 8)}
    lengths = {"vision": 1, "projector": 1}
    graph = graph_of(Projected(), layouts, batch, sequence_dims=lengths)
    assert graph.home("projector") == ("projector" if sp else "language")
    assert len(graph.plans) == (2 if sp else 1)


class Table(Pair):
    """A language model that reads a table of weights beside the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.vision(images) + self.table(torch.arange(5)))
        return out


TABLED = {"vision": Layout(dp=4), "table": Layout(tp=4), "language": Layout(tp=2, dp=2)}


def test_a_table_whose_gradient_would_be_that_of_some_samples_is_refused() -> None:
    assert_expected_inline(
        refusal(LayoutError, lambda: graph_of(Table(), TABLED, PAIR_BATCH)),
        """\
table of table (tp4 dp1) is one value for all samples, and language (tp2 dp2) reads it
    (passes/test_redistribute.py:306 out: torch.Tensor = self.language(self.vision(images) +
    self.table(torch.arange(5)))): ranks get gradients of different samples, and the groups over
    dp of table do not have equally many of each. Give table the layout of language, or dp over
    all ranks.""",
    )


@pytest.mark.parametrize("layout", [Layout(dp=4), Layout(tp=2, dp=2), Layout(cp=2, dp=2)])
def test_a_table_that_sees_all_samples_is_not_moved(layout: Layout) -> None:
    graph = graph_of(Table(), {**TABLED, "table": layout}, PAIR_BATCH)
    assert list(graph.plans) == ["vision_language"]


def test_a_table_that_learns_nothing_may_have_any_layout() -> None:
    model = Table()
    model.table.requires_grad_(False)
    graph_of(model, TABLED, PAIR_BATCH)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self) -> torch.Tensor:
        return self.weight.exp()


class Scaled(Table):
    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language(self.vision(images) * self.table())
        return out


def test_a_learned_number_is_refused_alike() -> None:
    model = Scaled()
    model.table = Scale()  # type: ignore[assignment]
    with pytest.raises(LayoutError, match="is one value for all samples"):
        graph_of(model, TABLED, PAIR_BATCH)
    graph_of(model, {**TABLED, "table": Layout(dp=4)}, PAIR_BATCH)


class Balanced(nn.Linear):
    """An encoder with a loss of its own beside the embeddings."""

    def forward(self, images: torch.Tensor) -> Any:
        made = super().forward(images)
        return made, made.square().mean()


class Penalised(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.vision = Balanced(16, 8)

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen, penalty = self.vision(images)
        out: torch.Tensor = self.language(seen).mean() + penalty
        return out


def test_a_loss_that_an_encoder_makes_may_be_added_on_any_layout() -> None:
    graph_of(Penalised(), {"vision": Layout(tp=8), "language": Layout(dp=8)}, PAIR_BATCH)

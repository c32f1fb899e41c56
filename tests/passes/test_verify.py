"""Verify: a good graph passes; one thing broken in it is named, with the lines around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes import PIPELINE
from colocc.passes.graph import Graph
from colocc.passes.solve.solver import solve
from colocc.passes.verify import CHECKS, ORDER, verify
from tests.passes.kit import Pair, graph_of, pair_graph, refusal, trio_graph


def node_of(graph: Graph, name: str) -> fx.Node:
    found: fx.Node = next(n for n in graph.fx.nodes if n.name == name)
    return found


def broken(change: Callable[[Graph], object], graph: Graph | None = None) -> str:
    graph = graph or pair_graph()
    verify(graph, after="phases")
    change(graph)
    return refusal(VerifyError, lambda: verify(graph, after="phases"))


def test_each_pass_has_its_check() -> None:
    assert [name for name, _ in CHECKS] == [step.__name__ for step in PIPELINE]
    assert [name for name in ORDER if name in dict(CHECKS)] == [name for name, _ in CHECKS]


@pytest.mark.parametrize("after", ORDER)
def test_a_good_graph_passes_after_each_pass(after: str) -> None:
    graph = trio_graph()
    before = [n.format_node() for n in graph.fx.nodes]
    verify(graph, after=after)
    assert [n.format_node() for n in graph.fx.nodes] == before


def test_a_check_waits_for_its_pass() -> None:
    graph = pair_graph()
    del node_of(graph, "vision").meta["phase"]
    verify(graph, after="redistribute")
    with pytest.raises(VerifyError, match="vision has no phase or no stage"):
        verify(graph, after="phases")


def test_lint() -> None:
    def change(graph: Graph) -> None:
        node_of(graph, "vision").append(node_of(graph, "images"))

    message = broken(change)
    assert message.startswith("the graph is malformed: Argument 'images' of Node 'vision' was used")
    assert message.endswith("This is a bug in colocc: please report it with the dump.")


def test_two_nodes_of_one_name() -> None:
    def change(graph: Graph) -> None:
        node_of(graph, "vision").name = "images"

    message = broken(change)
    assert "images" in message
    assert "malformed" in message or "two nodes have one name" in message


def test_no_output() -> None:
    def change(graph: Graph) -> None:
        graph.fx.erase_node(graph.output())

    assert_expected_inline(
        broken(change),
        """\
a graph has one output
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_module_that_is_no_layout() -> None:
    def change(graph: Graph) -> None:
        node_of(graph, "vision").meta["module"] = "audio"

    assert_expected_inline(
        broken(change),
        """\
vision runs on 'audio', which is no layout
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
  > %vision  f32[8@dp,5,8] audio [2,5,8]  vision(%images)   <-- here
    %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_no_type() -> None:
    def change(graph: Graph) -> None:
        del node_of(graph, "vision").meta["types"]

    assert_expected_inline(
        broken(change),
        """\
vision has no type
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
  > %vision  vision  vision(%images)   <-- here
    %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_type_on_another_layout() -> None:
    def change(graph: Graph) -> None:
        node = node_of(graph, "vision")
        node.meta["types"] = node.meta["types"].on("language", graph.layouts["language"])

    assert_expected_inline(
        broken(change),
        """\
vision runs on vision, its type is on language
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
  > %vision  f32[8@dp,5,8] vision [4,5,8]  vision(%images)   <-- here
    %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_reader_that_bypasses_its_redistribution() -> None:
    def change(graph: Graph) -> None:
        node_of(graph, "language").args = (node_of(graph, "vision"),)

    assert_expected_inline(
        broken(change),
        """\
language on language (tp4 dp2) reads vision as vision (tp2 dp4) holds it
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
    %vision  f32[8@dp,5,8] vision [2,5,8]  vision(%images)
    %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)
  > %language  f32[8@dp,5,8] language [4,5,8]  language(%vision)   <-- here
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_redistribution_without_a_plan() -> None:
    assert_expected_inline(
        broken(lambda graph: graph.plans.clear()),
        """\
vision_language has no plan, or a plan without being inserted
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
    %vision  f32[8@dp,5,8] vision [2,5,8]  vision(%images)
  > %vision_language  f32[8@dp,5,8] language [4,5,8]  colocc.vision_language(%vision)   <-- here
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_redistribution_that_was_dropped() -> None:
    def change(graph: Graph) -> None:
        node = node_of(graph, "vision_language")
        node_of(graph, "language").args = (node_of(graph, "images"),)
        graph.fx.erase_node(node)
        node_of(graph, "images").meta["module"] = "language"
        node = node_of(graph, "images")
        node.meta["types"] = node.meta["types"].on("language", graph.layouts["language"])
        vision = node_of(graph, "vision")
        vision.args = (None,)

    assert_expected_inline(
        broken(change),
        """\
the redistributions ['vision_language'] were dropped
This is a bug in colocc: please report it with the dump.""",
    )


def change_plan(**fields: object) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        plan = graph.plans["vision_language"]
        graph.plans["vision_language"] = replace(plan, **fields)  # type: ignore[arg-type]

    return change


def test_a_plan_between_other_modules() -> None:
    dst = pair_graph().plans["vision_language"].dst
    assert_expected_inline(
        broken(change_plan(dst=replace(dst, module="audio"))),
        """\
the plan of vision_language goes vision -> audio
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
    %vision  f32[8@dp,5,8] vision [2,5,8]  vision(%images)
  > %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)   <-- here
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_plan_for_other_layouts() -> None:
    src = pair_graph().plans["vision_language"].src
    change = change_plan(src=replace(src, layout=Layout(tp=4, dp=2)))
    assert_expected_inline(
        broken(change),
        """\
the plan of vision_language was solved for other layouts
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
    %vision  f32[8@dp,5,8] vision [2,5,8]  vision(%images)
  > %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)   <-- here
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_plan_that_misses_a_step() -> None:
    assert_expected_inline(
        broken(change_plan(forward=())),
        """\
plan vision (tp2 dp4) -> language (tp4 dp2) is wrong: forward, rank 0 ends with sample 0:1, it
    needs sample 0:2. This is a bug in colocc: please report it with the dump.
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
    %vision  f32[8@dp,5,8] vision [2,5,8]  vision(%images)
  > %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)   <-- here
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_wrong_scale() -> None:
    assert_expected_inline(
        broken(change_plan(scale=Fraction(1))),
        """\
plan vision (tp2 dp4) -> language (tp4 dp2) is wrong: the gradient is scaled by 1, not by 2.
    This is a bug in colocc: please report it with the dump.
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
    %vision  f32[8@dp,5,8] vision [2,5,8]  vision(%images)
  > %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)   <-- here
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_an_encoder_behind_the_language_model() -> None:
    def change(graph: Graph) -> None:
        node_of(graph, "vision").meta["phase"] = "language"

    assert_expected_inline(
        broken(change),
        """\
vision_language (encode) reads vision (language)
    %images  f32[8@dp,5,16] vision [2,5,16]  input(images)
    %vision  f32[8@dp,5,8] vision [2,5,8]  vision(%images)
  > %vision_language  f32[8@dp,5,8] language [4,5,8]  redistribute(%vision)   <-- here
    %language  f32[8@dp,5,8] language [4,5,8]  language(%vision_language)
    return %language
This is a bug in colocc: please report it with the dump.""",
    )


def test_a_value_of_the_first_stage_on_the_last() -> None:
    def change(graph: Graph) -> None:
        node_of(graph, "where").meta["stage"] = "last"

    message = broken(change, trio_graph())
    assert message.startswith("where (last stage) reads unsqueeze (first stage)\n")
    assert "<-- here" in message


def cut_graph(language: Layout, vision: Layout | None = None) -> Graph:
    layouts = {"vision": vision or Layout(tp=2, dp=4), "language": language}
    batch = {"images": torch.zeros(8, 16, 16)}
    return graph_of(Pair(), layouts, batch, sequence_dims={"vision": 1})


def bypass(graph: Graph) -> None:
    node_of(graph, "language").args = (node_of(graph, "vision"),)
    graph.fx.erase_node(node_of(graph, "vision_language"))
    del graph.plans["vision_language"]


@pytest.mark.parametrize(
    "graph",
    [
        lambda: cut_graph(Layout(tp=2, dp=4, sp=True)),
        lambda: cut_graph(Layout(cp=2, dp=4, zigzag=True), Layout(cp=2, dp=4)),
        lambda: graph_of(
            Pair(),
            dict.fromkeys(("vision", "language"), Layout(cp=2, dp=4)),
            {"images": torch.zeros(8, 16, 16)},
        ),
    ],
    ids=["one side cut", "cut otherwise", "gradients to add"],
)
def test_equal_grids_that_need_a_redistribution(graph: Callable[[], Graph]) -> None:
    assert "reads vision as vision" in broken(bypass, graph())


def test_a_plan_that_does_not_cut_the_sequence() -> None:
    def change(graph: Graph) -> None:
        plan = graph.plans["vision_language"]
        graph.plans["vision_language"] = solve(
            (plan.src.module, plan.src.layout),
            (plan.dst.module, plan.dst.layout),
            scale=plan.scale,
            value=plan.value,
        )

    text = broken(change, cut_graph(Layout(tp=2, cp=2, dp=2)))
    assert "cuts ('sample',), its value is cut by ('sample', 'sequence')" in text

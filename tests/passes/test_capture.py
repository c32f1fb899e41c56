"""Capture: what becomes one call, what is refused, and with which words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from colocc.errors import CaptureError, LayoutError
from colocc.layout import Layout
from colocc.passes.capture import capture, find_targets, leaf
from colocc.passes.graph import Graph, Traits
from colocc.passes.specialize import specialize
from colocc.passes.verify import verify
from tests.passes.kit import PAIR_LAYOUTS, TRIO_LAYOUTS, Pair, Trio, refusal, trio_graph

HERE = "passes/test_capture.py"


def calls(graph: Graph) -> list[str]:
    return [str(graph.module_of(n)) for n in graph.fx.nodes if graph.module_of(n)]


def ops(graph: Graph) -> list[str]:
    return [f"{node.op} {node.name}" for node in graph.fx.nodes]


def test_each_module_of_the_layouts_is_one_call_with_the_users_line() -> None:
    graph = capture(Trio(), TRIO_LAYOUTS)
    assert calls(graph) == ["vision", "audio", "language"]
    assert [n.meta["path"] for n in graph.placeholders()] == [("images",), ("clips",), ("mask",)]
    node = next(n for n in graph.fx.nodes if graph.module_of(n) == "vision")
    assert node.meta["line"].startswith("passes/kit.py:")
    assert node.meta["line"].endswith("seen = self.vision(images)")
    assert (graph.name, node.meta["kind"]) == ("Trio", "Linear")


def test_the_graph_computes_what_the_model_does() -> None:
    model = Trio()
    batch = [torch.randn(8, 5, 16), torch.randn(8, 5, 4), torch.rand(8, 5) > 0.5]
    graph = capture(model, TRIO_LAYOUTS)
    result = fx.Interpreter(model, graph=graph.fx).run(*batch)
    assert torch.equal(result, model(*batch))


class Direct(Pair):
    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.language.forward(input=self.vision.forward(images) * mask)
        return out


def test_a_direct_forward_and_keyword_arguments_are_seen() -> None:
    model = Direct()
    graph = capture(model, PAIR_LAYOUTS)
    assert calls(graph) == ["vision", "language"]
    call = next(n for n in graph.fx.nodes if graph.module_of(n) == "language")
    assert list(call.kwargs) == ["input"]
    assert "forward" not in model.vision.__dict__
    assert "forward" not in model.language.__dict__


class Dicts(Pair):
    def forward(  # type: ignore[override]
        self, inputs: Mapping[str, Any], mask: torch.Tensor, scale: float = 2.0
    ) -> torch.Tensor:
        x = self.vision(inputs["images"]["pixels"])
        out: torch.Tensor = self.language(x * mask * scale)
        return out


def test_a_dict_input_is_one_placeholder_per_tensor() -> None:
    batch = {"inputs": {"images": {"pixels": torch.zeros(2, 16)}}, "mask": torch.ones(2, 1)}
    graph = capture(Dicts(), PAIR_LAYOUTS, example_inputs=batch)
    paths = [n.meta["path"] for n in graph.placeholders()]
    assert paths == [("inputs", "images", "pixels"), ("mask",)]


def test_a_default_stays_a_constant_unless_the_batch_gives_it() -> None:
    batch: dict[str, Any] = {"inputs": {"images": {"pixels": torch.zeros(2, 16)}}, "mask": None}
    batch["mask"] = torch.ones(2, 1)
    assert len(capture(Dicts(), PAIR_LAYOUTS, example_inputs=batch).placeholders()) == 2
    batch["scale"] = torch.ones(2, 1)
    assert len(capture(Dicts(), PAIR_LAYOUTS, example_inputs=batch).placeholders()) == 3


def test_a_forward_input_that_nothing_reads_is_no_input() -> None:
    graph = capture(Pair(), PAIR_LAYOUTS)
    assert [n.meta["path"] for n in graph.placeholders()] == [("images",)]


class Triple(torch.autograd.Function):
    """The value as it is, three times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 3


def triple(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = Triple.apply(x)  # type: ignore[no-untyped-call]
    return out


def test_fx_alone_loses_a_custom_backward() -> None:
    """The trap: without the refusal below a trace gives the right loss and wrong gradients."""
    model = Pair(triple)
    x, mask = torch.randn(2, 16), torch.ones(2, 1)
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(x, mask), model(x, mask))
    weight = model.vision.weight
    right = torch.autograd.grad(model(x, mask).sum(), weight)[0]
    lost = torch.autograd.grad(traced(x, mask).sum(), weight)[0]
    torch.testing.assert_close(right, 3 * lost)


def test_a_custom_backward_in_glue_is_refused_with_the_users_line() -> None:
    apply = torch.autograd.Function.__dict__["apply"]
    message = refusal(CaptureError, lambda: capture(Pair(triple), PAIR_LAYOUTS))
    assert f"{HERE}:{line_of(triple)} out: torch.Tensor = Triple.apply(x)" in message
    assert message.startswith("Triple.apply() has a backward of its own, which a trace would lose.")
    assert "@colocc.leaf" in message
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_a_custom_backward_in_a_leaf_keeps_its_gradient() -> None:
    model = Pair(leaf(triple))
    x, mask = torch.randn(2, 16), torch.ones(2, 1)
    graph = capture(model, PAIR_LAYOUTS)
    result = fx.Interpreter(model, graph=graph.fx).run(x, mask)
    weight = model.vision.weight
    got = torch.autograd.grad(result.sum(), weight)[0]
    assert torch.equal(got, torch.autograd.grad(model(x, mask).sum(), weight)[0])


def line_of(fn: Any) -> int:
    """The first line of a function's body."""
    first: int = fn.__code__.co_firstlineno
    return first + 1


def in_place(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return x


def test_fx_alone_drops_an_unread_in_place_call_and_capture_does_not() -> None:
    """The trap: a call whose result nothing reads may still change a tensor, as collectives do."""
    model = Pair(in_place)
    traced = fx.symbolic_trace(model)
    traced.graph.eliminate_dead_code()
    assert "mul_" not in [str(node.target) for node in traced.graph.nodes]
    graph = capture(model, PAIR_LAYOUTS)
    assert "call_method mul_" in ops(graph)


def test_a_redistribution_that_nothing_reads_is_kept() -> None:
    """The trap: it is collective, so a rank that has no use for it must still take part in it."""
    graph = trio_graph()
    last = specialize(graph, rank=7)
    for name in graph.plans:
        node = next(n for n in last.fx.nodes if n.name == name)
        assert (node.op, len(node.users)) == ("call_module", 0)
    verify(last, after="specialize")
    root = nn.ModuleDict({"vision": nn.Linear(16, 8), "audio": nn.Linear(4, 8)})
    root["language"], root["colocc"] = nn.Linear(8, 8), nn.ModuleDict()
    for name in graph.plans:
        root["colocc"][name] = nn.Identity()  # type: ignore[operator]
    module = fx.GraphModule(root, last.fx)
    module.graph.eliminate_dead_code()
    assert not set(graph.plans) & {node.name for node in module.graph.nodes}


def branch(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x
    return -x


def test_control_flow_on_values_is_refused_with_file_and_line() -> None:
    with pytest.raises(CaptureError) as info:
        capture(Pair(branch), PAIR_LAYOUTS)
    assert str(info.value).replace(f":{line_of(branch)} ", ":LINE ") == (
        "Pair.forward cannot be traced: its control flow or arithmetic looks at the value of a "
        "tensor.\n"
        f"  at {HERE}:LINE if x.sum() > 0:\n"
        "  Move that code into a function marked @colocc.leaf (it must treat every sample on its "
        "own), or into a module that the layouts name."
    )


def broken(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    raise KeyError("pixels")


def test_an_error_of_the_users_own_is_shown_with_its_line() -> None:
    message = refusal(CaptureError, lambda: capture(Pair(broken), PAIR_LAYOUTS))
    assert "Pair.forward cannot be traced: KeyError: 'pixels'" in message
    assert f'at {HERE}:{line_of(broken)} raise KeyError("pixels")' in message


def test_a_leaf_is_one_call_of_the_graph_and_itself_outside_of_it() -> None:
    looked = leaf(branch)
    graph = capture(Pair(looked), PAIR_LAYOUTS)
    assert "call_function branch" in ops(graph)
    x = torch.randn(2, 8)
    assert torch.equal(looked(x, x), branch(x, x))


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    model = Pair(branch)
    with pytest.raises(CaptureError):
        capture(model, PAIR_LAYOUTS)
    assert "forward" not in model.vision.__dict__
    x = torch.randn(2, 16)
    assert model(x, x).shape == (2, 8)


def test_a_module_that_the_model_lacks() -> None:
    layouts = {**PAIR_LAYOUTS, "audio": Layout(tp=8)}
    assert_expected_inline(
        refusal(LayoutError, lambda: capture(Pair(), layouts)),
        """\
layouts names 'audio', but Pair has no such module. Use a submodule path or one of: language,
    vision""",
    )


def test_a_parameter_that_no_layout_covers() -> None:
    layouts = {"vision": Layout(tp=8)}
    assert_expected_inline(
        refusal(LayoutError, lambda: capture(Pair(), layouts)),
        """\
no layout covers the parameter language.weight [8, 8]: layouts names vision (vision). Add a
    layout for 'language', or move it into one of these modules.""",
    )


def test_a_weight_that_two_layouts_share() -> None:
    model = Pair()
    model.vision = nn.Linear(8, 8)
    model.vision.weight = model.language.weight
    assert_expected_inline(
        refusal(LayoutError, lambda: capture(model, PAIR_LAYOUTS)),
        """\
vision (tp2 dp4) and language (tp4 dp2) share the weight language.weight, whose gradient each
    would reduce over other ranks. Give them one layout, or each its own copy.""",
    )
    capture(model, dict.fromkeys(PAIR_LAYOUTS, Layout(tp=8)))
    model.requires_grad_(False)
    capture(model, PAIR_LAYOUTS)


class Nested(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.language = nn.Sequential(nn.Linear(8, 8))  # type: ignore[assignment]


def test_layouts_inside_one_another() -> None:
    layouts = {**PAIR_LAYOUTS, "language.0": Layout(tp=8)}
    assert_expected_inline(
        refusal(LayoutError, lambda: capture(Nested(), layouts)),
        """\
layouts names both 'language' (language) and 'language.0' (language.0), which is part of it.
    Give each parameter one layout.""",
    )


def test_two_names_of_one_module() -> None:
    traits = Traits(targets={"images": "vision"})
    layouts = {"images": Layout(tp=8), **PAIR_LAYOUTS}
    message = refusal(LayoutError, lambda: find_targets(Pair(), layouts, traits))
    assert message.startswith("layouts names both 'images' (vision) and 'vision' (vision)")


def test_an_example_that_the_forward_does_not_take() -> None:
    batch = {"images": torch.zeros(2, 16), "clips": torch.zeros(2, 4)}
    call = lambda: capture(Pair(), PAIR_LAYOUTS, example_inputs=batch)  # noqa: E731
    assert_expected_inline(
        refusal(CaptureError, call),
        """example_inputs has 'clips', which Pair.forward does not take; it takes images, mask""",
    )

"""Covers runtime/execute.py: one phase in order, each value let go after its last reader."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from colocc import passes
from colocc.errors import CaptureError
from colocc.layout import Layout
from colocc.passes.capture import Method
from colocc.passes.graph import Graph
from colocc.passes.phases import cut
from colocc.runtime.execute import Executor

LAYOUTS = {"vision": Layout(tp=2), "decoder": Layout(dp=2)}


class Model(nn.Module):
    """Two modules, glue of every kind of node, and two results."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.decoder = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("bias", torch.arange(4.0))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        seen = self.vision(images).mul(2.0)
        joined = torch.where(mask.unsqueeze(-1), seen, self.bias)
        return {"logits": self.decoder(joined), "both": (seen, mask)}


def graph_of(model: nn.Module) -> Graph:
    return passes.run(
        model,
        LAYOUTS,
        reductions=dict.fromkeys(LAYOUTS, "mean"),
        example_inputs=batch(),
    )


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.randn(4, 3, generator=generator),
        "mask": torch.tensor([True, False, True, True]),
    }


def inputs(graph: Graph) -> dict[fx.Node, Any]:
    given = batch()
    return {node: given[node.meta["path"][0]] for node in graph.placeholders()}


def keep(value: Tensor, *, samples: int | None) -> Tensor:
    assert samples == len(value)
    return value.clone()


def executors(graph: Graph, model: nn.Module) -> tuple[Executor, Executor]:
    """Both phases, with redistributions that move nothing."""
    moves = dict.fromkeys(graph.plans, keep)
    cut = [n for n in graph.nodes if n.meta["cut"]]
    encode = Executor(graph, "encode", model, moves, cut)
    language = Executor(graph, "language", model, moves, graph.output().all_input_nodes)
    return encode, language


def run(graph: Graph, model: nn.Module) -> Any:
    encode, language = executors(graph, model)
    values = inputs(graph)
    crossing = encode(dict(values), samples=4)
    results = language({**values, **dict(zip(encode.results, crossing, strict=True))})
    found = dict(zip(language.results, results, strict=True))
    return fx.node.map_arg(graph.output().args[0], found.__getitem__)


def test_both_phases_are_the_model_bit_by_bit() -> None:
    model = Model()
    graph = graph_of(model)
    assert graph.plans
    out, wanted = run(graph, model), model(**batch())
    assert torch.equal(out["logits"], wanted["logits"])
    assert all(torch.equal(a, b) for a, b in zip(out["both"], wanted["both"], strict=True))


def test_the_gradient_is_the_model_s() -> None:
    model = Model()
    graph = graph_of(model)
    found = torch.autograd.grad(run(graph, model)["logits"].sum(), list(model.parameters()))
    wanted = torch.autograd.grad(model(**batch())["logits"].sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_value_is_let_go_after_its_last_reader() -> None:
    model = Model()
    graph = graph_of(model)
    encode, _ = executors(graph, model)
    made: dict[str, weakref.ref[Tensor]] = {}
    alive: dict[str, list[str]] = {}
    run = encode._run

    def watched(node: fx.Node, values: Any) -> Any:
        alive[node.name] = [n for n, ref in made.items() if ref() is not None and n != "bias"]
        value = run(node, values)
        made[node.name] = weakref.ref(value)
        return value

    encode._run = watched  # type: ignore[method-assign]
    values = inputs(graph)
    with torch.no_grad():
        crossing = encode(values, samples=4)
    order = list(alive)
    nodes = {node.name: node for node in encode.nodes}
    assert order == [node.name for node in graph.nodes if node in encode.nodes]
    for index, name in enumerate(order):
        due = [n for n in order[:index] if nodes[n] in encode.results]
        due += [
            n for n in order[:index] if any(user.name in order[index:] for user in nodes[n].users)
        ]
        assert set(alive[name]) == set(due) - {"bias"}, name
    assert "vision" not in alive[order[-1]]
    assert all(made[n.name]() is value for n, value in zip(encode.results, crossing, strict=True))
    assert {node for node in values if node.op != "placeholder"} == set(encode.results)


def test_a_result_outlives_its_readers() -> None:
    model = Model()
    graph = graph_of(model)
    _, language = executors(graph, model)
    spent = {node for nodes in language.lets_go.values() for node in nodes}
    assert not spent & set(language.results)


def test_a_module_that_was_wrapped_later_is_called_through_its_wrapper() -> None:
    class Doubled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.module(x) * 2
            return out

    model = Model()
    graph = graph_of(model)
    before = run(graph, model)["logits"]
    model.decoder = Doubled(model.decoder)  # type: ignore[assignment]
    assert torch.equal(run(graph, model)["logits"], before * 2)


def by_hand(make: Callable[[fx.Graph, fx.Node], fx.Node]) -> Graph:
    graph = fx.Graph()
    node = make(graph, graph.placeholder("x"))
    graph.output(node)
    for each in graph.nodes:
        each.meta["phase"] = "language"
    return Graph(graph, "Model", {}, {})


def test_a_method_is_bound_to_the_model() -> None:
    class Merging(nn.Module):
        def merge(self, left: Tensor, *, right: float) -> Tensor:
            return left + right

    call = Method("merge", "first")
    graph = by_hand(lambda g, x: g.call_function(call, (x,), {"right": 2.0}))
    run_it = Executor(graph, "language", Merging(), {}, graph.output().all_input_nodes)
    (x,) = graph.placeholders()
    assert run_it({x: torch.ones(1)}) == [torch.full((1,), 3.0)]


def test_an_attribute_is_read_when_the_graph_runs() -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.scale = 2.0  # type: ignore[assignment]

    model = Holding()
    graph = by_hand(
        lambda g, x: g.call_function(
            torch.mul, (x, g.create_node("get_attr", "inner.scale", (), {}))
        )
    )
    for node in graph.nodes:
        node.meta["phase"] = "language"
    run_it = Executor(graph, "language", model, {}, graph.output().all_input_nodes)
    (x,) = graph.placeholders()
    assert run_it({x: torch.ones(1)})[0].item() == 2.0
    model.inner.scale = 5.0  # type: ignore[assignment]
    assert run_it({x: torch.ones(1)})[0].item() == 5.0


def test_an_error_of_the_model_comes_out_as_it_is() -> None:
    model = Model()
    graph = graph_of(model)
    encode, _ = executors(graph, model)
    values = inputs(graph)
    images = next(n for n in values if n.meta["path"] == ("images",))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        encode({**values, images: torch.zeros(4, 7)})


def test_ranks_settle_before_the_first_redistribution() -> None:
    """All of this rank's own work comes first; its error goes to ``settle``, which raises it."""
    model = Model()
    graph = graph_of(model)
    heard: list[tuple[list[str], str | None]] = []

    def settle(values: Any, error: Exception | None) -> None:
        heard.append(([node.name for node in values], None if error is None else str(error)))
        if error is not None:
            raise CaptureError("settled") from error

    moves = dict.fromkeys((n.name for n in graph.fx.nodes if n.name in graph.plans), keep)
    assert moves
    encode = Executor(graph, "encode", model, moves, cut(graph), settle=settle)
    own = [node.name for node in encode.nodes[: encode.own]]
    assert "vision" in own and not set(own) & set(moves)
    assert {node.name for node in encode.nodes[encode.own :]} >= set(moves)
    values = inputs(graph)
    images = next(n for n in values if n.meta["path"] == ("images",))
    encode({**values}, samples=4)
    with pytest.raises(CaptureError, match="settled"):
        encode({**values, images: torch.zeros(4, 7)}, samples=4)
    (reached, fine), (_, failed) = heard
    assert fine is None and not set(reached) & set(moves)
    assert failed is not None and "mat1 and mat2 shapes" in failed

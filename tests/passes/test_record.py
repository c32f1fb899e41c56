"""Record: ordinary forwards go through; branches become guards; what looks at data is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colocc import passes
from colocc.errors import CaptureError
from colocc.passes.capture import leaf
from colocc.passes.graph import Graph
from colocc.passes.rows import Rows
from colocc.runtime.execute import Executor
from tests.passes.kit import PAIR_LAYOUTS

SIZE, LENGTH, PLACE = 8, 6, 9


@dataclass
class Output:
    logits: Tensor
    features: Any = None
    kind: str = "none"


class Tower(nn.Linear):
    """Two features of each image, in a dataclass."""

    def forward(self, pixels: Tensor, *, scale: float = 1.0) -> Any:
        made = super().forward(pixels).unflatten(1, (2, 8)) * scale
        return Output(logits=made, features=[made * 2], kind="tower")


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, embeds: Tensor) -> Any:
        return (self.out(embeds),)


Merge = Callable[["Model", Tensor, Tensor, Tensor], Tensor]


def scatter(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    return embeds.masked_scatter((ids == PLACE).unsqueeze(-1), features)


class Model(nn.Module):
    """A tower and a decoder in the style of Hugging Face, with the merge to be tried."""

    def __init__(self, merge: Merge = scatter) -> None:
        super().__init__()
        self.vision, self.language = Tower(4, 16), Decoder()
        self.merge = merge
        self.cache: Any = None

    def forward(
        self, ids: Any, *, pixels: Tensor | None = None, bias: Any = None, **kwargs: Any
    ) -> Output:
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise ValueError("ids are [samples, tokens]")
        embeds = self.language.embed(ids)
        output = None
        if pixels is not None:
            output = self.vision(pixels.to(embeds.device, embeds.dtype), **kwargs)
            embeds = self.merge(self, embeds, ids, output.logits)
        self.cache = embeds
        (logits,) = self.language(embeds=embeds)
        return Output(logits, features=output)


def batch(size: int = SIZE, length: int = LENGTH) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8, (size, length), generator=generator)
    ids[:, 1:3] = PLACE
    return {"ids": ids, "pixels": torch.randn(size, 4, generator=generator)}


def graph_of(model: nn.Module, example: dict[str, Any] | None = None, **more: Any) -> Graph:
    return passes.run(model, PAIR_LAYOUTS, reductions={}, example_inputs=example or batch(), **more)


def run(graph: Graph, model: nn.Module, given: dict[str, Any]) -> Any:
    """The graph on one rank that holds all samples: redistributions hand on what they get."""
    moves = dict.fromkeys(graph.plans, lambda value, *, samples: value)
    values = {n: given[n.meta["path"][0]] for n in graph.placeholders()}
    cut = [n for n in graph.nodes if n.meta.get("cut")]
    early = {n: v for n, v in values.items() if n.meta["phase"] == "encode"}
    crossing = Executor(graph, "encode", model, moves, cut)(early)
    late = {n: v for n, v in values.items() if n.meta["phase"] == "language"}
    (result,) = Executor(graph, "language", model, moves, graph.output().all_input_nodes)(
        late | dict(zip(cut, crossing, strict=True))
    )
    return result


def setitem(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    embeds[ids == PLACE] = features.reshape(-1, features.shape[-1])
    return embeds


def flat_setitem(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    samples, tokens, width = embeds.shape
    rows = embeds.reshape(samples * tokens, width)
    rows[ids.reshape(samples * tokens) == PLACE] = features.reshape(-1, width)
    return rows.reshape(samples, tokens, width)


def in_place(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    features.mul_(2)
    places = (ids == PLACE).unsqueeze(-1).expand_as(embeds)
    if places.shape != embeds.shape:
        raise ValueError("one place for each element")
    return embeds.masked_scatter_(places, features)


def listed(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    joined = torch.cat(list(features), dim=0)
    torch._check(joined.numel() == (ids == PLACE).sum().item() * embeds.shape[-1])
    return scatter(model, embeds, ids, joined)


def stacked(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    return scatter(model, embeds, ids, torch.stack([*features]))


def without_grad(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    with torch.no_grad():
        size = features.square().mean(dim=(1, 2), keepdim=True)
    return scatter(model, embeds, ids, features / (size + 1))


MERGES: dict[str, Merge] = {
    "no_grad": without_grad,
    "masked_scatter": scatter,
    "setitem": setitem,
    "setitem on rows": flat_setitem,
    "in place": in_place,
    "a list": listed,
    "a stack": stacked,
}


@pytest.mark.parametrize("name", MERGES)
def test_the_graph_computes_what_the_model_does_with_its_gradients(name: str) -> None:
    model = Model(MERGES[name])
    graph = graph_of(model)
    assert model.cache is None
    for size, length in ((SIZE, LENGTH), (4, 9)):
        given = batch(size, length)
        kept = {key: value.clone() for key, value in given.items()}
        result, wanted = run(graph, model, given), model(**given)
        assert isinstance(result, Output)
        torch.testing.assert_close(result.logits, wanted.logits)
        got = torch.autograd.grad(result.logits.square().sum(), list(model.parameters()))
        right = torch.autograd.grad(wanted.logits.square().sum(), list(model.parameters()))
        torch.testing.assert_close(got, right)
        assert all(torch.equal(value, kept[key]) for key, value in given.items())
        model.cache = None


def test_a_graph_that_is_compiled_under_no_grad_trains() -> None:
    model, given = Model(), batch()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            graph = graph_of(model)
        run(graph, model, given).logits.square().sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        model.zero_grad()


def test_what_an_encoder_made_is_left_out_of_a_returned_dataclass() -> None:
    model = Model()
    graph = graph_of(model)
    assert list(graph.plans) == ["getattr_1_language"]
    assert run(graph, model, batch()).features == Output(None, [None], "tower")  # type: ignore[arg-type]
    assert any("what vision made is None in the Output" in note for note in graph.notes)


def test_a_keyword_that_is_no_tensor_is_a_guard() -> None:
    graph = graph_of(Model(), {**batch(), "scale": 3.0})
    assert graph.guards is not None
    assert ("scale is 3.0", "as in the example") in graph.guards.lines()


def counted(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    if (ids == PLACE).sum() != features.shape[0] * features.shape[1]:
        raise ValueError("counts")
    return scatter(model, embeds, ids, features)


def looped(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    for index in range(ids.shape[0]):
        embeds = embeds + index
    return embeds


def length_of(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    return embeds * len(features)


def one_of(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    first: Tensor = next(iter(features))
    return embeds + first.sum()


def aliased(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    first = embeds[:, 0]
    embeds[:, 0] = 0.0
    return embeds + first.unsqueeze(1)


def a_weight(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    with torch.no_grad():
        model.language.out.bias.zero_()
    return embeds


def from_values(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    return embeds.masked_scatter(embeds > 0, features)


def hooked(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    made = features * 1
    made.register_hook(lambda gradient: gradient / 2)
    return scatter(model, embeds, ids, made)


def cast(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return scatter(model, embeds, ids, features)


def inferred(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    with torch.inference_mode():
        size = features.square()
    return scatter(model, embeds, ids, features / size)


def changed(model: Model, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    with torch.no_grad():
        features.mul_(2)
    return scatter(model, embeds, ids, features)


REFUSED: dict[str, tuple[Merge, str]] = {
    "a hook": (hooked, "register_hook sees a gradient, which the graph would lose"),
    "autocast": (cast, "it changes torch.autocast, which the graph would lose"),
    "inference_mode": (inferred, "it enters torch.inference_mode: write torch.no_grad"),
    "in place without a gradient": (changed, "mul_ changes what has a gradient in place under"),
    "a branch on data": (counted, "looks at the value of a tensor"),
    "a loop over samples": (looped, "the number of samples, 8 in the example, is used as a plain"),
    "len": (length_of, "the number of samples, 8 in the example, is used as a plain number"),
    "one sample": (one_of, "takes out one of the 8 parts of a value that holds all samples"),
    "an alias": (aliased, "shares memory with one that was changed in place"),
    "a weight": (a_weight, "changes language.out.bias of the model in place"),
    "a mask of values": (from_values, "masked_scatter on a tensor that is split by sample may mix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_the_users_line_and_the_remedy(name: str) -> None:
    merge, problem = REFUSED[name]
    with pytest.raises(CaptureError) as info:
        graph_of(Model(merge))
    message = str(info.value)
    assert problem in message
    assert "passes/test_record.py:" in message
    assert "@colocc.leaf" in message


class Twins(Tower):
    """A tower that returns one tensor twice, and its input."""

    def forward(self, pixels: Tensor, *, scale: float = 1.0) -> Any:
        made = super().forward(pixels, scale=scale).logits
        return made, made[:, :1], pixels


class Changed(Model):
    """Changes one part of what its tower returns, and reads another."""

    def __init__(self, changed: int, read: int) -> None:
        super().__init__()
        self.vision = Twins(4, 16)
        self.changed, self.read = changed, read

    def forward(self, ids: Any, *, pixels: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        parts = (*self.vision(pixels), pixels)
        parts[self.changed].mul_(2)
        return self.language(scatter(self, self.language.embed(ids), ids, self.both(parts)))

    def both(self, parts: Any) -> Tensor:
        return parts[0] + parts[self.read].flatten(1)[:, :1, None]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("changed", "read"), [(1, 0), (2, 3), (3, 2)])
def test_parts_of_a_result_that_share_memory(changed: int, read: int) -> None:
    with pytest.raises(CaptureError, match="shares memory with one that was changed in place"):
        graph_of(Changed(changed, read))
    graph_of(Changed(2, 0))


def test_a_leaf_that_looks_at_data_says_its_shapes() -> None:
    @leaf(shapes=lambda model, embeds, ids, features: torch.empty_like(embeds))
    def merge(model: Any, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
        return counted(model, embeds, ids, features)

    model = Model(lambda model, embeds, ids, features: merge(None, embeds, ids, features))
    graph = graph_of(model)
    given = batch(4)
    torch.testing.assert_close(run(graph, model, given).logits, model(**given).logits)


def test_rows_of_an_input_that_each_sample_has_several_of() -> None:
    class Patches(Model):
        def forward(self, ids: Tensor, *, pixels: Tensor, **kwargs: Any) -> Output:  # type: ignore[override]
            return super().forward(ids, pixels=pixels.unflatten(0, (-1, 2)).mean(1), **kwargs)

    given = batch()
    given["pixels"] = given["pixels"].repeat_interleave(2, 0)
    graph = graph_of(Patches(), given, batch_dims={"pixels": Rows()})
    pixels = next(n for n in graph.placeholders() if n.name == "pixels")
    assert str(pixels.meta["types"]) == "f32[8*2@dp,4]"

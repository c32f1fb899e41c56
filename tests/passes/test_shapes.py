"""Types come from the example at two batch sizes; the dim that grows holds the samples."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from colocc.errors import CaptureError, LayoutError
from colocc.layout import Layout
from colocc.passes.shapes import batch_size_of, lookup, open_type, tensors_of
from tests.passes.kit import PAIR_LAYOUTS, Pair, graph_of, pair_graph, refusal, trio_graph


def types(model: nn.Module, batch: dict[str, torch.Tensor], **more: object) -> list[str]:
    graph = graph_of(model, PAIR_LAYOUTS, batch, **more)
    return [f"{n.name} {n.meta['types']}" for n in graph.fx.nodes if n.op != "output"]


def test_types_of_a_graph() -> None:
    graph = trio_graph()
    shown = [f"{n.name} {n.meta['types']}" for n in graph.fx.nodes if n.op != "output"]
    assert_expected_inline(
        "\n".join(shown),
        """\
images f32[8@dp,5,16]
clips f32[8@dp,5,4]
mask bool[8@dp,5]
vision f32[8@dp,5,8]
vision_language f32[8@dp,5,8]
audio f32[8@dp,5,8]
audio_language f32[8@dp,5,8]
unsqueeze bool[8@dp,5,1]
where f32[8@dp,5,8]
language f32[8@dp,5,8]""",
    )
    assert graph.batch_size == 8


def test_the_batch_dim_is_where_the_value_grows() -> None:
    batch = {"images": torch.zeros(5, 8, 16)}
    found = types(Pair(), batch, batch_dims={"images": 1})
    assert found[0] == "images f32[5,8@dp,16]"
    assert found[-1] == "language f32[5,8@dp,8]"


def test_samples_flattened_with_their_rows() -> None:
    graph = pair_graph(lambda x, mask: x.flatten(0, 1))
    assert [str(n.meta["types"]) for n in graph.fx.nodes if graph.module_of(n) == "language"] == [
        "f32[8*5@dp,8]"
    ]


def test_a_result_that_does_not_grow_with_the_samples_is_refused() -> None:
    with pytest.raises(CaptureError, match="one dim must grow with the samples"):
        pair_graph(lambda x, mask: torch.cat([x, x[:1]]))


def test_a_shape_that_fits_one_batch_size_only_is_refused() -> None:
    with pytest.raises(CaptureError) as info:
        pair_graph(lambda x, mask: x.view(8, 40).view(8, 5, 8))
    assert "passes/test_shapes.py:" in str(info.value)
    assert "view fixes the number of samples to the example's 8" in str(info.value)


def test_nothing_is_computed_and_no_module_changes() -> None:
    model = Pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"images": torch.zeros(8, 5, 16, device="meta")}
    assert types(model, batch)[-1] == "language f32[8@dp,5,8]"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_that_disagree_on_the_batch() -> None:
    batch = {"images": torch.zeros(8, 16), "mask": torch.ones(4, 1)}
    assert_expected_inline(
        refusal(LayoutError, lambda: batch_size_of(batch, {})),
        """\
the batch has 8 samples in images and 4 in mask. Give every input the same number, or say which
    dim holds them: batch_dims={'mask': 1}""",
    )
    assert batch_size_of({"images": torch.zeros(8, 4), "mask": torch.ones(1, 8)}, {"mask": 1}) == 8


def test_an_example_without_a_batch() -> None:
    call = lambda: batch_size_of({"flag": True, "scale": torch.tensor(1.0)}, {})  # noqa: E731
    assert_expected_inline(
        refusal(LayoutError, call), """example_inputs holds no tensor with a batch dim"""
    )


def test_nested_inputs_are_found_by_path() -> None:
    pixels = torch.zeros(2, 3)
    batch = {"inputs": {"images": {"pixels": pixels}}, "ids": torch.zeros(2)}
    paths = [path for path, _ in tensors_of(batch)]
    assert paths == [("inputs", "images", "pixels"), ("ids",)]
    assert lookup(batch, paths[0]) is pixels
    assert lookup(batch, ("inputs", "audio", "pixels")) is None


def test_an_open_type_knows_the_batch_alone() -> None:
    value = open_type("images", Layout(tp=2, dp=4))
    assert (str(value), value.batch) == ("?[B@dp,...]", 0)

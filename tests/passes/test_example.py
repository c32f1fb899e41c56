"""Covers passes/example.py: what of an example becomes an input, a guard, a default or an error."""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from colocc.errors import CaptureError, LayoutError
from colocc.passes.capture import capture
from colocc.passes.graph import Graph
from colocc.passes.rows import Rows
from tests.passes.kit import PAIR_LAYOUTS, Pair

SIZE = 8


class Model(Pair):
    """Takes nested inputs, options and a default."""

    def forward(  # type: ignore[override]
        self, pixels: Any, *, options: Any = None, scale: float = 2.0, mask: Tensor | None = None
    ) -> Any:
        x = self.vision(pixels["rgb"])
        if options is not None and options["kind"] == "double":
            x = x * scale
        if mask is not None:
            x = x * mask
        return self.language(x)


def captured(**example: Any) -> Graph:
    dims = example.pop("batch_dims", {})
    model = Model()
    return capture(model, PAIR_LAYOUTS, example_inputs=example, batch_dims=dims)


def pixels(size: int = SIZE) -> dict[str, Tensor]:
    return {"rgb": torch.zeros(size, 5, 16)}


def test_tensors_are_inputs_and_the_rest_guards() -> None:
    graph = captured(pixels=pixels(), options={"kind": "double", "sizes": (3, 4)})
    assert [n.meta["path"] for n in graph.placeholders()] == [("pixels", "rgb")]
    assert graph.guards is not None
    values = {guard.path: guard.value for guard in graph.guards.values if guard.what == "value"}
    assert values == {("options", "kind"): "double", ("options", "sizes"): (3, 4)}
    assert "double" in str(graph.guards.lines())


def test_a_default_that_the_example_leaves_out_stays() -> None:
    graph = captured(pixels=pixels(), scale=3.0)
    assert [n.name for n in graph.placeholders()] == ["pixels_rgb"]
    assert graph.guards is not None
    texts = [guard.text for guard in graph.guards.values]
    assert texts == ["pixels.rgb.dtype is float32", "scale is 3.0"]


def test_shapes_hold_the_samples_of_the_example() -> None:
    graph = captured(pixels=pixels(4), mask=torch.zeros(4, 1, 1))
    mask = next(n for n in graph.placeholders() if n.name == "mask")
    dtype, dims, batch = mask.meta["shapes"]
    assert (dtype, [d.size for d in dims], batch) == ("f32", [4, 1, 1], 0)
    assert all("value" not in node.meta for node in graph.nodes)


def test_an_input_that_the_example_lacks_must_not_be_read() -> None:
    given = {"mask": torch.ones(8, 5, 1)}
    with pytest.raises(CaptureError, match="it reads images, which example_inputs lacks") as info:
        capture(Pair(), PAIR_LAYOUTS, example_inputs=given)
    assert "passes/kit.py:" in str(info.value)


def test_inputs_that_disagree_on_the_samples() -> None:
    with pytest.raises(LayoutError, match=r"the batch has 8 samples in pixels\.rgb and 4 in mask"):
        captured(pixels=pixels(), mask=torch.zeros(4, 1, 1))
    # Unless it is said that all samples share it.
    assert captured(pixels=pixels(), mask=torch.zeros(5, 1), batch_dims={"mask": None}).batch_size


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(LayoutError, match="mask has 9 rows for 8 samples: 9 % 8 = 1"):
        captured(pixels=pixels(), mask=torch.zeros(9, 1), batch_dims={"mask": Rows()})


class Opaque:
    """Compares by identity."""


class Kind(Enum):
    NONE = 1


CONSTANT: dict[str, Any] = {
    "nothing": None,
    "unhashable": [[1, 2], {"a": {3}}],
    "an enum": Kind.NONE,
    "a dtype": torch.float16,
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_value_that_can_be_compared_is_a_guard(name: str) -> None:
    graph = captured(pixels=pixels(), options={"kind": "none", "odd": (CONSTANT[name],)})
    assert graph.guards is not None
    odd = next(guard for guard in graph.guards.values if guard.path == ("options", "odd"))

    def failed(value: Any) -> str | None:
        assert graph.guards is not None
        given = {"pixels": pixels(), "options": {"kind": "none", "odd": value}}
        return graph.guards.failed(given, SIZE, [SIZE])

    assert failed((copy.copy(CONSTANT[name]),)) is None
    for other in ((7,), torch.zeros(2), (Opaque(),), None):
        problem = failed(other)
        assert problem is not None and odd.text in problem


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([torch.zeros(2)], "is a list, which holds tensors. Give them as one tensor, or in a dict"),
        (Opaque(), "is a Opaque, which cannot be compared with that of another batch. Give a ten"),
        (numpy.zeros(3), "is a ndarray, which cannot be compared with that of another batch"),
        ((1, Opaque()), "is a tuple, which cannot be compared with that of another batch"),
    ],
)
def test_a_value_that_is_neither_input_nor_guard_is_refused(value: Any, problem: str) -> None:
    with pytest.raises(CaptureError) as info:
        captured(pixels=pixels(), options={"kind": "none", "odd": value})
    assert f"example_inputs: options.odd {problem}" in str(info.value)

"""Covers passes/probe.py: shapes of a call that nobody looks into, found by running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from colocc.passes.probe import Probe, probe
from colocc.passes.sizes import Sizes


def probed(call: Callable[..., Any], *, rows: bool = False) -> tuple[list[str], list[str]]:
    """The shapes that ``call`` makes of 4 samples [4, 6, 10], and which sizes it fixes."""
    sizes = Sizes(4, lambda expr, answer: None)
    shape = sizes.shape(("x",), torch.zeros(4, 6, 10), 0, rows=rows)
    with FakeTensorMode(shape_env=sizes.environment):
        x = torch.empty(shape)
    found: Probe = probe(sizes, call, (x,), {}, lambda tensor: None)
    texts = [
        ", ".join(sizes.shown(sympy.expand(expr)).replace("x.shape", "x") for expr in made)
        for made in found.shapes
    ]
    return texts, [sizes.shown(symbol) for symbol in found.fixed]


CALLS: dict[str, tuple[Callable[..., Any], list[str], list[str]]] = {
    "same": (lambda x: x * 2, ["samples, x[1], x[2]"], []),
    "constant": (lambda x: x.sum(1) @ x.new_zeros(x.shape[2], 3), ["samples, 3"], []),
    "affine": (lambda x: torch.cat([x, x[:, :2]], 1), ["samples, x[1] + 2, x[2]"], []),
    "flattened": (lambda x: x.flatten(0, 1), ["samples*x[1], x[2]"], []),
    "several": (lambda x: {"a": x[:, 0], "b": [x.new_zeros(7)]}, ["samples, x[2]", "7"], []),
    "one size": (
        lambda x: x @ torch.zeros(10, 5),
        ["samples, x[1], 5"],
        ["x.shape[2]"],
    ),
    "odd growth": (lambda x: x[:, : x.shape[1] % 4], ["samples, 2, x[2]"], ["x.shape[1]"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_expressions_in_the_sizes(name: str) -> None:
    call, shapes, fixed = CALLS[name]
    assert probed(call) == (shapes, fixed)


def test_a_call_that_fails_at_the_examples_own_size_says_so() -> None:
    with pytest.raises(RuntimeError, match="shape '\\[7\\]' is invalid"):
        probed(lambda x: x.reshape(7))


def test_integers_of_the_example_are_known_inside() -> None:
    sizes, real = Sizes(2, lambda expr, answer: None), torch.tensor([[1, 3], [2, 3]])
    shape = sizes.shape(("grid",), real, 0, rows=False)
    with FakeTensorMode(shape_env=sizes.environment):
        grid = torch.empty(shape, dtype=torch.int64)

    def call(given: Tensor) -> Tensor:
        return torch.zeros(sum(a * b for a, b in given.tolist()), 4)

    found = probe(sizes, call, (grid,), {}, lambda tensor: real)
    # 1 * 3 + 2 * 3 rows for 2 samples, twice that for 4.
    assert sizes.shown(found.shapes[0][0]) == "9*samples/2"

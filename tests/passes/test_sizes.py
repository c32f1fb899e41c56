"""Covers passes/sizes.py: lengths as symbols, branches told, numbers computed anew."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from colocc.passes.sizes import Number, Origin, Sizes, dims_of, evaluated
from colocc.types import Dim


def made(told: list[Any] | None = None, samples: int = 4) -> Sizes:
    seen: list[Any] = [] if told is None else told
    return Sizes(samples, lambda expr, answer: seen.append((str(expr), bool(answer))))


def test_lengths_are_symbols_and_share_one_by_token() -> None:
    sizes = made()
    ids = sizes.shape(("ids",), torch.zeros(4, 9, dtype=torch.int64), 0, rows=False)
    mask = sizes.shape(("mask",), torch.zeros(4, 9), 0, rows=False)
    images = sizes.shape(("images",), torch.zeros(4, 1, 9, 9), 0, rows=False)
    assert sizes.expr(ids[1]) == sizes.expr(mask[1])
    assert len({sizes.expr(n) for n in (ids[1], images[2], images[3])}) == 3
    assert images[1] == 1 and isinstance(images[1], int)
    assert {sizes.expr(shape[0]) for shape in (ids, mask, images)} == {sizes.batch}
    assert sizes.shown(sizes.expr(images[3])) == "images.shape[3]"


def test_a_branch_is_told_with_the_side_that_the_example_took() -> None:
    told: list[Any] = []
    sizes = made(told)
    (_, length) = sizes.shape(("ids",), torch.zeros(4, 9, dtype=torch.int64), 0, rows=False)
    assert length > 5 and length * 2 != 7
    assert [answer for _, answer in told] == [True, True]


def test_dims_know_which_one_grows_with_the_samples() -> None:
    sizes = made()
    (_, length) = sizes.shape(("ids",), torch.zeros(4, 9, dtype=torch.int64), 0, rows=False)
    batch = sizes.samples
    assert dims_of(sizes, (3, batch * length)) == ((Dim(1, 3), Dim(4, 9, ("dp",))), 1)
    assert dims_of(sizes, (length, 2)) == ((Dim(1, 9), Dim(1, 2)), None)
    assert dims_of(sizes, (batch, batch)) is None
    assert dims_of(sizes, (batch + 1,)) is None
    assert sizes.at(batch * length + 1) == 37 and sizes.at(batch, samples=8) == 8


def test_a_number_is_computed_for_the_inputs_at_hand() -> None:
    sizes = made(samples=4)
    (rows, width) = sizes.shape(("pixels",), torch.zeros(12, 6), 0, rows=True)
    assert [str(s) for s in sizes.per_sample((rows,))] and not sizes.per_sample((width,))
    expr = sizes.expr(rows) + 1
    (each,) = sizes.per_sample((rows,))
    number = Number(
        sizes.shown(expr), expr,
        {each: (1, Origin(("pixels",), 0, True)), sizes.batch: (0, Origin(("ids",), 0))},
        sizes.batch,
    )  # fmt: skip
    # Two samples here, of five rows each.
    assert number(torch.zeros(2, 9), torch.zeros(10, 6)) == 11
    assert number.text == "pixels.shape[0] per sample*samples + 1"


def test_what_fixes_the_samples_is_seen() -> None:
    sizes = made()
    with FakeTensorMode(shape_env=sizes.environment):
        torch.zeros(sizes.samples, 2) + torch.zeros(4, 2)
    assert sizes.specialised()
    other = made()
    other.fix(other.batch)
    assert other.expr(other.samples * 2) == 8


@pytest.mark.parametrize(
    ("text", "value"), [("floor", 3), ("truth", True), ("share", 3.5)], ids=lambda x: str(x)
)
def test_expressions_become_plain_numbers(text: str, value: Any) -> None:
    x = sympy.Symbol("x", integer=True, positive=True)
    exprs = {"floor": sympy.floor(x / 2), "truth": sympy.Gt(x, 5), "share": x * sympy.Float(0.5)}
    found = evaluated(exprs[text], {x: 7})
    assert found == value and type(found) is type(value)

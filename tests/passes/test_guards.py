"""Covers passes/guards.py: which guard a batch breaks, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import fx

from colocc.passes.guards import (
    REMEDY,
    Guards,
    LengthGuard,
    ModeGuard,
    ScatterGuard,
    SizeGuard,
    ValueGuard,
)
from colocc.passes.sizes import Origin

SAMPLES, LENGTH, EACH = sympy.symbols("b s r", integer=True, positive=True)
ORIGINS = {
    SAMPLES: Origin(("ids",), 0),
    LENGTH: Origin(("ids",), 1),
    EACH: Origin(("pixels",), 0, per_sample=True),
}


def guards(**more: Any) -> Guards:
    return Guards(SAMPLES, ORIGINS, **more)


def batch(samples: int = 4, length: int = 6, rows: int = 3) -> dict[str, Any]:
    return {"ids": torch.zeros(samples, length), "pixels": torch.zeros(samples * rows, 2)}


def test_a_size_that_is_broken_is_named_with_its_value_and_line() -> None:
    found = guards(sizes=[SizeGuard(LENGTH > 5, "ids.shape[1] > 5", "user.py:3 if long:")])
    assert found.failed(batch(), 4, [4]) is None
    assert found.failed(batch(length=5), 4, [4]) == (
        "this batch has ids.shape[1] = 5, and the graph holds where ids.shape[1] > 5 "
        f"(user.py:3 if long:). {REMEDY}"
    )


def test_a_branch_on_the_samples_holds_for_those_of_every_layout() -> None:
    found = guards(sizes=[SizeGuard(SAMPLES > 1, "samples > 1", "user.py:4 if many:")])
    assert found.failed(batch(8), 8, [2, 4]) is None
    problem = found.failed(batch(8), 8, [1, 4])
    assert problem is not None and "this batch has samples = 1" in problem


def test_rows_are_counted_per_sample() -> None:
    found = guards(sizes=[SizeGuard(sympy.Eq(EACH, 3), "rows == 3", "line")])
    assert found.failed(batch(rows=3), 4, [4]) is None
    problem = found.failed(batch(rows=2), 4, [4])
    assert problem is not None and "pixels.shape[0] per sample = 2" in problem


def test_a_size_that_the_batch_lacks_is_not_judged() -> None:
    found = guards(sizes=[SizeGuard(sympy.Eq(EACH, 3), "rows == 3", "line")])
    assert found.failed({"ids": torch.zeros(4, 6)}, 4, [4]) is None


def test_values_and_dtypes() -> None:
    kind = guards(values=[ValueGuard(("options", "kind"), "value", "cubic")])
    assert kind.failed({"options": {"kind": "cubic"}}, 4, [4]) is None
    for given, shown in (({"options": {"kind": "area"}}, "'area'"), ({}, "None")):
        assert kind.failed(given, 4, [4]) == (
            f"this batch has options.kind {shown}, and the graph holds where options.kind is "
            f"'cubic'. {REMEDY}"
        )
    scale = guards(values=[ValueGuard(("scale",), "value", 2.0)])
    assert scale.failed({"scale": 2.0}, 4, [4]) is None
    problem = scale.failed({"scale": torch.zeros(2)}, 4, [4])
    assert problem is not None and "scale tensor([0., 0.]), and the graph holds" in problem
    dtype = guards(values=[ValueGuard(("ids",), "dtype", "int64")])
    assert dtype.failed({"ids": torch.zeros(4, 6, dtype=torch.int64)}, 4, [4]) is None
    problem = dtype.failed(batch(), 4, [4])
    assert problem is not None and "ids 'float32', and the graph holds where ids.dtype" in problem


@pytest.mark.parametrize(
    ("value", "other"), [(1, True), (2, 2.0), ([0, 1], [False, 1]), ({1}, {True}), ((2,), [2])]
)
def test_a_constant_of_another_kind_is_another(value: Any, other: Any) -> None:
    kept = guards(values=[ValueGuard(("flag",), "value", value)])
    assert kept.failed({"flag": value}, 4, [4]) is None
    problem = kept.failed({"flag": other}, 4, [4])
    assert problem is not None and f"has flag {other!r}" in problem


def test_a_constant_that_is_no_number_is_itself() -> None:
    kept = guards(values=[ValueGuard(("scale",), "value", float("nan"))])
    assert kept.failed({"scale": float("nan")}, 4, [4]) is None
    assert kept.failed({"scale": 1.0}, 4, [4]) is not None


def test_lengths_that_the_recording_took_for_granted() -> None:
    found = guards(lengths=[LengthGuard(("mask",), (None, sympy.Integer(1), LENGTH))])
    given = batch()
    assert found.failed(given, 4, [4]) is None
    assert found.failed({**given, "mask": torch.zeros(4, 1, 6)}, 4, [4]) is None
    for shape, problem in (
        ((4, 1), "mask with 2 dims, and the graph holds where it has 3"),
        ((4, 3, 6), "mask.shape[1] = 3, and the graph holds where that is 1, as in the example"),
        (
            (4, 1, 5),
            "mask.shape[2] = 5, and the graph holds where that is ids.shape[1] = 6, as in the "
            "example",
        ),
    ):
        told = found.failed({**given, "mask": torch.zeros(shape)}, 4, [4])
        assert told == f"this batch has {problem}. {REMEDY}"
    assert found.failed({"mask": torch.zeros(4, 1, 5)}, 4, [4]) is None


def test_every_guard_has_a_line_on_the_page() -> None:
    mask = fx.Graph().placeholder("places")
    found = guards(
        sizes=[SizeGuard(LENGTH > 5, "ids.shape[1] > 5", "a.py:1")],
        values=[ValueGuard(("scale",), "value", 2.0), ValueGuard(("ids",), "dtype", "int64")],
        modes=[ModeGuard("", True, "a.py:2"), ModeGuard("tower", False, "a.py:3")],
        scatters=[ScatterGuard(mask, sympy.Integer(8), 32 * EACH, "scatter", "a.py:4")],
    )
    assert found.lines() == [
        ("ids.shape[1] > 5", "a.py:1"),
        ("scale is 2.0", "as in the example"),
        ("model.training is True", "a.py:2"),
        ("tower.training is False", "a.py:3"),
        ("places is true 4*pixels.shape[0] per sample times in each sample", "a.py:4"),
    ]

"""Covers passes/guards.py: which guard a batch breaks, and what is said of it."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from colocc.passes.guards import REMEDY, Guards, ModeGuard, ScatterGuard, SizeGuard, ValueGuard
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

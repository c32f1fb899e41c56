"""Closed forms: read by a grammar, true of every rank, equal by digits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes.solve.forms import Digits, NotNestedError, check_forms, evaluate, parse
from colocc.passes.solve.plan import Plan
from colocc.passes.solve.solver import solve
from colocc.ranks import closed_form
from colocc.sequence import form
from tests.passes.solve.pairs import SEQUENCE, cut, layouts


def test_a_form_is_read_left_to_right() -> None:
    ranks = np.arange(24)
    for text, want in (
        ("r//4%3", ranks // 4 % 3),
        ("2*(r//2%2) + r%2", 2 * (ranks // 2 % 2) + ranks % 2),
        ("(r//3 + 1)%2", (ranks // 3 + 1) % 2),
        ("7", np.full(24, 7)),
    ):
        assert np.array_equal(evaluate(parse(text), {"r": ranks}, 24), want)


@pytest.mark.parametrize(
    "text",
    ["", "r//", "r**2", "(r", "r)", "r 2", "f(r)", "__import__('os')", "r-1", "1.5", "r//x y"],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(VerifyError):
        parse(text)


def test_names_and_zeros_are_refused() -> None:
    with pytest.raises(VerifyError, match=r"speaks of x, not of r"):
        evaluate(parse("x"), {"r": np.arange(2)}, 2)
    with pytest.raises(VerifyError, match="divides by zero"):
        evaluate(parse("r//(r%2)"), {"r": np.arange(2)}, 2)


@pytest.mark.parametrize("world", [6, 8, 12])
def test_coordinates_by_digits_are_their_closed_forms(world: int) -> None:
    for layout in layouts(world, ("tp", "cp", "pp", "dp")):
        digits = Digits(layout)
        for axis in ("tp", "cp", "pp", "dp"):
            tree = parse(closed_form(layout.coordinate(axis)))
            assert digits.form(tree, {"r": digits.rank}) == digits.coordinate(layout, axis)
            others = {name for name in ("tp", "cp", "pp", "dp") if layout.sizes[name] > 1} - {axis}
            for other in others:
                assert digits.coordinate(layout, axis) != digits.coordinate(layout, other)


def test_strides_that_do_not_nest_have_no_digits() -> None:
    with pytest.raises(NotNestedError):
        Digits(Layout(tp=2, dp=3), Layout(tp=3, dp=2))


def plan_of(src: str, dst: str, dims: tuple[str, ...] = ("sample",)) -> Plan:
    return solve(("images", Layout.parse(src)), ("language", Layout.parse(dst)), dims=dims)


@pytest.mark.parametrize(
    ("src", "dst", "right", "wrong"),
    [
        ("dp8", "tp4 dp2", "language.dp = images.dp//4", "language.dp = images.dp//2%2"),
        ("tp4 dp2", "dp8", "images.dp = language.dp//4", "images.dp = language.dp%2"),
        ("tp2 dp4", "tp2 pp2 dp2", "language.dp = images.dp%2", "language.dp = images.dp//2"),
        ("tp2 dp3", "tp3 dp2", "images.dp = r//2, language.dp = r//3",
         "images.dp = r//3, language.dp = r//3"),
        ("tp2 dp3", "tp3 dp2", "images.dp = r//2, language.dp = r//3",
         "images.dp = r//2, language.dp = r%2"),
        ("tp2 dp3", "tp3 dp2", "images.dp = r//2, language.dp = r//3",
         "language.dp = images.dp//2"),
    ],
)  # fmt: skip
def test_a_wrong_relation_is_refused(src: str, dst: str, right: str, wrong: str) -> None:
    plan = plan_of(src, dst)
    assert plan.where[0] == right
    check_forms(plan)
    with pytest.raises(VerifyError):
        check_forms(replace(plan, where=(wrong,)))


@pytest.mark.parametrize("world", [6, 8, 12])
def test_the_printed_cut_of_every_layout_is_right(world: int) -> None:
    seen = set()
    for grid in layouts(world, ("tp", "cp", "dp")):
        for layout in cut(grid):
            plan = plan_of(f"dp{world}", str(layout), SEQUENCE)
            check_forms(plan)
            for line in plan.where[1:]:
                seen.add(form(layout))
                with pytest.raises(VerifyError):
                    check_forms(replace(plan, where=(plan.where[0], f"{line} + 1")))
                with pytest.raises(VerifyError):
                    check_forms(replace(plan, where=plan.where[:1]))
    assert len(seen) > 5


def test_the_cut_of_another_layout_is_refused() -> None:
    plan = plan_of("dp8", "tp2 cp2 dp2 sp zigzag", SEQUENCE)
    other = plan_of("dp8", "tp2 cp2 dp2 sp", SEQUENCE)
    for line in (other.where[1], plan.where[1].replace("r%2 of 2", "r//2%2 of 2")):
        assert line != plan.where[1]
        with pytest.raises(VerifyError):
            check_forms(replace(plan, where=(plan.where[0], line)))

"""Covers: colocc/ranks.py; groups and coordinates by way of Layout, in test_layout.py."""

from __future__ import annotations

import ast

import pytest
import sympy

from colocc.ranks import RANK, closed_form


def test_closed_form_reads_as_the_expression_it_prints() -> None:
    exprs = [
        sympy.floor(sympy.Mod(RANK, 8) / 2),
        sympy.Mod(2 * sympy.floor(RANK / 2), 4),
        sympy.floor((RANK + 1) / 2) + 3,
        sympy.floor((sympy.floor(RANK / 2) + 3) / 2),
    ]
    for expr in exprs:
        function = sympy.lambdify(RANK, expr, "math")
        text = closed_form(expr, "rank")
        assert "rank" in text and [evaluate(text, r) for r in range(32)] == [
            function(r) for r in range(32)
        ]
    with pytest.raises(ValueError, match="no closed form"):
        closed_form(sympy.sqrt(RANK))


def evaluate(text: str, rank: int) -> int:
    """The value of a printed form, by an arithmetic of + * // % and parentheses alone."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Name(id="rank"):
                return rank
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.FloorDiv(), right):
                return value(left) // value(right)
            case ast.BinOp(left, ast.Mod(), right):
                return value(left) % value(right)
        raise AssertionError(ast.dump(node))

    return value(ast.parse(text, mode="eval").body)

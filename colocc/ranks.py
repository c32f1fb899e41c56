"""The arithmetic of a grid of ranks, which is a tuple of (axis, size), fastest first.

An axis of stride s and size n gives rank r the coordinate ``floor(r / s) mod n``, as an expression
and, evaluated, for all ranks at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache
from math import prod

import numpy as np
import sympy
from numpy.typing import NDArray

RANK = sympy.Symbol("r", integer=True, nonnegative=True)

Ranks = NDArray[np.int64]
Grid = tuple[tuple[str, int], ...]
"""(axis, size), fastest first."""
Groups = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def coordinate_of(stride: int, size: int, world: int) -> sympy.Expr:
    """The coordinate of rank ``RANK`` of ``world`` on an axis, simplified."""
    if size == 1:
        return sympy.Integer(0)
    steps = RANK if stride == 1 else sympy.floor(RANK / stride)
    return steps if stride * size == world else sympy.Mod(steps, size)


@lru_cache(maxsize=256)
def evaluated(expr: sympy.Expr, size: int) -> Ranks:
    """``expr`` for every rank. Shape: [size], int64, read-only."""
    values = sympy.lambdify(RANK, expr, "numpy")(np.arange(size, dtype=np.int64))
    out = np.empty(size, dtype=np.int64)
    out[:] = values
    out.flags.writeable = False
    return out


@lru_cache(maxsize=1024)
def groups_of(grid: Grid, axes: tuple[str, ...]) -> Groups:
    """The groups of ranks that differ on ``axes`` only, each ascending, by first rank."""

    def offsets(names: Iterable[str]) -> Ranks:
        found = np.zeros(1, dtype=np.int64)
        for name in names:
            found = np.add.outer(found, np.arange(dict(grid)[name]) * stride_of(grid, name)).ravel()
        return np.sort(found)

    # Every rank with coordinate 0 on the axes starts a group; all have the same offsets.
    first = offsets(name for name, _ in grid if name not in axes)
    return tuple(map(tuple, np.add.outer(first, offsets(dict.fromkeys(axes))).tolist()))


def stride_of(grid: Grid, axis: str) -> int:
    """How many ranks apart neighbours on ``axis`` are."""
    return prod(size for _, size in itertools.takewhile(lambda entry: entry[0] != axis, grid))


def trimmed(grid: Grid) -> Grid:
    """The axes that tell ranks from each other."""
    return tuple(entry for entry in grid if entry[1] > 1)


def group_of(rank: int, grid: Grid, axis: str) -> tuple[int, ...]:
    """The ranks that differ from ``rank`` on ``axis`` only, ascending."""
    stride, size = stride_of(grid, axis), dict(grid)[axis]
    first = rank - rank // stride % size * stride
    return tuple(range(first, first + stride * size, stride))


@lru_cache(maxsize=4096)
def closed_form(expr: sympy.Expr, name: str = "r") -> str:
    """``expr`` in the notation of the dump, with ``name`` for RANK: ``r//2%2``."""
    if expr == RANK:
        return name
    if isinstance(expr, (sympy.Symbol, sympy.Integer)):
        return str(expr)
    if isinstance(expr, sympy.floor):
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        return f"{_operand(above, name)}//{_operand(below, name)}"
    if isinstance(expr, sympy.Mod):
        return f"{_operand(expr.args[0], name)}%{_operand(expr.args[1], name)}"
    if isinstance(expr, sympy.Add):
        return " + ".join(closed_form(term, name) for term in expr.as_ordered_terms())
    if isinstance(expr, sympy.Mul):
        return "*".join(
            f"({closed_form(part, name)})" if not part.is_Atom else closed_form(part, name)
            for part in expr.as_ordered_factors()
        )
    raise ValueError(f"{expr} has no closed form: it is more than +, *, // and % of the rank")


def _operand(expr: sympy.Expr, name: str) -> str:
    text = closed_form(expr, name)
    return f"({text})" if isinstance(expr, sympy.Add) else text

"""Check the closed forms that a plan prints, in numbers for every rank and in symbols for all.

A form is read by the small grammar below, never evaluated as code:

    sum    = term { "+" term }          term = atom { ("*" | "//" | "%") atom }
    atom   = number | name | "(" sum ")"

In symbols, a rank is a number of mixed radix: r = d0 + b1 * d1 + b2 * d2 ..., where every stride of
the layouts is one of the b. Then floor(x / n) and x mod n of a sum of digits are sums of digits,
too, and two forms are equal for all ranks exactly if their sums are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import sympy

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes.solve.boxes import Intervals
from colocc.passes.solve.ends import Ints, coordinate, cutting_axes, number, sequence
from colocc.passes.solve.plan import Holding, Plan

Run = tuple[int, int]
Tree = int | str | tuple[str, "Tree", "Tree"]
TOKEN = re.compile(r"\s*(\d{1,9}|[A-Za-z_][\w.]*|//|[%*+()])")
ZIGZAG = re.compile(r"(?:part (.+) of (\d+) of )?chunks c and (\d+)-c of (\d+), c = (.+)")
PLAIN = re.compile(r"chunk (.+) of (\d+)")


def check_forms(plan: Plan) -> None:
    """Raise VerifyError unless every line of ``plan.where`` is true."""
    cut = [side for side in (plan.src, plan.dst) if any(part.axes for part in side.parts[1:])]
    if len(plan.where) != 1 + len(cut):
        raise VerifyError(f"{len(plan.where)} forms for {1 + len(cut)} relations: {plan.where}")
    for text, side in zip(plan.where[1:], cut, strict=True):
        head, _, form = text.partition(" holds ")
        if head != side.module or not _sequence_is(form, side.layout):
            raise VerifyError(f"{text!r} is not how {side.module} ({side.layout}) is cut")
    _check_relation(plan.where[0], plan.src, plan.dst)


def _check_relation(text: str, src: Holding, dst: Holding) -> None:
    names = {f"{side.module}.dp": side for side in (src, dst)}
    claims = [claim.partition(" = ") for claim in text.split(", ")]
    if [name for name, _, _ in claims] == list(names):
        for name, _, form in claims:
            if not _coordinate_is(form, _uncut(names[name].layout)):
                raise VerifyError(f"{name} is not {form} on {names[name].layout}")
        return
    name, _, form = claims[0]
    if len(claims) != 1 or name not in names:
        raise VerifyError(f"{text!r} relates nothing of {list(names)}")
    inner, outer = (src, dst) if names[name] is dst else (dst, src)
    variable = f"{inner.module}.dp"
    tree = parse(form)
    image = evaluate(tree, {variable: np.arange(inner.layout.dp)}, inner.layout.dp)
    if not _inside(inner.slots, outer.slots, tuple(image.tolist())):
        raise VerifyError(f"{text!r} is not true of the samples that they hold")
    own = image[coordinate(inner.layout, "dp")]
    if not np.array_equal(own, coordinate(outer.layout, "dp")):
        return  # true of the samples; some ranks hold others than they read
    if not _relation_is(form, variable, _uncut(inner.layout), _uncut(outer.layout)):
        raise VerifyError(f"{text!r} is true of each rank, but not by the digits of a rank")


@lru_cache(maxsize=256)
def _inside(
    inner: tuple[Intervals, ...], outer: tuple[Intervals, ...], image: tuple[int, ...]
) -> bool:
    """Whether slot i of ``inner`` lies in slot image[i] of ``outer``."""
    if min(image) < 0 or max(image) >= len(outer):
        return False
    starts = sorted([(a, slot, b) for slot, cut in enumerate(outer) for a, b in cut])
    low, slot, high = np.array(starts).T
    rows = [(a, b, i) for i, cut in enumerate(inner) for a, b in cut]
    first, last, index = np.array(rows).T
    # A run may go over several runs of one slot: all that begin or end in it must be that slot's.
    left = np.searchsorted(low, first, side="right") - 1
    right = np.searchsorted(high, last, side="left")
    changes = np.cumsum(np.diff(slot, prepend=slot[0]) != 0)
    same = (changes[left] == changes[right]) & (slot[left] == np.array(image)[index])
    return bool(same.all())


@lru_cache(maxsize=4096)
def _uncut(layout: Layout) -> Layout:
    """The layout without the cut of its sequence, which moves no rank."""
    return replace(layout, sp=False, zigzag=False)


@lru_cache(maxsize=4096)
def _coordinate_is(form: str, layout: Layout) -> bool:
    tree = parse(form)
    values = evaluate(tree, {"r": np.arange(layout.size)}, layout.size)
    if not np.array_equal(values, coordinate(layout, "dp")):
        return False
    digits = Digits(layout)
    return bool(digits.form(tree, {"r": digits.rank}) == digits.coordinate(layout, "dp"))


@lru_cache(maxsize=4096)
def _relation_is(form: str, variable: str, inner: Layout, outer: Layout) -> bool:
    """Whether the form is the outer coordinate by digits; true where no common digits exist."""
    try:
        digits = Digits(inner, outer)
        values = {variable: digits.coordinate(inner, "dp")}
        return bool(digits.form(parse(form), values) == digits.coordinate(outer, "dp"))
    except NotNestedError:
        return True


@lru_cache(maxsize=4096)
def _sequence_is(form: str, layout: Layout) -> bool:
    """Whether the ranks hold the chunks that ``form`` says."""
    ranks = {"r": np.arange(layout.size)}
    place = number(layout, cutting_axes(layout))
    chunks, cuts = sequence(layout)
    if found := PLAIN.fullmatch(form):
        first = evaluate(parse(found[1]), ranks, layout.size)
        claimed = np.stack([first, np.zeros_like(first)])
        count, lanes, folded = int(found[2]), 1, False
    elif found := ZIGZAG.fullmatch(form):
        count, lanes, folded = int(found[4]), int(found[2] or 1), True
        if int(found[3]) != count - 1:
            return False
        parts = evaluate(parse(found[1] or "0"), ranks, layout.size)
        claimed = np.stack([evaluate(parse(found[5]), ranks, layout.size), parts])
    else:
        return False
    scale = count * lanes * chunks
    for chunk, lane, index in np.unique(np.vstack([claimed, place]), axis=1).T.tolist():
        pair = (chunk, count - 1 - chunk) if folded else (chunk,)
        # Places are counted in pieces so small that chunks of either kind are whole numbers.
        wide = scale // count
        local = [(c * wide, (c + 1) * wide) for c in pair]
        share = len(local) * wide // lanes
        held = _between(local, lane * share, (lane + 1) * share)
        step = scale // chunks
        if held != _joined((a * step, b * step) for a, b in cuts[index]):
            return False
    return True


def _between(runs: list[Run], start: int, stop: int) -> list[Run]:
    """The pieces ``start`` to ``stop`` of those in ``runs``, counted one run after the other."""
    found, before = [], 0
    for low, high in runs:
        first, last = (min(max(low, low + at - before), high) for at in (start, stop))
        found.append((first, last))
        before += high - low
    return _joined(found)


def _joined(runs: Iterable[Run]) -> list[Run]:
    """``runs`` without empty ones, those that meet made one: equal for equal lists of pieces."""
    found: list[Run] = []
    for low, high in runs:
        if found and low < high and found[-1][1] == low:
            found[-1] = (found[-1][0], high)
        elif low < high:
            found.append((low, high))
    return found


def parse(text: str) -> Tree:
    """The form as a tree. Raises: VerifyError for text outside the grammar."""
    tokens, place = [], 0
    while place < len(text):
        found = TOKEN.match(text, place)
        if not found:
            raise VerifyError(f"{text!r} is no closed form")
        tokens.append(found[1])
        place = found.end()
    tree, rest = _sum(tokens)
    if rest:
        raise VerifyError(f"{text!r} is no closed form")
    return tree


def _sum(tokens: list[str]) -> tuple[Tree, list[str]]:
    return _chain(tokens, _term, ("+",))


def _term(tokens: list[str]) -> tuple[Tree, list[str]]:
    return _chain(tokens, _atom, ("*", "//", "%"))


def _chain(
    tokens: list[str],
    part: Callable[[list[str]], tuple[Tree, list[str]]],
    signs: tuple[str, ...],
) -> tuple[Tree, list[str]]:
    tree, rest = part(tokens)
    while rest and rest[0] in signs:
        right, after = part(rest[1:])
        tree, rest = (rest[0], tree, right), after
    return tree, rest


def _atom(tokens: list[str]) -> tuple[Tree, list[str]]:
    if tokens and tokens[0] == "(":
        tree, rest = _sum(tokens[1:])
        if rest and rest[0] == ")":
            return tree, rest[1:]
    elif tokens and tokens[0].isdigit():
        return int(tokens[0]), tokens[1:]
    elif tokens and tokens[0][0] not in "/%*+()":
        return tokens[0], tokens[1:]
    raise VerifyError(f"a closed form ends or breaks at {' '.join(tokens)!r}")


def evaluate(tree: Tree, names: dict[str, Ints], size: int) -> Ints:
    """The values of a form; ``names`` are its variables, each [size]."""
    if isinstance(tree, int):
        return np.full(size, tree, dtype=np.int64)
    if isinstance(tree, str):
        if tree not in names:
            raise VerifyError(f"a closed form speaks of {tree}, not of {' or '.join(names)}")
        return names[tree]
    sign, left, right = tree[0], *(evaluate(part, names, size) for part in tree[1:])
    if sign in ("//", "%") and (right < 1).any():
        raise VerifyError("a closed form divides by zero")
    if sign in ("+", "*"):
        return left + right if sign == "+" else left * right
    return left // right if sign == "//" else left % right


class NotNestedError(Exception):
    """No mixed radix has all strides of the layouts, or a form has no sum of its digits."""


class Digits:
    """The digits of a rank, in a mixed radix that has all strides of some layouts."""

    def __init__(self, *layouts: Layout) -> None:
        borders = {1, layouts[0].size}
        for layout in layouts:
            for axis in ("tp", "cp", "pp", "dp"):
                stride = layout.stride(axis)
                borders |= {stride, stride * layout.sizes[axis]}
        radices = sorted(borders)
        self.sizes: dict[sympy.Symbol, int] = {}
        self.rank = sympy.Integer(0)
        for low, high in pairwise(radices):
            if high % low:
                raise NotNestedError
            digit = sympy.Symbol(f"d{low}", integer=True, nonnegative=True)
            self.sizes[digit] = high // low
            self.rank += low * digit

    def coordinate(self, layout: Layout, axis: str) -> sympy.Expr:
        """The coordinate of a rank on an axis as a sum of digits."""
        quotient, _ = self.divide(self.rank, layout.stride(axis))
        return self.divide(quotient, layout.sizes[axis])[1]

    def divide(self, value: sympy.Expr, by: int) -> tuple[sympy.Expr, sympy.Expr]:
        """Quotient and remainder of a sum of digits. Raises: NotNestedError."""
        terms = value.as_coefficients_dict()
        high = {digit: times for digit, times in terms.items() if times % by == 0}
        low = {digit: times for digit, times in terms.items() if times % by}
        most = sum(
            times * (self.sizes[digit] - 1 if digit in self.sizes else 1)
            for digit, times in low.items()
        )
        if most >= by:
            raise NotNestedError
        return (
            sympy.Add(*(times // by * digit for digit, times in high.items())),
            sympy.Add(*(times * digit for digit, times in low.items())),
        )

    def form(self, tree: Tree, names: dict[str, sympy.Expr]) -> sympy.Expr:
        """A form as a sum of digits. Raises: NotNestedError."""
        if isinstance(tree, int):
            return sympy.Integer(tree)
        if isinstance(tree, str):
            return names[tree]
        sign, left, right = tree[0], *(self.form(part, names) for part in tree[1:])
        if sign == "+":
            return left + right
        if sign == "*":
            return sympy.expand(left * right)
        if not right.is_Integer:
            raise NotNestedError
        quotient, remainder = self.divide(left, int(right))
        return quotient if sign == "//" else remainder

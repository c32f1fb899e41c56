"""Layout pairs for the tests of the solver, enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod

from colocc.layout import DEFAULT_ORDER, Layout

OLD_ORDER = "tp-cp-pp-dp"
WHOLE = ("sample",)
SEQUENCE = ("sample", "sequence")
ROWS = ("sample", "row", "position")
# Encoder tp, dp and language tp, pp, dp, on 8 ranks.
TUPLES = (
    ((2, 4), (4, 1, 2)),
    ((4, 2), (2, 1, 4)),
    ((4, 2), (4, 1, 2)),
    ((2, 4), (2, 2, 2)),
    ((4, 2), (2, 2, 2)),
    ((1, 8), (4, 2, 1)),
    ((4, 2), (1, 2, 4)),
    ((1, 8), (2, 2, 2)),
    ((8, 1), (1, 1, 8)),
    ((8, 1), (2, 2, 2)),
    ((2, 4), (1, 4, 2)),
)


def factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    sizes = [n for n in range(1, number + 1) if number % n == 0]
    return (found for found in itertools.product(sizes, repeat=parts) if prod(found) == number)


def layouts(world: int, axes: tuple[str, ...]) -> Iterator[Layout]:
    """Every layout of ``world`` ranks over ``axes``, each rank grid once, uncut."""
    for sizes in factorings(world, len(axes)):
        used = [axis for axis, size in zip(axes, sizes, strict=True) if size > 1]
        for order in itertools.permutations(used):
            # The default keeps its own spelling: a missing axis of size one changes nothing.
            text = "-".join(order) or DEFAULT_ORDER
            yield layout_of(dict(zip(axes, sizes, strict=True)), text)


def layout_of(sizes: dict[str, int], order: str) -> Layout:
    tp, cp, pp, dp = (sizes.get(axis, 1) for axis in ("tp", "cp", "pp", "dp"))
    return Layout(tp=tp, cp=cp, pp=pp, dp=dp, order=order)


def cut(layout: Layout) -> Iterator[Layout]:
    """The layout with its sequence cut in every way that differs."""
    for sp in (False, True)[: 1 + (layout.tp > 1)]:
        for zigzag in (False, True)[: 1 + (layout.cp > 1)]:
            yield replace(layout, sp=sp, zigzag=zigzag)


def pairs(world: int) -> Iterator[tuple[Layout, Layout, tuple[str, ...]]]:
    """Every source and reader of ``world`` ranks, with the dims that they may cut."""
    sources = list(layouts(world, ("tp", "cp", "dp")))
    readers = list(layouts(world, ("tp", "cp", "pp", "dp")))
    yield from ((src, dst, WHOLE) for src in sources for dst in readers)
    cut_sources = [found for layout in sources for found in cut(layout)]
    cut_readers = [found for layout in readers for found in cut(layout)]
    for dims in (SEQUENCE, ROWS):
        yield from ((src, dst, dims) for src in cut_sources for dst in cut_readers)


def tuple_pair(index: int, order: str) -> tuple[Layout, Layout]:
    (tp, dp), (language_tp, pp, language_dp) = TUPLES[index]
    return (
        Layout(tp=tp, dp=dp, order=order),
        Layout(tp=language_tp, pp=pp, dp=language_dp, order=order),
    )

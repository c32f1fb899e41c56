"""Layout pairs for the tests of the solver, enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import prod

from colocc.layout import DEFAULT_ORDER, Layout

OLD_ORDER = "tp-cp-pp-dp"
# Encoder tp, dp and language tp, pp, dp of design section 7.
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


def divides(left: int, right: int) -> bool:
    return max(left, right) % min(left, right) == 0


def factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    sizes = [n for n in range(1, number + 1) if number % n == 0]
    return (found for found in itertools.product(sizes, repeat=parts) if prod(found) == number)


def layouts(world: int, axes: tuple[str, ...]) -> Iterator[Layout]:
    """Every layout of ``world`` ranks over ``axes``, each rank grid once."""
    for sizes in factorings(world, len(axes)):
        used = [axis for axis, size in zip(axes, sizes, strict=True) if size > 1]
        for order in itertools.permutations(used):
            # The default keeps its own spelling: a missing axis of size one changes nothing.
            text = "-".join(order) or DEFAULT_ORDER
            yield Layout(**dict(zip(axes, sizes, strict=True)), order=text)


def pairs(world: int) -> Iterator[tuple[Layout, Layout]]:
    """Every encoder and language layout of ``world`` ranks where one dp divides the other."""
    readers = list(layouts(world, ("tp", "pp", "dp")))
    for src in layouts(world, ("tp", "dp")):
        yield from ((src, dst) for dst in readers if divides(src.dp, dst.dp))


def tuple_pair(index: int, order: str) -> tuple[Layout, Layout]:
    (tp, dp), (language_tp, pp, language_dp) = TUPLES[index]
    return (
        Layout(tp=tp, dp=dp, order=order),
        Layout(tp=language_tp, pp=pp, dp=language_dp, order=order),
    )

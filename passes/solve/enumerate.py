"""Every pair of layouts of a number of ranks, each problem once, solved and proved.

Two layouts are *alike* at one end of an edge if they place all ranks alike and cut alike, so that
every plan is the same but for names: an axis of size one is no axis; neighbouring axes over which a
value is copied are one axis (a whole value on tp2 cp2 is one on tp4); a sequence cut over tp and
then over cp is one cut over tp * cp. Of alike layouts one is taken. Nothing else is left out.

What is cut depends on the edge, so each pair counts for all of these that differ:

whole       the value is whole on every rank; readers on cp ranks have summands of its gradient
sequence    both ends cut the sequence as their layouts say; at least one does
positions   the source cuts rows, the reader positions; both do (where one does, it is sequence)

Which samples a slot holds is one choice for all edges of a module. Where both layouts cut the
sequence, that choice depends on the cuts, also for a value that is whole; so of whole values each
choice counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product

from colocc.errors import VerifyError
from colocc.layout import DEFAULT_ORDER, Layout
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Plan
from colocc.passes.solve.slots import slots_of
from colocc.passes.solve.solver import solve

AXES = ("tp", "cp", "pp", "dp")
USUAL = (DEFAULT_ORDER, "tp-cp-pp-dp")
DIMS = {
    "whole": ("sample",),
    "sequence": ("sample", "sequence"),
    "positions": ("sample", "row", "position"),
}
LEAST = {"whole": 0, "sequence": 1, "positions": 2}
"""How many ends must cut for an edge to be one of its kind."""
Pair = tuple[Layout, Layout, str]
"""Source, reader, and what is cut."""
Shape = tuple[tuple[str, int], ...]
"""What ranks are to an edge, fastest first: (role, size)."""


def layouts(world: int, axes: tuple[str, ...], orders: Iterable[str] | None) -> list[Layout]:
    """Every layout of ``world`` ranks over ``axes``, with its sequence cut in every way.

    ``orders`` are the orders of axes, None for all.
    """
    found: dict[tuple[object, ...], Layout] = {}
    for sizes in _factorings(world, len(axes)):
        size = dict(zip(axes, sizes, strict=True))
        used = [axis for axis in axes if size[axis] > 1]
        every = ["-".join(order) or DEFAULT_ORDER for order in permutations(used)]
        for order in every if orders is None else orders:
            grid = tuple(axis for axis in order.split("-") if size.get(axis, 1) > 1)
            layout = _layout(size, order)
            for sp in (False, True)[: 1 + (layout.tp > 1)]:
                for zigzag in (False, True)[: 1 + (layout.cp > 1)]:
                    key = (sizes, grid, sp, zigzag)
                    found.setdefault(key, replace(layout, sp=sp, zigzag=zigzag))
    return list(found.values())


def _layout(size: dict[str, int], order: str) -> Layout:
    tp, cp, pp, dp = (size.get(axis, 1) for axis in AXES)
    return Layout(tp=tp, cp=cp, pp=pp, dp=dp, order=order)


def _factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factorings(number // first, parts - 1))


def shape(layout: Layout, cut: str, *, reads: bool) -> Shape:
    """What the ranks of a layout are to an edge; alike layouts have one shape."""
    names = {"dp": "dp", "pp": "pp", "tp": "copies", "cp": "summands" if reads else "copies"}
    if cut != "whole":
        names["cp"] = "folds" if layout.zigzag else "outer"
        names["tp"] = "inner" if layout.sp else "copies"
        if layout.cp == 1:
            names["tp"] = "outer" if layout.sp else "copies"
    found: list[tuple[str, int]] = []
    for axis, size in layout.sizes.items():
        before = found[-1] if found else ("", 1)
        role = names[axis]
        if size == 1:
            continue
        # One axis in two parts: copies beside copies, and a contiguous cut inside another.
        if (before[0], role) in (("copies", "copies"), ("inner", "outer")):
            found[-1] = (role, before[1] * size)
        else:
            found.append((role, size))
    return tuple(found)


def pairs(
    world: int, axes: tuple[str, ...] = AXES, orders: Iterable[str] | None = None
) -> list[Pair]:
    """Every pair of ``world`` ranks, of alike ones the first; those of the same two rank grids lie
    side by side.

    Pairs of whole values between two layouts that cut the sequence are all there, though most are
    alike (``is_another``).
    """
    sources = _shaped(world, tuple(axis for axis in axes if axis != "pp"), orders, reads=False)
    readers = _shaped(world, axes, orders, reads=True)
    found: dict[object, Pair] = {}
    # Plain layouts come first, so that a plain one stands for all that are alike (is_another).
    for (src, left), (dst, right) in sorted(product(sources, readers), key=_flags):
        cutting = _cuts(src) + _cuts(dst)
        for cut in DIMS:
            key: tuple[object, ...] = (cut, left[cut], right[cut])
            if cut == "whole" and cutting == 2:
                key = (*key, left["sequence"], right["sequence"])
            if cutting >= LEAST[cut]:
                found.setdefault(key, (src, dst, cut))
    return sorted(found.values(), key=_grids)


Shaped = tuple[Layout, dict[str, Shape]]


def _shaped(
    world: int, axes: tuple[str, ...], orders: Iterable[str] | None, *, reads: bool
) -> list[Shaped]:
    return [
        (layout, {cut: shape(layout, cut, reads=reads) for cut in DIMS})
        for layout in layouts(world, axes, orders)
    ]


def _flags(pair: tuple[Shaped, Shaped]) -> int:
    (src, _), (dst, _) = pair
    return src.sp + src.zigzag + dst.sp + dst.zigzag


def _grids(pair: Pair) -> tuple[tuple[tuple[str, int], ...], ...]:
    return tuple([tuple(layout.sizes.items()) for layout in pair[:2]])


def _cuts(layout: Layout) -> bool:
    return layout.cp > 1 or layout.sp


def is_another(pair: Pair) -> bool:
    """Whether a pair is not the same problem as that of its layouts without their cuts."""
    src, dst, cut = pair
    if cut != "whole" or not (_cuts(src) and _cuts(dst)):
        return True
    plain = _plain(src), _plain(dst)
    return (src, dst) == plain or slots_of(src, dst) != slots_of(*plain)


@lru_cache(maxsize=4096)
def _plain(layout: Layout) -> Layout:
    return replace(layout, sp=False, zigzag=False)


def written(world: int, axes: tuple[str, ...] = AXES, orders: Iterable[str] | None = None) -> int:
    """How many pairs of layouts there are before alike ones are taken together."""
    sources = layouts(world, tuple(axis for axis in axes if axis != "pp"), orders)
    return len(sources) * len(layouts(world, axes, orders))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one pair: what is wrong forward and backward, empty for nothing; the worst received/bound
    ratio of a rank, and the reason, of each direction that is above its bound."""

    wrong: tuple[str, str] = ("", "")
    above: tuple[tuple[str, Fraction], ...] = ()


def judge(pair: Pair) -> Verdict:
    """Solve and prove one pair."""
    src, dst, cut = pair
    plan = solve(("images", src), ("language", dst), dims=DIMS[cut])
    try:
        check(plan)
    except VerifyError as error:
        text = str(error)
        backward = "is wrong: backward, " in text
        return Verdict(("", text) if backward else (text, ""))
    return Verdict(above=tuple(_above(plan)))


def _above(plan: Plan) -> Iterator[tuple[str, Fraction]]:
    if not plan.reasons:
        return  # the checker has counted: no rank is above its bound, or it wants a reason
    ways = zip(("fwd", "bwd"), plan.received_cells(), plan.bound_cells(), strict=True)
    for way, received, bound in ways:
        over = received > bound
        if over.any():
            reason = [why for why in plan.reasons if why.startswith(way)] or [f"{way} no reason"]
            # A rank that needs nothing and receives something has no ratio; it counts as all of it.
            worst = max(
                Fraction(int(got), int(least) or 1)
                for got, least in zip(received[over], bound[over], strict=True)
            )
            yield reason[0], worst

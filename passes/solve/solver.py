"""Solve one edge: from the layouts of source and reader, the steps forward and backward.

Algorithm:
1. Choose which samples each encoder slot holds. Slot s gets, of the samples of language replica d,
   the share that its ranks have in d: cells[s, d] = |ranks of s and d| / world. Rows and columns
   sum to 1/dp of either side, whatever the rank orders, so it is always a bijection; and no rank
   waits for samples that it could have encoded itself.
2. Forward, every reader takes each missing unit from the rank of the holding slot that has the
   reader's own coordinates on the source layout apart from dp (and pp): so a group is part of one
   of the source's dp groups, and suppliers share the load.
3. Backward is the same question with the roles swapped: the source's ranks read the gradient that
   the readers hold. The gradient of a tp-replicated value is itself replicated (each tp rank has
   all of it), so each unit is taken from exactly one holder and nothing is summed.
4. Name the step: units that stay are a narrow; a group whose members all need all of it is an
   all_gather; anything else is one all_to_all.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import Literal

import numpy as np
import sympy

from colocc.errors import LayoutError
from colocc.layout import RANK, Layout, closed_form
from colocc.passes.solve.plan import Holding, Interval, Plan, Step, length

FIRST_STAGE = (0,)


def solve(
    src: tuple[str, Layout], dst: tuple[str, Layout], *, scale: Fraction = Fraction(1)
) -> Plan:
    """Return the plan that carries a value of module ``src`` to module ``dst`` and its gradient
    back.

    ``src`` and ``dst`` are (name, layout). The reader holds the value on its first stage only.
    ``scale`` multiplies the gradient on its way back.

    Raises: LayoutError for a pair outside what the solver covers, naming both and the arithmetic.
    """
    check_pair(src, dst)
    (src_name, src_layout), (dst_name, dst_layout) = src, dst
    cells, units = _cells(src_layout, dst_layout)
    stages = FIRST_STAGE if dst_layout.pp > 1 else None
    holds = Holding(src_name, src_layout, _slots(cells))
    reads = Holding(dst_name, dst_layout, _replicas(dst_layout.dp, units), stages)
    larger, smaller = max(src_layout.dp, dst_layout.dp), min(src_layout.dp, dst_layout.dp)
    kind: Literal["fan_in", "fan_out", "equal"] = "equal"
    if src_layout.dp != dst_layout.dp:
        kind = "fan_in" if src_layout.dp > dst_layout.dp else "fan_out"
    return Plan(
        src=holds,
        dst=reads,
        units=units,
        kind=kind,
        ratio=larger // smaller,
        where=_where(src, dst, cells),
        forward=steps(holds, reads),
        backward=steps(reads, holds),
        scale=scale,
    )


def check_pair(src: tuple[str, Layout], dst: tuple[str, Layout]) -> None:
    """Raise LayoutError unless this version of the solver covers the pair."""
    (src_name, src_layout), (dst_name, dst_layout) = src, dst
    if src_layout.size != dst_layout.size:
        raise LayoutError(
            f"{src_name} ({src_layout}) has {src_layout.size} ranks, {dst_name} ({dst_layout}) has "
            f"{dst_layout.size}: both must be on the same ranks. Make the products of the axes "
            "equal."
        )
    for name, layout in (src, dst):
        if layout.cp > 1:
            raise LayoutError(
                f"{name} ({layout}) has cp{layout.cp}: redistribution between {src_name} and "
                f"{dst_name} covers cp1. Give the ranks of cp to dp or tp."
            )
    if src_layout.pp > 1:
        raise LayoutError(
            f"{src_name} ({src_layout}) feeds {dst_name} and has pp{src_layout.pp}: an encoder "
            f"runs with pp1. Write tp{src_layout.tp} dp{src_layout.dp * src_layout.pp} for "
            f"{src_name}."
        )
    larger, smaller = max(src_layout.dp, dst_layout.dp), min(src_layout.dp, dst_layout.dp)
    if larger % smaller:
        fits = [n for n in range(1, src_layout.size + 1) if src_layout.size % n == 0]
        fits = [n for n in fits if n % dst_layout.dp == 0 or dst_layout.dp % n == 0]
        raise LayoutError(
            f"{src_name} ({src_layout}) has {src_layout.dp} dp slots, {dst_name} ({dst_layout}) "
            f"has {dst_layout.dp}: {larger} % {smaller} = {larger % smaller}, neither divides the "
            f"other. Give {src_name} dp {' or '.join(map(str, fits))}."
        )


def _cells(src: Layout, dst: Layout) -> tuple[np.ndarray, int]:
    """cells[s, d]: units of replica d that slot s holds; and the units of a whole step."""
    ranks = np.zeros((src.dp, dst.dp), dtype=np.int64)
    np.add.at(ranks, (src.coordinates("dp"), dst.coordinates("dp")), 1)
    common = gcd(*(int(count) for count in ranks.ravel()))
    return ranks // common, src.size // common


def _slots(cells: np.ndarray) -> tuple[tuple[Interval, ...], ...]:
    """Cut each replica's units among its slots, ascending; join what touches."""
    slots: list[list[Interval]] = [[] for _ in range(cells.shape[0])]
    start = 0
    for replica in range(cells.shape[1]):
        for slot in range(cells.shape[0]):
            stop = start + int(cells[slot, replica])
            if stop > start:
                _append(slots[slot], (start, stop))
            start = stop
    return tuple(tuple(slot) for slot in slots)


def _replicas(dp: int, units: int) -> tuple[tuple[Interval, ...], ...]:
    size = units // dp
    return tuple(((index * size, (index + 1) * size),) for index in range(dp))


def _append(intervals: list[Interval], new: Interval) -> None:
    if intervals and intervals[-1][1] == new[0]:
        intervals[-1] = (intervals[-1][0], new[1])
    else:
        intervals.append(new)


def steps(have: Holding, need: Holding) -> tuple[Step, ...]:
    """The steps after which every rank holds what ``need`` says, from what ``have`` says."""
    pieces = _pieces(have, need)
    world = have.layout.size
    sends: list[dict[int, list[Interval]]] = [{} for _ in range(world)]
    for reader, parts in enumerate(pieces):
        for supplier, start, stop in parts:
            _append(sends[supplier].setdefault(reader, []), (start, stop))
    held = [length(units) for units in have.units()]
    if all(set(to) <= {rank} for rank, to in enumerate(sends)):
        return _narrow(held, [to.get(rank, []) for rank, to in enumerate(sends)])
    groups = _components(sends)
    gather = _as_all_gather(held, sends, groups)
    if gather is not None:
        return gather
    flat = []
    for rank, to in enumerate(sends):
        if any(len(intervals) != 1 for intervals in to.values()):
            raise LayoutError(
                f"{have.module} ({have.layout}) -> {need.module} ({need.layout}): rank {rank} "
                "would send several runs of samples to one peer, which this version does not "
                "cover. Write both layouts in one order."
            )
        flat.append(tuple((peer, *to[peer][0]) for peer in sorted(to)))
    return (Step("all_to_all", groups, sends=tuple(flat)),)


def _pieces(have: Holding, need: Holding) -> list[list[tuple[int, int, int]]]:
    """For every rank, in the order of its need: (supplier, start, stop) in the supplier's
    buffer."""
    layout, world = have.layout, have.layout.size
    others = {axis: layout.coordinates(axis) for axis in layout.sizes if axis not in ("dp", "pp")}
    stage = layout.coordinates("pp") if have.stages is None else np.full(world, have.stages[0])
    own_slot, own_stage = layout.coordinates("dp"), layout.coordinates("pp")
    wants = need.units()
    found: list[list[tuple[int, int, int]]] = []
    for rank in range(world):
        coordinates = {axis: int(values[rank]) for axis, values in others.items()}
        holds = have.stages is None or int(own_stage[rank]) in have.stages
        parts = []
        for slot, start, stop in _locate(have.slots, wants[rank]):
            supplier = rank
            if not (holds and slot == own_slot[rank]):
                supplier = int(layout.rank(dp=slot, pp=int(stage[rank]), **coordinates))
            parts.append((supplier, start, stop))
        found.append(parts)
    return found


def _locate(
    slots: tuple[tuple[Interval, ...], ...], wants: tuple[Interval, ...]
) -> list[tuple[int, int, int]]:
    """``wants`` cut at the borders of the slots: (slot, start, stop) in the slot's buffer, in
    order."""
    cuts = []
    for slot, intervals in enumerate(slots):
        offset = 0
        for start, stop in intervals:
            for first, last in wants:
                low, high = max(start, first), min(stop, last)
                if low < high:
                    cuts.append((low, slot, offset + low - start, offset + high - start))
            offset += stop - start
    return [(slot, start, stop) for _, slot, start, stop in sorted(cuts)]


def _narrow(held: list[int], keeps: list[list[Interval]]) -> tuple[Step, ...]:
    if all(kept == [(0, size)] for kept, size in zip(keeps, held, strict=True)):
        return ()
    return (Step("narrow", keeps=tuple(tuple(kept) for kept in keeps)),)


def _components(sends: list[dict[int, list[Interval]]]) -> tuple[tuple[int, ...], ...]:
    """The sets of ranks that exchange anything, directly or not."""
    leader = list(range(len(sends)))

    def find(rank: int) -> int:
        while leader[rank] != rank:
            leader[rank] = leader[leader[rank]]
            rank = leader[rank]
        return rank

    for rank, to in enumerate(sends):
        for peer in to:
            low, high = sorted((find(rank), find(peer)))
            leader[high] = low
    members: dict[int, list[int]] = {}
    for rank in range(len(sends)):
        members.setdefault(find(rank), []).append(rank)
    return tuple(tuple(group) for _, group in sorted(members.items()) if len(group) > 1)


def _as_all_gather(
    held: list[int],
    sends: list[dict[int, list[Interval]]],
    groups: tuple[tuple[int, ...], ...],
) -> tuple[Step, ...] | None:
    """The steps as an all_gather of one interval per rank, after a narrow where that is not all it
    has; None where members send different things, or not to everyone, or unequal amounts."""
    kept: list[list[Interval]] = [to.get(rank, []) for rank, to in enumerate(sends)]
    for group in groups:
        for rank in group:
            to = sends[rank]
            if set(to) != set(group) or any(part != to[rank] for part in to.values()):
                return None
        if len({length(tuple(kept[rank])) for rank in group}) != 1:
            return None
    return (*_narrow(held, kept), Step("all_gather", groups))


def _where(src: tuple[str, Layout], dst: tuple[str, Layout], cells: np.ndarray) -> str:
    """The solved relation between the dp coordinates, as the dump prints it.

    One side's coordinate is a function of the other's exactly if each row (or column) of ``cells``
    has one entry. Sympy derives the closed form; where none exists the ranks' own coordinates
    stand.
    """
    (src_name, src_layout), (dst_name, dst_layout) = src, dst
    left, right = f"{src_name}.dp", f"{dst_name}.dp"
    if (np.count_nonzero(cells, axis=1) == 1).all():
        form = _fit(cells.argmax(axis=1), left)
        if form is not None:
            return f"{right} = {form}"
    if (np.count_nonzero(cells, axis=0) == 1).all():
        form = _fit(cells.argmax(axis=0), right)
        if form is not None:
            return f"{left} = {form}"
    src_form = closed_form(src_layout.coordinate("dp"))
    dst_form = closed_form(dst_layout.coordinate("dp"))
    return f"{left} = {src_form}, {right} = {dst_form}"


def _fit(values: np.ndarray, name: str) -> str | None:
    """``values`` as ``floor(x / a) mod n`` of their index, printed with ``name`` for x."""
    size = len(values)
    image = int(values.max()) + 1
    for stride in (n for n in range(1, size + 1) if size % n == 0):
        if (values == np.arange(size) // stride % image).all():
            expr = sympy.floor(RANK / stride)
            if stride * image < size:
                expr = sympy.Mod(expr, image)
            return closed_form(expr if image > 1 else sympy.Integer(0), name)
    return None

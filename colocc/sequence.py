"""How a layout cuts the sequence of its module's values: over cp, then over tp where it says sp.

The sequence is cut into equal chunks, and each rank holds one or two runs of them:

    tp2 cp2 sp           chunks 0 1 2 3      cp0: 0 1   cp1: 2 3        tp t: the t-th of these
    cp2 zigzag           chunks 0 1 2 3      cp0: 0 3   cp1: 1 2
    tp2 cp2 sp zigzag    chunks 0 1 2 3      cp0: 0 3   cp1: 1 2        tp t: the t-th of these

Zigzag is Megatron's cut for causal attention (``get_batch_on_this_cp_rank``): of 2 * cp chunks,
rank c has chunk c and chunk 2 * cp - 1 - c, one of little work and one of much. Sequence
parallelism cuts what is left on the cp rank, in its order, over tp.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm

import numpy as np
import sympy
from numpy.typing import NDArray

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.ranks import closed_form

Interval = tuple[int, int]
Intervals = tuple[Interval, ...]


def axes_of(layout: Layout) -> tuple[str, ...]:
    """The axes that cut the sequence, fastest first; none where every rank has all of it."""
    return ("tp",) * (layout.sp and layout.tp > 1) + ("cp",) * (layout.cp > 1)


@lru_cache(maxsize=256)
def cuts(layout: Layout) -> tuple[int, tuple[Intervals, ...]]:
    """The number of chunks, and the chunks of each part of the sequence.

    Part i belongs to the ranks whose coordinates on ``axes_of(layout)`` make the number i, the
    first axis counting fastest.
    """
    lanes = layout.tp if layout.sp else 1
    folded = layout.zigzag and layout.cp > 1
    chunks = lcm(2 * layout.cp, layout.cp * lanes) if folded else layout.cp * lanes
    return chunks, tuple(
        _part(cp, tp, layout.cp, lanes, chunks, folded=folded)
        for cp in range(layout.cp)
        for tp in range(lanes)
    )


def _part(cp: int, tp: int, cps: int, lanes: int, chunks: int, *, folded: bool) -> Intervals:
    """The chunks of one rank: its share of the local sequence, put back into the whole one."""
    runs: tuple[Interval, ...]
    if folded:
        half = chunks // (2 * cps)
        runs = ((cp * half, (cp + 1) * half), ((2 * cps - 1 - cp) * half, (2 * cps - cp) * half))
    else:
        width = chunks // cps
        runs = ((cp * width, (cp + 1) * width),)
    share = chunks // (cps * lanes)
    first, last = tp * share, (tp + 1) * share
    found: list[Interval] = []
    before = 0
    for start, stop in runs:
        low, high = max(first, before), min(last, before + stop - start)
        if low < high:
            found.append((start + low - before, start + high - before))
        before += stop - start
    if len(found) == 2 and found[0][1] == found[1][0]:
        found = [(found[0][0], found[1][1])]
    return tuple(found)


def same_sequence(left: Layout, right: Layout) -> bool:
    """Whether every rank holds the same part of a sequence under both layouts.

    The layouts place their ranks alike (``Layout.same_grid``).
    """
    return axes_of(left) == axes_of(right) and cuts(left) == cuts(right)


def check_length(what: str, length: int, layout: Layout) -> None:
    """Raise LayoutError unless a sequence of ``length`` can be cut as ``layout`` says."""
    chunks, _ = cuts(layout)
    if length % chunks:
        how = [f"cp{layout.cp}"] * (layout.cp > 1) + [f"tp{layout.tp} sp"] * layout.sp
        zigzag = " (2 chunks for each cp rank)" if layout.zigzag and layout.cp > 1 else ""
        raise LayoutError(
            f"{what} has a sequence of {length}, which {' and '.join(how)}{zigzag} cut into "
            f"{chunks} equal chunks: {length} % {chunks} = {length % chunks}. Make it a multiple "
            f"of {chunks}."
        )


@lru_cache(maxsize=4096)
def form(layout: Layout) -> str:
    """The chunks of rank r in closed form, as the dump prints them; empty where nothing is cut."""
    if not axes_of(layout):
        return ""
    cp, tp = (closed_form(layout.coordinate(axis)) for axis in ("cp", "tp"))
    if not (layout.zigzag and layout.cp > 1):
        lanes = layout.tp if layout.sp else 1
        place = layout.coordinate("cp") * lanes + (layout.coordinate("tp") if layout.sp else 0)
        return f"chunk {closed_form(sympy.expand(place))} of {layout.cp * lanes}"
    held = f"chunks c and {2 * layout.cp - 1}-c of {2 * layout.cp}, c = {cp}"
    return f"part {tp} of {layout.tp} of {held}" if "tp" in axes_of(layout) else held


def part_of(layout: Layout) -> NDArray[np.int64]:
    """The number of the part of the sequence that every rank holds."""
    lanes = layout.tp if layout.sp else 1
    found: NDArray[np.int64] = layout.coordinates("cp") * lanes
    return found + layout.coordinates("tp") if layout.sp else found

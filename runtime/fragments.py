"""The parts of a value that a rank holds between the steps of a plan, and where they lie.

A fragment is a tensor that holds a box of the plan's grid (passes/solve/plan.py), its cells in
order and the dims of the grid first. Where a piece lies in it follows from the layouts; how many
elements a cell has, its *sizes*, comes with the value. A piece is a box of one interval for each
dim, so it is a contiguous slice of each dim of one fragment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from colocc.passes.solve.boxes import Box, Interval, Intervals, length, pieces
from colocc.passes.solve.plan import Holding, Moves, Step

Sizes = tuple[int, ...]
"""The elements of one cell along each dim of the grid."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A piece in a fragment: which one, and for each dim where it starts in it and how long it is,
    in cells."""

    fragment: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    def of(self, fragments: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """The piece, as a view."""
        found = fragments[self.fragment]
        places = zip(self.starts, self.lengths, sizes, strict=True)
        for dim, (start, count, size) in enumerate(places):
            found = found.narrow(dim, start * size, count * size)
        return found


def locate(piece: Box, boxes: Sequence[Box]) -> Cut:
    """Where ``piece`` lies in the first of ``boxes`` that holds it.

    Raises: ValueError if none does.
    """
    for index, box in enumerate(boxes):
        places = [_place(run, intervals) for (run,), intervals in zip(piece, box, strict=True)]
        starts = tuple(place for place in places if place is not None)
        if len(starts) == len(places):
            return Cut(index, starts, tuple(stop - start for ((start, stop),) in piece))
    raise ValueError(f"{piece} is in none of {list(boxes)}")


def _place(run: Interval, intervals: Intervals) -> int | None:
    before = 0
    for start, stop in intervals:
        if start <= run[0] and run[1] <= stop:
            return before + run[0] - start
        before += stop - start
    return None


def runs_of(box: Box) -> Iterator[Box]:
    """The pieces that make up ``box``."""
    for low, high in pieces(box):
        yield tuple(((start, stop),) for start, stop in zip(low, high, strict=True))


def moved(moves: Moves) -> list[Box]:
    """The pieces of ``moves``, in their order."""
    rows = zip(moves.low.tolist(), moves.high.tolist(), strict=True)
    return [tuple(((a, b),) for a, b in zip(low, high, strict=True)) for low, high in rows]


def box_of(holding: Holding, rank: int) -> Box:
    """The box of ``rank``, neighbouring intervals merged.

    A rank of a stage that holds nothing has no samples, of its own part of the sequence.
    """
    index = [int(part.index(holding.layout)[rank]) for part in holding.parts]
    cuts = [merged(part.cuts[i]) for part, i in zip(holding.parts, index, strict=True)]
    return tuple(cuts) if holding.holds()[rank] else ((), *cuts[1:])


def merged(intervals: Intervals) -> Intervals:
    """``intervals``, ascending, with those that touch made one."""
    found: list[Interval] = []
    for start, stop in intervals:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def join(boxes: Sequence[Box]) -> Box | None:
    """The box whose elements, in its order, are those of ``boxes`` one after the other; None where
    there is none."""
    if not boxes or any(box[1:] != boxes[0][1:] for box in boxes):
        return None
    runs = [run for box in boxes for run in box[0]]
    if any(left[1] > right[0] for left, right in pairwise(runs)):
        return None
    return (merged(tuple(runs)), *boxes[0][1:])


def held(steps: Sequence[Step], start: Holding, rank: int) -> list[Box]:
    """What ``rank`` holds after ``steps``, in the order in which it packs it."""
    if not steps:
        box = box_of(start, rank)
        return [box] if box[0] else []
    *before, step = steps
    if step.kind == "all_gather":
        return [box for r in step.group_of(rank) or (rank,) for box in held(before, start, r)]
    if step.kind == "all_reduce":
        return held(before, start, rank)
    return list(dict.fromkeys(moved(step.moves.of(dst=rank))))


def shape_of(box: Box, sizes: Sizes, rest: Sequence[int]) -> tuple[int, ...]:
    """The shape of a fragment that holds ``box``; ``rest`` are the dims that no grid dim cuts."""
    return (*(length(runs) * size for runs, size in zip(box, sizes, strict=True)), *rest)

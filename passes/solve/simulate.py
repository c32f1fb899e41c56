"""Execute a plan's steps in one process, on one numpy array per rank.

What a rank holds is a list of fragments: the corners of a piece of the grid, and its elements. A
step cuts pieces out of the sender's fragments and hands them to the receiver; after the last step a
rank's fragments are laid out as its box.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from colocc.errors import LayoutError
from colocc.passes.solve.boxes import Box, length, pieces
from colocc.passes.solve.plan import Plan, Step

Corners = tuple[tuple[int, ...], tuple[int, ...]]
Fragment = tuple[Corners, np.ndarray]


def simulate(
    plan: Plan,
    shards: Sequence[np.ndarray],
    *,
    backward: bool = False,
    tensor_dims: tuple[int, ...] | None = None,
) -> list[np.ndarray]:
    """Return what each rank ends with, from what each rank holds at the start.

    Shapes: ``shards[r]`` is rank r's box of the value (of its gradient where ``backward``), with
    its cells along ``tensor_dims``, one for each dim of the plan; by default sample is dim 0,
    sequence dim 1 and slice the last. A rank that holds nothing brings an array of any size.
    Raises: LayoutError for another number of shards, or shards whose sizes do not fit the cells.
    """
    start, end = (plan.dst, plan.src) if backward else (plan.src, plan.dst)
    dims = default_dims(plan) if tensor_dims is None else tensor_dims
    if len(shards) != start.layout.size or len(dims) != len(plan.dims):
        raise LayoutError(
            f"{len(shards)} shards and {len(dims)} tensor dims for {start.layout.size} ranks of "
            f"{start.module} ({start.layout}) and the dims {', '.join(plan.dims)}"
        )
    boxes = start.boxes()
    size = _cell_size(plan, boxes, shards, dims)
    state = [_cut(box, shard, dims, size) for box, shard in zip(boxes, shards, strict=True)]
    for step in plan.backward if backward else plan.forward:
        state = _run(step, state, dims, size)
    empty = [shard.dtype for shard in shards]
    like = next(shard for box, shard in zip(boxes, shards, strict=True) if box)
    found = [
        _lay_out(box, held, like, dims, size, dtype)
        for box, held, dtype in zip(end.boxes(), state, empty, strict=True)
    ]
    return [part * float(plan.scale) for part in found] if backward and plan.scale != 1 else found


def default_dims(plan: Plan) -> tuple[int, ...]:
    """The tensor dim of each dim of the plan: the sample first, then the sequence, slices last."""
    places = {"sample": 0, "sequence": 1, "slice": -1}
    for dim in plan.dims:
        if dim not in places:
            raise LayoutError(
                f"the cells of dim {dim} have as many rows as the batch says: they are no dim of a "
                "tensor. Simulate a plan over sample and sequence."
            )
    return tuple(places[dim] for dim in plan.dims)


def _cell_size(
    plan: Plan, boxes: list[Box], shards: Sequence[np.ndarray], dims: tuple[int, ...]
) -> tuple[int, ...]:
    """How many elements one cell has along each of ``dims``; the same on every rank."""
    sizes: set[tuple[int, ...]] = set()
    for rank, (box, shard) in enumerate(zip(boxes, shards, strict=True)):
        if not box:
            continue
        cells = tuple(length(intervals) for intervals in box)
        lengths = tuple(shard.shape[dim] for dim in dims)
        if any(n % count for n, count in zip(lengths, cells, strict=True)):
            raise LayoutError(
                f"rank {rank} brings {list(shard.shape)} for {' x '.join(map(str, cells))} cells "
                f"({', '.join(plan.dims)}): the lengths {list(lengths)} are no multiples of these"
            )
        sizes.add(tuple(n // count for n, count in zip(lengths, cells, strict=True)))
    if len(sizes) != 1:
        raise LayoutError(f"the ranks' shards have cells of different sizes: {sorted(sizes)}")
    return sizes.pop()


def _slices(
    inner: Corners, outer: Corners, ndim: int, dims: tuple[int, ...], size: tuple[int, ...]
) -> tuple[slice, ...]:
    """Where the piece ``inner`` lies in an array that holds the piece ``outer``."""
    found = [slice(None)] * ndim
    for place, dim in enumerate(dims):
        first = outer[0][place]
        found[dim] = slice(
            (inner[0][place] - first) * size[place], (inner[1][place] - first) * size[place]
        )
    return tuple(found)


def _cut(
    box: Box, shard: np.ndarray, dims: tuple[int, ...], size: tuple[int, ...]
) -> list[Fragment]:
    found: list[Fragment] = []
    for corners, local in zip(pieces(box), pieces(packed(box)), strict=True):
        whole = (tuple(0 for _ in box), tuple(length(intervals) for intervals in box))
        found.append((corners, shard[_slices(local, whole, shard.ndim, dims, size)]))
    return found


def packed(box: Box) -> Box:
    """``box`` in the coordinates of a buffer that holds nothing else: its intervals join up."""
    found: list[tuple[tuple[int, int], ...]] = []
    for intervals in box:
        place = 0
        moved: list[tuple[int, int]] = []
        for start, stop in intervals:
            moved.append((place, place + stop - start))
            place += stop - start
        found.append(tuple(moved))
    return tuple(found)


def _run(
    step: Step, state: list[list[Fragment]], dims: tuple[int, ...], size: tuple[int, ...]
) -> list[list[Fragment]]:
    after: list[list[Fragment]]
    if step.kind in ("all_gather", "all_reduce"):
        after = list(state)
        for group in step.groups:
            held = [state[rank] for rank in group]
            joined = [item for items in held for item in items]
            for rank in group:
                after[rank] = joined if step.kind == "all_gather" else _add(joined)
        return after
    after = [[] for _ in state]
    moves = step.moves
    rows = zip(
        moves.src.tolist(), moves.dst.tolist(), moves.low.tolist(), moves.high.tolist(), strict=True
    )
    for src, dst, low, high in rows:
        after[dst].append(_take((tuple(low), tuple(high)), state[src], dims, size))
    return [_add(items) for items in after] if step.adds else after


def _take(
    piece: Corners, held: list[Fragment], dims: tuple[int, ...], size: tuple[int, ...]
) -> Fragment:
    for corners, values in held:
        inside = all(a <= c for a, c in zip(corners[0], piece[0], strict=True))
        if inside and all(c <= b for b, c in zip(corners[1], piece[1], strict=True)):
            return piece, values[_slices(piece, corners, values.ndim, dims, size)]
    raise LayoutError(f"the piece {piece} is sent by a rank that does not hold it")


def _add(items: list[Fragment]) -> list[Fragment]:
    found: dict[Corners, np.ndarray] = {}
    for corners, values in items:
        found[corners] = found[corners] + values if corners in found else values
    return list(found.items())


def _lay_out(
    box: Box,
    held: list[Fragment],
    like: np.ndarray,
    dims: tuple[int, ...],
    size: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """The fragments as one array in the order of ``box``; what a fragment does not fill is an
    error."""
    shape = list(like.shape)
    for place, dim in enumerate(dims):
        shape[dim] = (length(box[place]) if box else 0) * size[place]
    out = np.zeros(shape, dtype=dtype)
    filled = np.zeros(shape, dtype=np.int8)
    whole = (tuple(0 for _ in dims), tuple(length(intervals) for intervals in box))
    for corners, values in held:
        for (low, high), local in zip(pieces(box), pieces(packed(box)), strict=True):
            a = tuple(map(max, corners[0], low))
            b = tuple(map(min, corners[1], high))
            if any(x >= y for x, y in zip(a, b, strict=True)):
                continue
            shift = [p - q for p, q in zip(local[0], low, strict=True)]
            moved = tuple(tuple(x + s for x, s in zip(c, shift, strict=True)) for c in (a, b))
            target = _slices((moved[0], moved[1]), whole, out.ndim, dims, size)
            out[target] = values[_slices((a, b), corners, values.ndim, dims, size)]
            filled[target] += 1
    if not (filled == 1).all():
        raise LayoutError(f"the box {box} is not filled exactly once by what arrived")
    return out

"""Solve one edge: from what source and reader hold, the steps forward and backward.

Algorithm:
1. Choose which samples each slot of the source holds (slots.py). With the sequence (sequence.py)
   that gives every rank's box on both sides: have and need.
2. Cut every dim at all borders of both sides: each elementary interval then has one owner at the
   source and one at the reader, and their products are the pieces to move.
3. Every reader takes each piece from the rank of its owner that has the reader's own coordinates on
   the axes that the source replicates (its lane); from itself where it is that rank. So nothing is
   received twice, and suppliers share the load.
4. Backward is the same question with the roles swapped: the source's ranks read the gradient that
   the readers hold. Where the readers' gradients are replicated (tp), each piece is taken from
   exactly one of them; where they are summands (a value that every cp rank reads whole), from one
   of each, and they are added.
5. Name the step: pieces that stay are a narrow; groups whose members all need what each holds are
   an all_gather; a permutation is a send_recv; anything else is one all_to_all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from math import lcm, prod
from typing import Literal

import numpy as np
import sympy

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.solve.boxes import Counts, by_rank, take_rows
from colocc.passes.solve.pieces import Pieces, elementary, pieces_of, places_of
from colocc.passes.solve.plan import Holding, Moves, Part, Plan, Step, received
from colocc.passes.solve.slots import refine, replicas, slots_of
from colocc.passes.solve.two_level import copies, split
from colocc.ranks import RANK, closed_form
from colocc.sequence import axes_of, cuts, form
from colocc.types import Type

FIRST_STAGE = (0,)
Named = tuple[str, Layout]


def solve(
    src: Named,
    dst: Named,
    *,
    sink: Named | None = None,
    dims: tuple[str, ...] = ("sample",),
    scale: Fraction = Fraction(1),
    value: Type | None = None,
    ranks_per_node: int | None = None,
) -> Plan:
    """Return the plan that carries a value of module ``src`` to ``dst`` and its gradient back.

    ``src``, ``dst`` and ``sink`` are (name, layout); the sink, whose replicas order the samples, is
    ``dst`` if not given. ``dims`` are the dims that the layouts may cut (plan.py): sample alone,
    with sequence, or with row and position. A dim that is left out is whole on every rank, and the
    gradients of readers on several cp ranks are then summands. A pipelined reader holds the value
    on its first stage only. ``scale`` multiplies the gradient on its way back. Groups that span
    nodes of ``ranks_per_node`` ranks are crossed once by each byte where that can be.

    Raises: LayoutError for a pair that is not on the same ranks, or a source with pp > 1.
    """
    check_pair(src, dst)
    have, need, grid = holdings(src, dst, sink or dst, dims)
    if ranks_per_node is not None:
        there = pieces_of(have, need)
        slices = max(
            copies(_moves(*ends, ranks_per_node), ranks_per_node)
            for ends in ((have, need, there), (need, have, there.turned()))
            if _summands(ends[0]) == 1
        )
        if slices > 1:
            dims, grid = (*dims, "slice"), (*grid, slices)
            have, need = (
                replace(side, parts=(*side.parts, _whole(slices))) for side in (have, need)
            )
    there = pieces_of(have, need)
    forward, forward_why = steps(have, need, there, ranks_per_node)
    backward, backward_why = steps(need, have, there.turned(), ranks_per_node)
    larger, smaller = max(src[1].dp, dst[1].dp), min(src[1].dp, dst[1].dp)
    kind: Literal["fan_in", "fan_out", "equal"] = "equal"
    if src[1].dp != dst[1].dp:
        kind = "fan_in" if src[1].dp > dst[1].dp else "fan_out"
    reasons = [f"fwd {why}" for why in forward_why] + [f"bwd {why}" for why in backward_why]
    return Plan(
        src=have,
        dst=need,
        dims=dims,
        grid=grid,
        kind=kind,
        ratio=Fraction(larger, smaller),
        where=_where(have, need, dims),
        forward=forward,
        backward=backward,
        scale=scale,
        value=value,
        reasons=tuple(reasons),
        ranks_per_node=ranks_per_node,
    )


def check_pair(src: Named, dst: Named) -> None:
    """Raise LayoutError unless a plan exists: both on the same ranks, the source not pipelined."""
    (src_name, src_layout), (dst_name, dst_layout) = src, dst
    if src_layout.size != dst_layout.size:
        raise LayoutError(
            f"{src_name} ({src_layout}) has {src_layout.size} ranks, {dst_name} ({dst_layout}) has "
            f"{dst_layout.size}: both must be on the same ranks. Make the products of the axes "
            "equal."
        )
    if src_layout.pp > 1:
        raise LayoutError(
            f"{src_name} ({src_layout}) feeds {dst_name} and has pp{src_layout.pp}: an encoder "
            f"runs with pp1. Write tp{src_layout.tp} dp{src_layout.dp * src_layout.pp} for "
            f"{src_name}."
        )


def holdings(
    src: Named, dst: Named, sink: Named, dims: tuple[str, ...]
) -> tuple[Holding, Holding, tuple[int, ...]]:
    """What source and reader hold, and the grid that both are cut from."""
    sides = [_sample_part(side, sink) for side in (src, dst)]
    units = lcm(*(count for count, _ in sides))
    parts = [
        [Part(("dp",), tuple(refine(cut, units // count) for cut in slots))]
        for count, slots in sides
    ]
    grid = [units]
    for dim in dims[1:]:
        cut = [
            cuts(layout) if dim == "sequence" or (dim == "row") == (side == 0) else None
            for side, (_, layout) in enumerate((src, dst))
        ]
        chunks = lcm(*(found[0] for found in cut if found is not None))
        grid.append(chunks)
        for side, found in enumerate(cut):
            layout = (src, dst)[side][1]
            parts[side].append(_whole(chunks) if found is None else _sequence_part(layout, chunks))
    stages = FIRST_STAGE if dst[1].pp > 1 else None
    shared = ("cp",) if dst[1].cp > 1 and not {"sequence", "position"} & set(dims) else ()
    return (
        Holding(*src, tuple(parts[0])),
        Holding(*dst, tuple(parts[1]), stages, partial=shared),
        tuple(grid),
    )


def _sample_part(side: Named, sink: Named) -> tuple[int, Sequence[tuple[tuple[int, int], ...]]]:
    """The units and slots of one side: chosen for an encoder, in order for the sink itself."""
    if side == sink:
        return side[1].dp, replicas(side[1].dp, side[1].dp)
    return slots_of(side[1], sink[1])


@lru_cache(maxsize=1024)
def _sequence_part(layout: Layout, chunks: int) -> Part:
    """How a layout cuts a dim of ``chunks`` cells."""
    if not axes_of(layout):
        return _whole(chunks)
    count, parts = cuts(layout)
    return Part(axes_of(layout), tuple(refine(cut, chunks // count) for cut in parts))


def _whole(cells: int) -> Part:
    """A dim that every rank has all of."""
    return Part((), (((0, cells),),))


def steps(
    have: Holding, need: Holding, pieces: Pieces, ranks_per_node: int | None = None
) -> tuple[tuple[Step, ...], list[str]]:
    """The steps after which every rank holds what ``need`` says, and why if more than one
    communicates."""
    moves = _moves(have, need, pieces, ranks_per_node)
    adds = _summands(have) > 1
    pairs = _pairs(moves)
    if not len(pairs[0]):
        return _narrow(have, moves, adds), []
    why = []
    if adds:
        axes = "-".join(have.partial)
        why = [f"every cell has {_summands(have)} summands, one on each {axes} rank"]
    if adds and (reduced := _as_all_reduce(have, need, pieces, moves)) is not None:
        return reduced, why
    groups = components(*pairs, have.layout.size)
    if ranks_per_node is not None and not adds and copies(moves, ranks_per_node) > 1:
        return _two_levels(moves, have.layout.size, ranks_per_node)
    if not adds and (gather := _as_all_gather(have, need, moves, groups)) is not None:
        return gather, []
    return (_exchange(moves, pairs, groups, adds=adds),), why


def _two_levels(
    moves: Moves, world: int, ranks_per_node: int
) -> tuple[tuple[Step, ...], list[str]]:
    found = []
    for level in split(moves, int(moves.high[:, -1].max()), ranks_per_node):
        pairs = _pairs(level)
        found.append(_exchange(level, pairs, components(*pairs, world), adds=False))
    return tuple(found), [f"two collectives: across nodes of {ranks_per_node} ranks, then inside"]


def _pairs(moves: Moves) -> tuple[Counts, Counts]:
    """Each sender and receiver of anything from another rank once, in order."""
    src, dst = moves.pairs()
    other = np.flatnonzero(src != dst)
    return src.take(other).astype(np.int64), dst.take(other).astype(np.int64)


def _exchange(
    moves: Moves, pairs: tuple[Counts, Counts], groups: tuple[tuple[int, ...], ...], *, adds: bool
) -> Step:
    """A send_recv where no rank sends to or receives from more than one other, else an
    all_to_all."""
    once = all(np.bincount(side).max() == 1 for side in pairs)
    return Step("send_recv" if once else "all_to_all", groups, moves, adds)


def _summands(holding: Holding) -> int:
    return prod(holding.layout.sizes[axis] for axis in holding.partial)


def _moves(
    have: Holding, need: Holding, pieces: Pieces, ranks_per_node: int | None = None
) -> Moves:
    """Every piece that some rank needs, with its supplier; a rank's own pieces among them."""
    givers, readers = places_of(have), places_of(need)
    order = by_rank(pieces.reader)
    reader = pieces.reader.take(order)
    ranks = readers.holds.nonzero()[0]
    place = readers.index[ranks]
    first = reader.searchsorted(place, side="left")
    count = reader.searchsorted(place, side="right") - first
    dst = ranks.repeat(count)
    piece = order.take(np.arange(len(dst)) + (first - count.cumsum() + count).repeat(count))
    base, lane = givers.base.take(pieces.owner).take(piece), givers.lane.take(dst)
    shifts = _summand_shifts(have)
    sources = []
    for shift in shifts:
        lanes = lane
        if ranks_per_node is not None:
            every = np.unique(givers.lane)
            lanes = _nearest(base + shift, lane, dst, every, ranks_per_node)
        sources.append(base + shift + lanes)
    src = np.concatenate(sources, dtype=np.int32, casting="same_kind")
    # Pieces are in order of reader and place for each summand, and a sender has one summand of a
    # cell: so the order of senders makes that of moves.
    order = by_rank(src)
    if len(shifts) > 1:
        dst, piece = np.tile(dst, len(shifts)), np.tile(piece, len(shifts))
    piece = piece.take(order)
    return Moves(
        src.take(order),
        dst.astype(np.int32).take(order),
        take_rows(pieces.low, piece),
        take_rows(pieces.high, piece),
    )


def _nearest(
    base: Counts, own: Counts, readers: Counts, lanes: Counts, ranks_per_node: int
) -> Counts:
    """The lane to take each piece from: the reader's own, unless only another lies on its node."""
    node = readers // ranks_per_node
    best, found = np.full(len(base), 2 * len(lanes)), own.copy()
    start = np.searchsorted(lanes, own)
    for turn in range(len(lanes)):
        lane = lanes[(start + turn) % len(lanes)]
        score = turn + len(lanes) * ((base + lane) // ranks_per_node != node)
        better = score < best
        best, found = np.where(better, score, best), np.where(better, lane, found)
    return found


def _summand_shifts(have: Holding) -> list[int]:
    """How far apart the ranks lie that hold the summands of one cell."""
    shifts = [0]
    for axis in have.partial:
        size, stride = have.layout.sizes[axis], have.layout.stride(axis)
        shifts = [shift + i * stride for i in range(size) for shift in shifts]
    return shifts


def _narrow(have: Holding, moves: Moves, adds: bool) -> tuple[Step, ...]:
    held = have.cells()
    kept = np.bincount(moves.dst, moves.cells(), len(held))
    return () if (kept == held).all() else (Step("narrow", (), moves, adds),)


def components(src: Counts, dst: Counts, world: int) -> tuple[tuple[int, ...], ...]:
    """The sets of ranks that exchange anything, directly or not, by first rank."""
    leader = np.arange(world)
    while len(src):
        low = np.minimum(src, dst)
        np.minimum.at(leader, src, low)
        np.minimum.at(leader, dst, low)
        while (leader[leader] != leader).any():
            leader = leader[leader]
        # Leaders stand for their sets from here on, and those that met stand aside.
        src, dst = leader.take(src), leader.take(dst)
        apart = np.flatnonzero(src != dst)
        src, dst = src.take(apart), dst.take(apart)
    # A leader is the lowest rank of its set, so sets come in order of their first rank.
    ranks, sizes = leader.argsort(kind="stable").tolist(), np.bincount(leader)
    ends = sizes.cumsum()
    several = sizes > 1
    bounds = zip((ends - sizes)[several].tolist(), ends[several].tolist(), strict=True)
    return tuple([tuple(ranks[first:last]) for first, last in bounds])


def _as_all_gather(
    have: Holding, need: Holding, moves: Moves, groups: tuple[tuple[int, ...], ...]
) -> tuple[Step, ...] | None:
    """The steps as an all_gather, after a narrow where members hold more than what they give; None
    where members do not all need what each gives, or give unequal amounts."""
    world, places = have.layout.size, places_of(need)
    members = np.array(list(itertools.chain(*groups)))
    each = np.array(list(map(len, groups)))
    size = each.repeat(each)
    first = members[each.cumsum() - each].repeat(each)
    if not places.holds[members].all():
        return None
    if (places.index[members] != places.index[first]).any():
        return None
    own = moves.src == moves.dst
    gives = np.bincount(moves.dst, moves.cells() * own, world).astype(np.int64)
    given = gives[members]
    if not given.all() or (given != gives[first]).any():
        return None
    # Members give disjoint parts of what all of them need, so the sizes decide.
    if (given * size != need.cells()[members]).any():
        return None
    if (np.bincount(moves.pairs()[1], minlength=world)[members] != size).any():
        return None
    return (*_narrow(have, moves.select(own), adds=False), Step("all_gather", groups))


def _as_all_reduce(
    have: Holding, need: Holding, pieces: Pieces, moves: Moves
) -> tuple[Step, ...] | None:
    """The steps as an all_reduce over the ranks that hold summands of the same cells, after which
    each has what it needs but for a narrow; None where cells must also travel, or where sending the
    summands to those that need them (``moves``) takes fewer bytes."""
    whole = Holding(have.module, have.layout, have.parts, have.stages)
    kept = _moves(whole, need, pieces)
    if (kept.src != kept.dst).any() or have.stages is not None:
        return None
    reduced = Step("all_reduce", have.layout.groups(*have.partial))
    sent = np.bincount(moves.dst, moves.cells() * (moves.src != moves.dst), have.layout.size)
    if received((reduced,), have).max() > sent.max():
        return None
    return (reduced, *_narrow(whole, kept, adds=False))


def _where(have: Holding, need: Holding, dims: tuple[str, ...]) -> tuple[str, ...]:
    """The solved relations between both sides' coordinates, as the dump prints them.

    One side's dp is a function of the other's exactly if each slot is inside one replica, or each
    replica in one slot. Sympy derives the closed form; where none exists the ranks' own coordinates
    stand.
    """
    left, right = f"{have.module}.dp", f"{need.module}.dp"
    _, _, *ends = elementary(have.parts[0], need.parts[0])
    pairs = set(zip(*(owner.tolist() for owner in ends), strict=True))
    found = None
    for way, names in ((1, (left, right)), (-1, (right, left))):
        image = dict(pair[::way] for pair in pairs)
        if len(image) == len(pairs):
            fitted = _fit(tuple([image[slot] for slot in sorted(image)]), names[0])
            found = found or (fitted and f"{names[1]} = {fitted}")
    if found is None:
        forms = [closed_form(side.layout.coordinate("dp")) for side in (have, need)]
        found = f"{left} = {forms[0]}, {right} = {forms[1]}"
    sequence = [
        f"{side.module} holds {form(side.layout)}"
        for side, part in ((have, have.parts[1:]), (need, need.parts[1:]))
        if any(p.axes for p in part)
    ]
    return (found, *sequence)


@lru_cache(maxsize=4096)
def _fit(values: tuple[int, ...], name: str) -> str | None:
    """``values`` as ``floor(x / a) mod n`` of their index, printed with ``name`` for x."""
    size = len(values)
    image = max(values) + 1
    for stride in (n for n in range(1, size + 1) if size % n == 0):
        if (np.array(values) == np.arange(size) // stride % image).all():
            expr = sympy.floor(RANK / stride)
            if stride * image < size:
                expr = sympy.Mod(expr, image)
            return closed_form(expr if image > 1 else sympy.Integer(0), name)
    return None

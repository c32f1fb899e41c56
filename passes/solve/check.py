"""Prove one plan: walk every rank's cells through its steps and look at what arrives.

Nothing of the planner is imported, only the dataclasses of a plan, so a mistake there cannot hide
here. Proved, for the layouts at hand and every batch whose samples divide by ``plan.units``:

Ends        The slots of samples tile the step's units, equally long, and those of the module that
            orders the samples are in its order. Every other word about who holds what is what the
            layouts say by definition (ends.py): cut of the sequence, stages, axes of partial
            gradients. The grid is the coarsest that has all borders.
Forward     Every rank ends with exactly the cells of its box, each once; a rank that reads nothing
            ends with nothing. A cell has one value wherever it is held, so this is the map
            F: x -> (x on the box of rank r) for each reader r.
Backward    Readers are in classes: one for each coordinate on ``dst.partial``, in which all ranks
            that hold a cell have the same gradient of it, and different classes have summands of
            it. Every source rank ends, for each cell of its box, with exactly one copy of the
            summand of each class: not zero, not one for every tp rank. That is the transpose of F
            with one reader of each class, which the gradient of the global tensor is.
Frugality   A rank keeps the cells that it has, and takes what it lacks once: what it receives is
            what it needs less what it has. Between two steps it holds no more than it uses. It
            takes cells from the holder of its own lane, the one with its own coordinates on all
            axes over which the value is replicated (of another lane only where only that is on its
            node). So replicas share the load.
Collectives Groups are ascending, disjoint, in order, and no larger than the exchange; nothing is
            sent outside; a step is of the kind that it is called, and changes something. A plan is
            one list of steps for all ranks and holds no data, so every rank issues the same
            collectives in the same order whatever the data.
Words       Scale, type of the value, kind, ratio, the printed closed forms (forms.py), and a reason
            for each direction with more than one collective or more bytes than its bound.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd

import numpy as np
from numpy.typing import NDArray

from colocc.errors import VerifyError
from colocc.layout import Layout
from colocc.passes.solve import walk
from colocc.passes.solve.cells import Pieces, differs, with_summands
from colocc.passes.solve.ends import ALL_DIMS, End, Ints, check_holding, expected_grid
from colocc.passes.solve.forms import check_forms
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.walk import COMMUNICATES, State
from colocc.types import ITEMSIZE, UNKNOWN, Type

SHOWN = 8


def check(
    plan: Plan,
    *,
    scale: Fraction | None = None,
    value: Type | None = None,
    sink: tuple[str, Layout] | None = None,
) -> None:
    """Return if ``plan`` is right.

    ``scale`` and ``value``, if given, are what its gradient must be scaled by and what it must
    carry. ``sink`` is the module whose replicas order the samples, the reader if not given.

    Raises: VerifyError naming the first rank that ends with something else, and what.
    """
    try:
        _check_words(plan, scale, value)
        ends = _check_ends(plan, sink or (plan.dst.module, plan.dst.layout))
        sides = [(end, walk.boxes(end)) for end in ends]
        _check_direction(plan, "forward", plan.forward, sides[0], sides[1])
        _check_direction(plan, "backward", plan.backward, sides[1], sides[0])
        check_forms(plan)
    except VerifyError as error:
        raise VerifyError(
            f"plan {plan.src.module} ({plan.src.layout}) -> {plan.dst.module} ({plan.dst.layout}) "
            f"is wrong: {error}. This is a bug in colocc: please report it with the dump."
        ) from error


def _check_words(plan: Plan, scale: Fraction | None, value: Type | None) -> None:
    if scale is not None and plan.scale != scale:
        raise VerifyError(f"the gradient is scaled by {plan.scale}, not by {scale}")
    src, dst = plan.src.layout.dp, plan.dst.layout.dp
    kind = "fan_in" if src > dst else "fan_out" if src < dst else "equal"
    ratio = Fraction(max(src, dst), min(src, dst))
    if (plan.kind, plan.ratio) != (kind, ratio):
        raise VerifyError(f"dp{src} -> dp{dst} is {kind} x{ratio}, not {plan.kind} x{plan.ratio}")
    if value is not None and plan.value != value:
        raise VerifyError(f"it carries {plan.value}, not {value}")
    carried = plan.value
    if carried is None:
        return
    if carried.dtype not in {UNKNOWN, *ITEMSIZE}:
        raise VerifyError(f"{carried.dtype} is no dtype")
    if (carried.module, carried.layout) != (plan.src.module, plan.src.layout):
        raise VerifyError(f"its value is of {carried.module} ({carried.layout})")


def _check_ends(plan: Plan, sink: tuple[str, Layout]) -> tuple[End, End]:
    src, dst = plan.src, plan.dst
    if src.layout.size != dst.layout.size or src.layout.pp != 1:
        raise VerifyError("both sides must be on the same ranks, and the source at pp1")
    sliced = plan.dims[-1] == "slice"
    dims = plan.dims[:-1] if sliced else plan.dims
    if dims not in ALL_DIMS or len(plan.grid) != len(plan.dims):
        raise VerifyError(f"a grid {list(plan.grid)} over {list(plan.dims)}")
    grid = expected_grid(src.layout, dst.layout, sink[1], dims)
    if sliced:
        # Slices are cut by the steps alone, and so these say how many there are.
        moves = [step.moves for step in plan.forward + plan.backward if len(step.moves)]
        edges = [int(edge) for m in moves for a in (m.low, m.high) for edge in np.unique(a[:, -1])]
        grid = (*grid, plan.grid[-1] // max(1, gcd(plan.grid[-1], *edges)))
    if plan.grid != grid or (sliced and grid[-1] < 2):
        raise VerifyError(f"the grid is {list(plan.grid)}, the coarsest that fits is {list(grid)}")
    if max(grid) > np.iinfo(np.int32).max:
        raise VerifyError(f"a grid of {list(grid)} is too large to check")
    for side, holding in enumerate((src, dst)):
        ordered = (holding.module, holding.layout) == sink
        check_holding(holding, side, plan.dims, plan.grid, ordered=ordered)
    return End.of(src), End.of(dst)


def _check_direction(
    plan: Plan,
    name: str,
    steps: tuple[Step, ...],
    have: tuple[End, Pieces],
    want: tuple[End, Pieces],
) -> None:
    """Check the steps from one end to the other, each with the boxes of all ranks."""
    (start, held), (end, boxes) = have, want
    try:
        first = state = walk.start(start, held)
        ranks = len(start.place)
        got, cost = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
        for index, step in enumerate(steps):
            after = walk.take_step(step, state, start, plan.grid)
            if index and len(steps[index - 1].moves) and len(step.moves):
                walk.check_all_used(step.moves, state)
            taken = walk.received(step, state, after)
            got += taken
            cost += _cost(step, taken, state)
            _check_lanes(step, state, first, start, plan.ranks_per_node)
            state = after
        need = boxes if start.summands == 1 else with_summands(boxes, 0, start.summands)
        _check_end(plan, state, need, end, start.summands)
        total = need.total(ranks)
        lack = total - walk.shared(need, first)
        # Of a sum a rank must receive something, whichever summand it has itself.
        bound = lack if start.summands == 1 else total // start.summands
        _check_frugal(steps, got, cost, lack)
        _check_reasons(plan, name, steps, cost > bound)
    except VerifyError as error:
        raise VerifyError(f"{name}, {error}") from error


def _check_end(plan: Plan, state: State, need: Pieces, end: End, summands: int) -> None:
    """Every rank holds its box at ``end``, which ``need`` has by rank, each cell once, with every
    summand once."""
    ranks = np.arange(len(state.buffer))
    buffers = int(state.buffer.max()) + 1
    # Ranks that share a buffer need the same box; the first of them stands for all.
    first = np.full(buffers, len(ranks))
    np.minimum.at(first, state.buffer, ranks)
    stands = first[state.buffer]
    wrong = np.flatnonzero(end.place != end.place[stands])[:1].tolist()
    keep = np.flatnonzero((stands == ranks)[need.owner])
    wanted = need.take(keep, state.buffer[need.owner[keep]])
    other = differs(state.pieces, wanted, buffers)
    if other is not None:
        wrong.append(int(first[other]))
    if not wrong:
        return
    rank = min(wrong)
    own = state.pieces.of(int(state.buffer[rank]))
    need = need.of(rank)
    raise VerifyError(
        f"rank {rank} ends with {_spell(own, plan.dims, summands)}, it needs "
        f"{_spell(need, plan.dims, summands)}"
    )


def _spell(pieces: Pieces, dims: tuple[str, ...], summands: int) -> str:
    """Pieces as text: ``sample 0:2``, ``sample 0:1 sequence 2:3``; touching ones joined."""
    names = (*dims, "summand") if summands > 1 else dims
    rows = sorted(zip(pieces.low.tolist(), pieces.high.tolist(), strict=True))
    joined: list[tuple[list[int], list[int]]] = []
    for low, high in rows:
        before = joined[-1] if joined else None
        if before and (before[0][1:], before[1][1:], before[1][0]) == (low[1:], high[1:], low[0]):
            before[1][0] = high[0]
        else:
            joined.append((low, high))
    words = [
        " ".join(f"{name} {a}:{b}" for name, a, b in zip(names, low, high, strict=False))
        for low, high in joined[:SHOWN]
    ]
    more = f" and {len(joined) - SHOWN} more" if len(joined) > SHOWN else ""
    return (", ".join(words) or "nothing") + more


def _check_frugal(steps: tuple[Step, ...], got: Ints, cost: Ints, lack: Ints) -> None:
    """Every rank received what it needs less what it had, once.

    It ended with its box, so it received all of that at least; if it received no more, then nothing
    that it had, and nothing twice. An all_reduce also sums cells that a rank does not need, and may
    cost the busiest rank no more than the summands that it lacks.
    """
    if any(step.kind == "all_reduce" for step in steps):
        if cost.max() > lack.max():
            raise VerifyError(f"an all_reduce costs a rank {cost.max()} cells, {lack.max()} do")
        return
    wrong = got != lack
    if wrong.any():
        rank = int(wrong.argmax())
        raise VerifyError(f"rank {rank} receives {got[rank]} cells and lacks {lack[rank]}")


def _check_lanes(
    step: Step, state: State, first: State, start: End, ranks_per_node: int | None
) -> None:
    """Cells come from the holder that the rule of lanes names.

    A holder has the coordinates of another one on all axes but those over which the value is
    replicated, so it lies as many ranks away as their lanes do.
    """
    if step.kind == "narrow":
        return
    if not len(step.moves):
        for group in step.groups:
            lanes = start.lane[list(group)]
            if (lanes != lanes[0]).any():
                raise VerifyError(f"group {list(group)} has ranks of several lanes")
        return
    src, dst = (ranks.astype(np.int64) for ranks in (step.moves.src, step.moves.dst))
    # A rank's own cells lie with the holder of its lane: itself.
    base = src - start.lane.take(src)
    lane = start.lane.take(dst)
    want = base + lane
    if ranks_per_node is not None:
        want = _nearest(base, want, lane, dst // ranks_per_node, start, ranks_per_node)
    wrong = src != want
    if state is not first:
        # Later, cells may come from a rank that has them only since the step before.
        wrong &= walk.holders(step.moves, first)
    if wrong.any():
        one = wrong.argmax()
        raise VerifyError(
            f"rank {dst[one]} takes cells from rank {src[one]}, its lane has rank {want[one]}"
        )


def _nearest(
    base: Ints, own: Ints, lane: Ints, node: Ints, start: End, ranks_per_node: int
) -> Ints:
    """The holder of its own lane; where that is on another node, the next lane's that is not."""
    lanes = np.unique(start.lane)
    found = own.copy()
    searching = own // ranks_per_node != node
    for turn in range(1, len(lanes)):
        other = base + lanes[(np.searchsorted(lanes, lane) + turn) % len(lanes)]
        near = searching & (other // ranks_per_node == node)
        found[near] = other[near]
        searching &= ~near
    return found


def _cost(step: Step, taken: Ints, state: State) -> Ints:
    """What a rank takes from the wire: of an all_reduce of n ranks, 2 * (n - 1) / n."""
    if step.kind != "all_reduce":
        return taken
    size = np.ones(len(taken), dtype=np.int64)
    for group in step.groups:
        size[list(group)] = len(group)
    return -(-2 * (size - 1) * state.held() // size)


def _check_reasons(
    plan: Plan, name: str, steps: tuple[Step, ...], above: NDArray[np.bool_]
) -> None:
    several = sum(step.kind in COMMUNICATES for step in steps) > 1
    prefix = {"forward": "fwd ", "backward": "bwd "}[name]
    if any(reason.startswith(prefix) for reason in plan.reasons):
        return
    if several or above.any():
        more = "takes several collectives" if several else "is above its bound"
        raise VerifyError(f"it {more} and gives no reason")

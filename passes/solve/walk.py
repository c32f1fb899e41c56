"""Walk every rank's cells through the steps of a plan.

What the ranks hold is a list of *pieces*: boxes of one interval for each dim, and one interval of
summands. A piece belongs to a buffer, and a rank has one buffer; the members of an all_gather share
theirs, so a group of n costs n pieces and not n * n. A step is a join of its moves with the pieces
of their senders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from colocc.errors import VerifyError
from colocc.passes.solve.boxes import by_rank, take_rows
from colocc.passes.solve.cells import (
    Pieces,
    added,
    differs,
    join,
    keys,
    meet,
    with_summands,
)
from colocc.passes.solve.ends import End, Ints
from colocc.passes.solve.plan import Moves, Step

COMMUNICATES = ("all_gather", "all_to_all", "send_recv", "all_reduce")


@dataclass(frozen=True, slots=True)
class State:
    """What every rank holds: ``pieces`` of buffers, and the buffer of each rank.

    ``width`` is how many summands every cell carries: one at the start, all once they are added.
    """

    buffer: Ints
    pieces: Pieces
    width: int

    def held(self) -> Ints:
        """The cells of each rank, every summand counted."""
        return self.pieces.total(int(self.buffer.max()) + 1)[self.buffer]


def start(end: End, held: Pieces | None = None) -> State:
    """The state in which every rank holds its box at ``end`` (``boxes``), with its own summand."""
    pieces = held or boxes(end)
    if end.summands > 1:
        pieces = with_summands(pieces, end.summand, end.summand + 1)
    return State(np.arange(len(end.place)), pieces, 1)


def boxes(end: End) -> Pieces:
    """The box of every rank at ``end``, without summands."""
    # A place of -1 is no owner's.
    who, which = join(end.place, end.owner)
    return Pieces(who, take_rows(end.low, which), take_rows(end.high, which))


def take_step(step: Step, state: State, end: End, grid: tuple[int, ...]) -> State:
    """What every rank holds after ``step``.

    Raises: VerifyError if the step breaks a rule of its kind, or changes nothing.
    """
    group = _groups(step, len(state.buffer))
    state = _in_order(state)
    if step.kind in ("all_gather", "all_reduce"):
        return _gather(step, group, state, end)
    _check_moves(step, group, grid)
    return _move(step, state, end)


def _in_order(state: State) -> State:
    """The state with its pieces by buffer."""
    pieces, owner = state.pieces, state.pieces.owner
    if (owner[1:] >= owner[:-1]).all():
        return state
    order = by_rank(owner)
    return replace(state, pieces=pieces.take(order, owner.take(order)))


def _groups(step: Step, world: int) -> Ints:
    """The number of the group of every rank, -1 for none."""
    sizes = np.array([len(group) for group in step.groups], dtype=np.int64)
    members = np.array([rank for group in step.groups for rank in group], dtype=np.int64)
    if (step.kind == "narrow") != (not step.groups) or (sizes < 2).any():
        raise VerifyError(f"{step.kind} over groups {step.groups}")
    group = np.full(world, -1, dtype=np.int64)
    number = np.arange(len(sizes)).repeat(sizes)
    falls = (members[1:] <= members[:-1]) & (number[1:] == number[:-1])
    if members.min(initial=0) < 0 or members.max(initial=0) >= world or falls.any():
        raise VerifyError(f"a group is not an ascending set of ranks: {step.groups}")
    firsts = members[sizes.cumsum() - sizes]
    if np.bincount(members, minlength=1).max() > 1 or (firsts[1:] <= firsts[:-1]).any():
        raise VerifyError(f"groups overlap, or are not in order of their first rank: {step.groups}")
    group[members] = number
    return group


def _check_moves(step: Step, group: Ints, grid: tuple[int, ...]) -> None:
    """The moves are well formed, in order, and stay inside groups that they connect."""
    moves, world = step.moves, len(group)
    shape = (len(moves), len(grid))
    if moves.low.shape != shape or moves.high.shape != shape or len(moves.dst) != len(moves):
        raise VerifyError(f"moves of shape {moves.low.shape} on a grid of {len(grid)} dims")
    for ranks in (moves.src, moves.dst):
        if ranks.min(initial=0) < 0 or ranks.max(initial=0) >= world:
            raise VerifyError(f"a move of a rank outside 0 to {world - 1}")
    lows, highs = moves.low.T, moves.high.T
    outside = np.zeros(len(moves), dtype=bool)
    for low, high, size in zip(lows, highs, grid, strict=True):
        outside |= (low < 0) | (low >= high) | (high > size)
    if outside.any():
        first = int(outside.argmax())
        raise VerifyError(f"{_text(moves, first)} is outside the grid {list(grid)}")
    place = keys([moves.src, moves.dst, *lows], [world, world, *grid])
    if (place[1:] <= place[:-1]).any():
        raise VerifyError("moves are not in order of sender, receiver and place, each once")
    _check_connection(step, group)


def _check_connection(step: Step, group: Ints) -> None:
    moves = step.moves
    fresh = moves.src != moves.dst
    # Moves are in order, so those of one pair are neighbours, and the first stands for all.
    fresh[1:] &= (moves.src[1:] != moves.src[:-1]) | (moves.dst[1:] != moves.dst[:-1])
    pairs = np.flatnonzero(fresh)
    src, dst = (ranks.take(pairs).astype(np.int64) for ranks in (moves.src, moves.dst))
    if step.kind == "narrow":
        if len(src):
            raise VerifyError(f"a narrow moves cells from rank {src[0]} to rank {dst[0]}")
        return
    if not len(src):
        raise VerifyError(f"{step.kind} moves nothing between ranks")
    stray = (group.take(src) != group.take(dst)) | (group.take(src) < 0)
    if stray.any():
        raise VerifyError(f"{_text(moves, int(pairs[stray.argmax()]))} leaves its group")
    leader = _leaders(src, dst, len(group))
    # Moves stay inside groups: a group is no larger than its exchange if all have one leader.
    members = (group >= 0).nonzero()[0]
    firsts = np.array([ranks[0] for ranks in step.groups])[group[members]]
    apart = members[leader[members] != firsts]
    if len(apart):
        idle = list(step.groups[int(group[apart[0]])])
        raise VerifyError(f"group {idle} holds ranks that exchange nothing")
    if step.kind == "send_recv":
        for side, verb in ((src, "sends to"), (dst, "receives from")):
            times = np.bincount(side)
            if times.max() > 1:
                rank = (times > 1).argmax()
                raise VerifyError(f"in a send_recv rank {rank} {verb} more than one other")


def _leaders(src: Ints, dst: Ints, world: int) -> Ints:
    """The lowest rank that each rank exchanges anything with, directly or over others."""
    leader = np.arange(world)
    while len(src):
        low = np.minimum(src, dst)
        np.minimum.at(leader, src, low)
        np.minimum.at(leader, dst, low)
        while (leader[leader] != leader).any():
            leader = leader[leader]
        # From here on the leaders stand for those that they lead.
        src, dst = leader.take(src), leader.take(dst)
        apart = np.flatnonzero(src != dst)
        src, dst = src.take(apart), dst.take(apart)
    return leader


def _text(moves: Moves, index: int) -> str:
    box = ", ".join(f"{a}:{b}" for a, b in zip(moves.low[index], moves.high[index], strict=True))
    return f"the move of {box} from rank {moves.src[index]} to rank {moves.dst[index]}"


def _move(step: Step, state: State, end: End) -> State:
    moves = step.moves
    adding = end.summands > state.width and step.kind != "narrow"
    if step.adds != adding:
        raise VerifyError(f"a {step.kind} {'adds' if step.adds else 'does not add'} what arrives")
    count = len(moves)
    index, found = meet(_sent(moves, state), state.pieces)
    carried = added(index, found.cells(), count)
    lacking = carried != moves.cells() * state.width
    if lacking.any():
        raise VerifyError(
            f"{_text(moves, int(lacking.argmax()))} carries cells that the sender does not hold"
        )
    pieces = replace(found, owner=moves.dst.take(index).astype(np.int64))
    after = State(np.arange(len(state.buffer)), pieces, end.summands if adding else state.width)
    if step.kind == "narrow" and np.array_equal(after.held(), state.held()):
        raise VerifyError("a narrow changes nothing")
    return after


def _gather(step: Step, group: Ints, state: State, end: End) -> State:
    """The members of each group share one buffer with the pieces of all."""
    if len(step.moves) or step.adds:
        raise VerifyError(f"a {step.kind} has moves of its own")
    members = np.flatnonzero(group >= 0)
    members = members[np.argsort(group[members], kind="stable")]
    number = group[members]
    if (step.kind == "all_reduce") != (state.width < end.summands):
        raise VerifyError(f"{step.kind} of cells with {state.width} of {end.summands} summands")
    first = members[np.searchsorted(number, number)]
    amounts = state.held()
    if (amounts[members] != amounts[first]).any() or not amounts[members].all():
        raise VerifyError(f"members of a group give unequal amounts to the {step.kind}")
    if len(np.unique(state.buffer[members])) != len(members):
        raise VerifyError("members of a group gather what they already share")
    if step.kind == "all_reduce":
        _check_same_cells(members, first, state)
    # Ranks of no group keep their buffers; numbers from ``fresh`` on are new.
    fresh = int(state.buffer.max()) + 1
    buffer = state.buffer.copy()
    buffer[members] = fresh + number
    i, j = join(state.buffer[members], state.pieces.owner)
    joined = state.pieces.take(j, fresh + number[i])
    kept = np.flatnonzero(np.isin(state.pieces.owner, buffer))
    old = state.pieces.take(kept, state.pieces.owner[kept])
    pieces = Pieces(
        *(
            np.concatenate([getattr(part, name) for part in (old, joined)])
            for name in ("owner", "low", "high")
        )
    )
    return State(buffer, pieces, end.summands)


def _check_same_cells(members: Ints, first: Ints, state: State) -> None:
    cells = state.pieces.first_dims(state.pieces.low.shape[1] - 1)
    sides = []
    for ranks in (members, first):
        i, j = join(state.buffer[ranks], cells.owner)
        sides.append(cells.take(j, i))
    wrong = differs(sides[0], sides[1], len(members))
    if wrong is not None:
        raise VerifyError(f"rank {members[wrong]} adds other cells than rank {first[wrong]}")


def check_all_used(moves: Moves, state: State) -> None:
    """Raise VerifyError unless the moves carry all that their senders hold, pieces that go to
    several ranks alike."""
    if state.width > 1:
        raise VerifyError("sums move on in a step of their own")
    columns = [moves.src, *moves.low.T, *moves.high.T]
    rows = np.unique(np.column_stack(columns).astype(np.int64), axis=0)
    dims = moves.low.shape[1]
    sent = Pieces(state.buffer[rows[:, 0]], rows[:, 1 : 1 + dims], rows[:, 1 + dims :])
    wrong = differs(sent, state.pieces.first_dims(dims), len(state.buffer))
    if wrong is not None:
        raise VerifyError(f"rank {wrong} holds other cells between two steps than it uses")


def received(step: Step, before: State, after: State) -> Ints:
    """The cells, every summand counted, that each rank takes from others in ``step``."""
    if step.kind in ("all_gather", "all_reduce"):
        return after.held() - before.held()
    moves = step.moves
    amounts = moves.cells()
    amounts *= moves.src != moves.dst
    return added(moves.dst, amounts, len(before.buffer)) * before.width


def shared(need: Pieces, state: State) -> Ints:
    """How many cells of ``need``, which is by rank, each rank holds in ``state``, every summand
    counted."""
    index, found = meet(replace(need, owner=state.buffer[need.owner]), state.pieces)
    return added(need.owner[index], found.cells(), len(state.buffer))


def holders(moves: Moves, state: State) -> NDArray[np.bool_]:
    """Whether the sender of each move holds all of it in ``state``, one summand of it each."""
    index, found = meet(_sent(moves, state), state.pieces)
    held: NDArray[np.bool_] = added(index, found.cells(), len(moves)) == moves.cells()
    return held


def _sent(moves: Moves, state: State) -> Pieces:
    """What the senders of moves must hold: their cells, whichever summands of them."""
    pieces = Pieces(state.buffer.take(moves.src), moves.low, moves.high)
    if moves.low.shape[1] == state.pieces.low.shape[1]:
        return pieces
    return with_summands(pieces, 0, np.iinfo(np.int32).max)

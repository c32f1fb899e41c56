"""What a plan does, by brute force and from the definitions: explicit cells, one by one.

Independent of planner and checker: ranks are counted here, the sequence is dealt out element by
element, and every step is run on dicts. A gradient is a number that counts each summand in a digit
of its own, so that a missing or a doubled one shows.
"""

from __future__ import annotations

from itertools import product

from colocc.layout import Layout
from colocc.passes.solve.plan import Holding, Plan, Step

Held = list[dict[int, int]]
DIGIT = 100
CUTS = {
    "sequence": (True, True),
    "row": (True, False),
    "position": (False, True),
    "slice": (False, False),
}


def count_ranks(layout: Layout) -> list[dict[str, int]]:
    """The coordinates of each rank, by counting: the first axis of the order turns fastest."""
    axes = [axis for axis in layout.order.split("-") if axis != "ep"]
    turns = product(*(range(getattr(layout, axis)) for axis in reversed(axes)))
    return [dict(zip(reversed(axes), turn, strict=True)) for turn in turns]


def deal(length: int, layout: Layout, place: dict[str, int]) -> list[int]:
    """The elements of a sequence that the rank at ``place`` holds."""
    cards = list(range(length))
    if layout.zigzag and layout.cp > 1:
        piles = split(cards, 2 * layout.cp)
        cards = piles[place["cp"]] + piles[2 * layout.cp - 1 - place["cp"]]
    else:
        cards = split(cards, layout.cp)[place["cp"]]
    return split(cards, layout.tp)[place["tp"]] if layout.sp else cards


def split(cards: list[int], parts: int) -> list[list[int]]:
    assert len(cards) % parts == 0, f"{len(cards)} elements in {parts} parts"
    size = len(cards) // parts
    return [cards[i * size : (i + 1) * size] for i in range(parts)]


def held_by_definition(plan: Plan, side: int) -> list[frozenset[int]]:
    """The cells of every rank at the source (0) or the reader (1)."""
    holding = (plan.src, plan.dst)[side]
    layout = holding.layout
    found = []
    for place in count_ranks(layout):
        if side == 1 and place["pp"] != 0:
            found.append(frozenset[int]())
            continue
        lists = [units(plan, holding)[place["dp"]]]
        for dim, length in zip(plan.dims[1:], plan.grid[1:], strict=True):
            whole = list(range(length))
            lists.append(deal(length, layout, place) if CUTS[dim][side] else whole)
        found.append(frozenset(cell(plan, at) for at in product(*lists)))
    return found


def units(plan: Plan, holding: Holding) -> list[list[int]]:
    return [[unit for a, b in slot for unit in range(a, b)] for slot in holding.slots]


def cell(plan: Plan, at: tuple[int, ...]) -> int:
    number = 0
    for index, size in zip(at, plan.grid, strict=True):
        number = number * size + index
    return number


def push(plan: Plan, step: Step, held: Held) -> tuple[Held, list[int]]:
    """Run one step; what every rank holds after it, and how many cells it got from others."""
    got = [0] * len(held)
    after: Held = [dict(mine) for mine in held]
    if step.kind in ("all_gather", "all_reduce"):
        for group in step.groups:
            for rank in group:
                after[rank] = gather(step, [held[peer] for peer in group])
                got[rank] = sum(len(held[peer]) for peer in group if peer != rank)
            if step.kind == "all_reduce":
                size, amount = len(group), len(held[group[0]])
                for rank in group:
                    got[rank] = -(-2 * (size - 1) * amount // size)
        return after, got
    group_of = {rank: set(group) for group in step.groups for rank in group}
    after = [{} for _ in held]
    moves = step.moves
    for src, dst, low, high in zip(
        moves.src.tolist(), moves.dst.tolist(), moves.low.tolist(), moves.high.tolist(), strict=True
    ):
        assert src == dst or dst in group_of.get(src, ()), "sent outside the group"
        for at in product(*map(range, low, high)):
            number = cell(plan, at)
            assert step.adds or number not in after[dst], f"rank {dst} gets a cell twice"
            after[dst][number] = after[dst].get(number, 0) + held[src][number]
            got[dst] += src != dst
    return after, got


def gather(step: Step, parts: Held) -> dict[int, int]:
    if step.kind == "all_reduce":
        assert all(part.keys() == parts[0].keys() for part in parts), "other cells are added"
        return {number: sum(part[number] for part in parts) for number in parts[0]}
    assert len({len(part) for part in parts}) == 1, "all_gather wants equal parts"
    joined = {number: value for part in parts for number, value in part.items()}
    assert len(joined) == sum(map(len, parts)), "a cell is gathered twice"
    return joined


def agrees_with_brute_force(plan: Plan, *, in_order: bool = True) -> None:
    """Assert that the plan does what its layouts mean, and takes no byte too many."""
    have, need = held_by_definition(plan, 0), held_by_definition(plan, 1)
    for holding in (plan.src, plan.dst):
        slots = units(plan, holding)
        assert sorted(unit for slot in slots for unit in slot) == list(range(plan.grid[0]))
        assert {len(slot) for slot in slots} == {plan.grid[0] // holding.layout.dp}
    if in_order:
        assert units(plan, plan.dst) == split(list(range(plan.grid[0])), plan.dst.layout.dp)
    got = run(plan, plan.forward, [dict.fromkeys(mine, 1) for mine in have])
    assert got[0] == [dict.fromkeys(mine, 1) for mine in need]
    least = [len(want - mine) for want, mine in zip(need, have, strict=True)]
    assert got[1] == least == plan.received_cells()[0].tolist() == plan.bound_cells()[0].tolist()
    _backward_agrees(plan, have, need)


def _backward_agrees(plan: Plan, have: list[frozenset[int]], need: list[frozenset[int]]) -> None:
    layout = plan.dst.layout
    summed = layout.cp > 1 and not {"sequence", "position"} & set(plan.dims)
    classes = layout.cp if summed else 1
    digits = [DIGIT ** (place["cp"] if summed else 0) for place in count_ranks(layout)]
    start = [dict.fromkeys(mine, digit) for mine, digit in zip(need, digits, strict=True)]
    end, got = run(plan, plan.backward, start)
    total = sum(DIGIT**i for i in range(classes))
    assert end == [dict.fromkeys(mine, total) for mine in have]
    received, bound = (counts[1].tolist() for counts in (plan.received_cells(), plan.bound_cells()))
    assert got == received
    if not summed:
        assert got == [len(mine - grad) for mine, grad in zip(have, need, strict=True)] == bound
        return
    # Every summand but a rank's own, or an all_reduce that costs the busiest no more.
    assert bound == [len(mine) for mine in have]
    lacking = [classes * len(m) - len(m & g) for m, g in zip(have, need, strict=True)]
    if any(step.kind == "all_reduce" for step in plan.backward):
        assert max(got) <= max(lacking)
    else:
        assert got == lacking


def run(plan: Plan, steps: tuple[Step, ...], held: Held) -> tuple[Held, list[int]]:
    total = [0] * len(held)
    for step in steps:
        held, got = push(plan, step, held)
        total = [a + b for a, b in zip(total, got, strict=True)]
    return held, total


def kept(plan: Plan) -> int:
    """The cells that the ranks have of what they need, in all."""
    sides = zip(held_by_definition(plan, 0), held_by_definition(plan, 1), strict=True)
    return sum(len(have & need) for have, need in sides)

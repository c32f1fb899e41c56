"""What each rank receives for small layouts: the plan, its bound, and all-gather-then-narrow.

    python -m examples.benchmark.received

Prints a markdown table of the busiest rank's bytes, as parts of the whole value. All-gather-then-
narrow is what a hand-written communicator does: every rank, on every stage, first has all samples
of its replica whole, and then keeps what it needs; backward the same for the gradient.
"""

from __future__ import annotations

from fractions import Fraction
from math import prod

from colocc.layout import Layout
from colocc.passes.solve.boxes import Box, length, overlap
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Plan
from colocc.passes.solve.solver import solve
from colocc.sequence import axes_of

CASES = (
    ("equal dp", "tp2,dp4", "tp2,dp4"),
    ("fan-in", "tp2,dp4", "tp4,dp2"),
    ("fan-in", "tp2,dp4", "tp8"),
    ("fan-out", "tp4,dp2", "tp2,dp4"),
    ("fan-in, reader sp", "tp2,dp4", "tp8,sp"),
    ("fan-in, source sp", "tp2,dp4,sp", "tp8"),
    ("fan-in, sp on both", "tp2,dp4,sp", "tp8,sp"),
    ("fan-out, source sp", "tp4,dp2,sp", "tp2,dp4"),
    ("equal dp, reader sp", "tp4,dp2", "tp4,dp2,sp"),
    ("cp, contiguous", "dp8", "tp2,cp2,dp2"),
    ("cp, zigzag", "dp8", "tp2,cp2,dp2,zigzag"),
    ("cp, zigzag, sp", "dp8", "tp2,cp2,dp2,sp,zigzag"),
    ("pp", "dp8", "tp2,pp2,dp2"),
    ("pp", "tp2,dp4", "tp2,pp2,dp2"),
    ("3:2, 6 ranks", "tp2,dp3", "tp3,dp2"),
    ("2:3, 6 ranks", "tp3,dp2", "tp2,dp3"),
)


def plan_of(src: str, dst: str) -> Plan:
    """The proved plan between two layouts."""
    left, right = Layout.parse(src), Layout.parse(dst)
    cut = axes_of(left) or axes_of(right)
    dims = ("sample", "sequence") if cut else ("sample",)
    plan = solve(("images", left), ("language", right), dims=dims)
    check(plan)
    return plan


def gathered(plan: Plan) -> tuple[Fraction, Fraction]:
    """What the busiest rank receives if everything whole is gathered first, as parts of the
    value."""
    have, need = plan.src.boxes(), plan.dst.boxes()
    dp = plan.dst.layout.coordinates("dp").tolist()
    forward = [
        _lacks([plan.dst.slots[slot]], box, plan) for slot, box in zip(dp, have, strict=True)
    ]
    # The reader's gradient of all replicas that the rank's samples belong to.
    backward = [
        _lacks([slot for slot in plan.dst.slots if overlap(slot, box[0])], held, plan)
        for box, held in zip(have, need, strict=True)
    ]
    return max(forward), max(backward)


def _lacks(slots: list[tuple[tuple[int, int], ...]], box: Box, plan: Plan) -> Fraction:
    wanted = sum(length(slot) for slot in slots) * prod(plan.grid[1:])
    held = 0
    if box:
        shared = sum(overlap(slot, box[0]) for slot in slots)
        held = shared * prod(length(intervals) for intervals in box[1:])
    return Fraction(wanted - held, prod(plan.grid))


def row(title: str, src: str, dst: str) -> str:
    """One line of the table."""
    plan = plan_of(src, dst)
    total = prod(plan.grid)
    received, bound = plan.received_cells(), plan.bound_cells()
    cells = [title, f"{src} -> {dst}"]
    for index, naive in enumerate(gathered(plan)):
        ours = Fraction(int(received[index].max()), total)
        least = Fraction(int(bound[index].max()), total)
        cells += [str(ours), str(least), str(naive)]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole table."""
    head = ["case", "images -> language", "fwd", "bound", "gather", "bwd", "bound", "gather"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join(lines + [row(*case) for case in CASES]) + "\n"


if __name__ == "__main__":
    print(table(), end="")

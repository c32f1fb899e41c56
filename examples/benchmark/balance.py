"""How evenly the image tokens of a step lie on an encoder's slots, in order and balanced.

    python -m examples.benchmark.balance

Prints a markdown table: the most tokens of a slot over the mean, as the mean of many steps, and
the bytes moved. No ranks are needed: which slot encodes a sample follows from the layouts and the
number of its tokens.
"""

from __future__ import annotations

import numpy as np

from colocc.layout import Layout
from colocc.passes.solve.balance import Units, balanced, imbalance, loads, units_between
from colocc.passes.solve.boxes import Counts
from colocc.passes.solve.slots import savings
from colocc.runtime.rows import units_of

CASES = (
    (8, "dp8", "tp8"),
    (8, "dp8", "tp4,dp2"),
    (8, "tp2,dp4", "tp2,pp2,dp2"),
    (64, "dp64", "tp8,pp2,dp4"),
    (64, "tp2,dp32", "tp4,pp2,dp8"),
    (64, "dp64", "tp2,dp32"),
)
STEPS, SAMPLES = 200, 32
# Long-tailed: most samples have no image or one, a few have many.
TAIL, MOST, TOKENS = 1.5, 20, (64, 144, 256)


def tokens_of(rng: np.random.Generator, samples: int) -> Counts:
    """The image tokens of each sample: a Pareto number of images, of one size in a sample."""
    images = np.minimum(rng.pareto(TAIL, samples).astype(np.int64), MOST)
    return images * rng.choice(TOKENS, size=samples)


def measured(src: Layout, dst: Layout) -> list[float]:
    """Over all steps, the mean of max over mean tokens of a slot in order and balanced, and of what
    nothing inside replicas goes below; and the bytes that are moved balanced, over in order."""
    where, rng = units_between(src, dst), np.random.default_rng(0)
    ratios, moved = [], np.zeros(2)
    for _ in range(STEPS):
        work = tokens_of(rng, SAMPLES * src.dp)
        before = units_of(len(work), dst.dp, len(where.slot))
        after = balanced(where, work, before)
        found = [loads(where, work, unit) for unit in (before, after)]
        ratios.append([*map(imbalance, found), _bound(where, work, before) / found[0].mean()])
        moved += [_moved(src, dst, work, unit) for unit in (before, after)]
    return [*np.array(ratios).mean(axis=0).tolist(), float(moved[1] / moved[0])]


def _bound(where: Units, work: Counts, unit: Counts) -> float:
    """The longest sample, or the mean of a replica's slots, which here are its own."""
    replica = where.replica[unit]
    slots = [len(np.unique(where.slot[where.replica == d])) for d in range(len(where.block))]
    totals = np.bincount(replica, work, minlength=len(slots)) / slots
    return max(float(work.max()), float(totals.max()))


def _moved(src: Layout, dst: Layout, work: Counts, unit: Counts) -> int:
    """The tokens that all ranks receive: those that they read and do not have."""
    where = units_between(src, dst)
    reads = work.sum() * dst.tp * dst.cp
    return int(reads - (savings(src, dst)[where.slot[unit], where.replica[unit]] * work).sum())


def row(ranks: int, src: str, dst: str) -> str:
    """One line of the table."""
    values = measured(Layout.parse(src), Layout.parse(dst))
    cells = [str(ranks), f"{src} -> {dst}", *(f"{value:.2f}" for value in values)]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole table."""
    head = ["ranks", "images -> language", "in order", "balanced", "bound", "bytes"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join(lines + [row(*case) for case in CASES]) + "\n"


if __name__ == "__main__":
    print(table(), end="")

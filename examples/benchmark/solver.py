"""How long solving and proving one edge takes, and how much memory, by the number of ranks.

    python -m examples.benchmark.solver

Prints a markdown table: the median of several runs on one core, each in a process of its own, so
that the peak memory is that of one edge.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

from colocc.layout import Layout
from colocc.passes.solve.check import check
from colocc.passes.solve.solver import solve

REPEATS = 5
# images, language for n ranks: plain, sequence in zigzag over cp and tp, and dp that do not divide.
EDGES = (
    ("dp{n}", "tp8,pp8,dp{n/64}"),
    ("tp4,dp{n/4}", "tp8,pp4,dp{n/32}"),
    ("tp2,dp{n/2}", "tp8,cp4,pp8,dp{n/256},sp,zigzag"),
    ("dp{n}", "tp8,cp8,pp2,dp{n/128},sp,zigzag"),
)
SIZES = (256, 1024, 4096, 16384)


def layouts(edge: tuple[str, str], ranks: int) -> tuple[Layout, Layout]:
    """The layouts of an edge for a number of ranks."""
    found = []
    for text in edge:
        head, _, rest = text.partition("{n")
        divisor, _, tail = rest.partition("}")
        found.append(Layout.parse(f"{head}{ranks // int(divisor.strip('/') or 1)}{tail}"))
    return found[0], found[1]


def measure(edge: tuple[str, str], ranks: int) -> dict[str, float]:
    """Seconds to solve and to prove, moves, and the peak memory of this process in MiB."""
    src, dst = layouts(edge, ranks)
    dims = ("sample", "sequence") if dst.sp else ("sample",)
    start = time.perf_counter()
    plan = solve(("images", src), ("language", dst), dims=dims)
    solved = time.perf_counter()
    check(plan)
    proved = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    moves = sum(len(step.moves) for step in plan.forward + plan.backward)
    return {"solve": solved - start, "check": proved - solved, "moves": moves, "peak": peak}


def main() -> int:
    """Print the table, or what one process measured; the exit status."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(EDGES[int(sys.argv[1])], int(sys.argv[2]))))
        return 0
    print("| ranks | images -> language | moves | solve, s | check, s | peak, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for index, edge in enumerate(EDGES):
        for ranks in SIZES:
            runs = [_run(index, ranks) for _ in range(REPEATS)]
            src, dst = layouts(edge, ranks)
            cells = [f"{_middle(runs, key):.3f}" for key in ("solve", "check")]
            print(
                f"| {ranks} | {src} -> {dst} | {int(runs[0]['moves'])} | {cells[0]} | {cells[1]} | "
                f"{_middle(runs, 'peak'):.0f} |",
                flush=True,
            )
    return 0


def _run(index: int, ranks: int) -> dict[str, float]:
    command = [sys.executable, "-m", "examples.benchmark.solver", str(index), str(ranks)]
    found: dict[str, float] = json.loads(
        subprocess.run(command, capture_output=True, check=True).stdout
    )
    return found


def _middle(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    sys.exit(main())

"""Identity-coded values: row j of sample i holds (i, j), so a sample that arrives elsewhere is
seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colocc.errors import LayoutError
from colocc.runtime.data import holding_of, sample_runs

if TYPE_CHECKING:
    from colocc.program import Program


def check_identity(
    program: Program, *, num_microbatches: int, batch_size: int, rows: int = 3
) -> None:
    """Send identity-coded rows through every redistribution of ``program``, forward and backward.

    Exact: integers in float64, compared for equality. The gradient sent back for a row is its own
    code, which must arrive scaled by the plan's scale, once. Collective.
    Raises: AssertionError naming the redistribution and the rank.
    """
    if program.rank is None:
        raise LayoutError("check_identity runs collectives: initialise torch.distributed first")
    graph = program.graph
    dp = graph.layouts[graph.sink].dp
    for name, move in program.redistributions.items():
        plan = graph.plans[name]
        sent = sample_runs(
            holding_of(graph, plan.src.module), dp, num_microbatches, batch_size, program.rank
        )
        held = _coded(sent, batch_size, rows).requires_grad_()
        arrived = move(held)
        wanted = torch.zeros(0, 2, dtype=torch.float64)
        if move.wanted:
            replica = int(plan.dst.layout.coordinates("dp")[program.rank])
            part = batch_size // dp
            reads = [(m, replica * part, (replica + 1) * part) for m in range(num_microbatches)]
            wanted = _coded(reads, batch_size, rows)
        where = f"{name} on rank {program.rank}"
        if not torch.equal(arrived.detach(), wanted):
            raise AssertionError(f"{where}: got {arrived.tolist()}, wanted {wanted.tolist()}")
        arrived.backward(wanted)
        back = held.detach() * float(plan.scale)
        if held.grad is None or not torch.equal(held.grad, back):
            raise AssertionError(f"{where}: gradient {held.grad}, wanted {back}")


def _coded(runs: list[tuple[int, int, int]], batch_size: int, rows: int) -> torch.Tensor:
    """Rows (sample of the step + 1, row + 1) for each sample of ``runs``."""
    codes = [
        (microbatch * batch_size + sample + 1, row + 1)
        for microbatch, start, stop in runs
        for sample in range(start, stop)
        for row in range(rows)
    ]
    return torch.tensor(codes, dtype=torch.float64).reshape(-1, 2)

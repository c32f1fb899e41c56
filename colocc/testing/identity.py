"""Identity-coded values: row j of sample i holds (i, j), so a part that arrives elsewhere is
seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from colocc.errors import LayoutError
from colocc.passes.solve.plan import Holding, Plan
from colocc.runtime.data import cut_sequence
from colocc.runtime.holdings import holding_of, sample_runs
from colocc.runtime.parts import Run
from colocc.runtime.redistribution import Redistribution
from colocc.runtime.row_moves import RowRedistribution
from colocc.runtime.rows import Rows
from colocc.runtime.texts import device_of_messages

if TYPE_CHECKING:
    from colocc.program import Program


def check_identity(
    program: Program, *, num_microbatches: int, batch_size: int, rows: int = 3
) -> None:
    """Send identity-coded rows through every redistribution of ``program``, forward and backward.

    ``rows`` is the number of rows of a sample, for each chunk of a sequence that is cut. Exact:
    integers in float64, compared for equality. The gradient sent back for a row is its own code,
    which must arrive scaled by the plan's scale, once from each rank with a summand. Collective.
    Raises: AssertionError naming the redistribution and the rank.
    """
    if program.rank is None:
        raise LayoutError("check_identity runs collectives: initialise torch.distributed first")
    graph, rank = program.graph, program.rank
    sink = graph.layouts[graph.sink]
    for name, move in program.redistributions.items():
        plan = graph.plans[name]
        length = rows * prod(plan.grid[1:])
        runs = {
            side.module: sample_runs(
                holding_of(graph, side.module), sink.dp, num_microbatches, batch_size, rank
            )
            for side in (plan.src, plan.dst)
        }
        if plan.dst.module == graph.sink:
            replica, part = int(sink.coordinates("dp")[rank]), batch_size // sink.dp
            runs[graph.sink] = [
                (m, replica * part, (replica + 1) * part) for m in range(num_microbatches)
            ]
        if not plan.dst.holds()[rank]:
            runs[plan.dst.module] = []
        held, wanted = (
            _coded(plan, side, move, runs[side.module], batch_size, length).to(device_of_messages())
            for side in (plan.src, plan.dst)
        )
        where = f"{name} on rank {rank}"
        if isinstance(move, RowRedistribution):
            move.rows = _filled(sink.dp, num_microbatches, batch_size, length)
            _check(where, move, held.flatten(0, 1), wanted.flatten(0, 1), move)
        else:
            samples = num_microbatches * batch_size
            _check(where, move, held, wanted, partial(move, samples=samples))


def _filled(replicas: int, microbatches: int, batch_size: int, length: int) -> Rows:
    """Samples with a row at every position, of one item each."""
    samples = microbatches * batch_size
    each = np.full(samples, length)
    starts = np.arange(samples + 1) * length
    position = np.tile(np.arange(length), samples)
    return Rows(replicas, microbatches, starts, position, lengths=each, items=each)


def _check(
    where: str,
    move: Redistribution | RowRedistribution,
    held: torch.Tensor,
    wanted: torch.Tensor,
    run: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    held.requires_grad_()
    arrived = run(held)
    if not torch.equal(arrived.detach(), wanted):
        raise AssertionError(f"{where}: got {arrived.tolist()}, wanted {wanted.tolist()}")
    arrived.backward(wanted)
    reader = move.plan.dst
    summands = prod(reader.layout.sizes[axis] for axis in reader.partial)
    back = held.detach() * float(move.plan.scale * summands)
    if held.grad is None or not torch.equal(held.grad, back):
        raise AssertionError(f"{where}: gradient {held.grad}, wanted {back}")


def _coded(
    plan: Plan,
    side: Holding,
    move: Redistribution | RowRedistribution,
    runs: list[Run],
    batch_size: int,
    length: int,
) -> torch.Tensor:
    """(sample of the step + 1, row + 1) for each row of the samples of ``runs`` that the rank
    holds, in the dims that ``move`` expects."""
    samples = [m * batch_size + s + 1 for m, start, stop in runs for s in range(start, stop)]
    codes = torch.ones(len(samples), length, 2, dtype=torch.float64)
    codes[..., 0] *= torch.tensor(samples, dtype=torch.float64).reshape(-1, 1)
    codes[..., 1] *= torch.arange(1, length + 1)
    if {"sequence", "row" if side is plan.src else "position"} & set(plan.dims):
        codes = cut_sequence(codes, 1, side.layout, move.rank)
    if isinstance(move, RowRedistribution):
        return codes
    if "slice" in plan.dims:
        codes = codes.repeat(1, 1, plan.grid[-1])
    if len(set(move.dims)) < len(move.dims):
        return codes.flatten(0, 1).movedim(0, move.dims[0]).contiguous()
    ndim = max(3, max(move.dims) + 2)
    codes = codes.reshape(*codes.shape[:2], *[1] * (ndim - 3), codes.shape[-1])
    return codes.movedim(list(range(len(move.dims))), list(move.dims)).contiguous()

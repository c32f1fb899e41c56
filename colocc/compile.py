"""compile(): from a model and its layouts to a program that this rank runs."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from colocc import passes
from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.dump import PASSES, page
from colocc.passes.graph import Graph, Reduction
from colocc.passes.rows import BatchDim, BatchDims, Items, Rows, RowsPerItem, dim_of
from colocc.program import Program
from colocc.runtime import megatron
from colocc.runtime.agreement import Check, parse_check
from colocc.runtime.bubbles import Bubbles, portions_of
from colocc.runtime.groups import (
    DEFAULT_TIMEOUT,
    ProcessGroups,
    as_layout,
    check_world,
    layouts_text,
)
from colocc.runtime.links import check_links
from colocc.runtime.parts import check_local
from colocc.runtime.schedule import Schedule
from colocc.runtime.texts import agree_on

if TYPE_CHECKING:
    from colocc.runtime.groups import AnyLayout


def compile(
    model: nn.Module,
    layouts: Mapping[str, AnyLayout],
    *,
    groups: ProcessGroups | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    schedule: str = "three_phase",
    batch_dims: BatchDims | None = None,
    sequence_dims: Mapping[str, int] | None = None,
    ranks_per_node: int | None = None,
    reductions: Mapping[str, Reduction] | None = None,
    rows: Mapping[str, RowsPerItem] | None = None,
    check: str = "every",
    balance: bool = True,
    batches: str = "global",
    cuda_graphs: bool = False,
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> Program:
    """Return the program that trains ``model`` with each module on its own layout.

    ``layouts`` names modules by submodule path, or by MIMO name for Megatron's MimoModel.
    ``groups`` are those that the model was built with; without them, equal ones are shared or
    opened.
    ``example_inputs`` is one global batch (tensors on any device, or meta): with it the page shows
    sizes and bytes, and code between the modules is recorded; a MimoModel needs none.
    ``batch_dims`` names the dim that holds the samples where it is not 0: a number, ``Rows(dim)``
    where a sample has several rows, None where all samples share the input, ``Items(module)`` where
    dim 0 holds items of which a sample has any number. ``sequence_dims`` names the dim that holds
    the sequence, of inputs and of modules' outputs: layouts with cp or sp then read and make their
    part of it, instead of all. Redistributions between nodes of ``ranks_per_node`` ranks cross with
    each byte once. ``reductions`` overrides how a module's gradients are reduced over its dp axis:
    "mean", or "sum" as with Megatron's calculate_per_token_loss; by default its config is asked.
    ``rows`` gives, of modules whose items (images, clips) make different numbers of rows, a
    function from one microbatch's inputs to the rows of each item.

    ``balance`` deals the samples of such modules, inside a replica of the reader, to the slots that
    encode them: longest first, by their rows; without it they stay in order. ``batches`` is
    "global" where every rank gives the same whole batches, "local" where each gives only what it
    reads (docs/data.md).

    ``schedule`` orders the work of ``forward_backward``: "three_phase" encodes the whole step
    first; "lookahead=2", at pp = 1, encodes 2 microbatches at a time, which bounds the memory of
    the encoders' activations; "filled", at pp > 1, encodes in the bubbles of the pipeline, if there
    is one encoder, each of its tp and cp groups lies inside one stage, samples have equally many
    rows and no sequence is cut; "filled=2,6" in 2 portions a microbatch, with the encoder's
    activations of 6 microbatches alive.

    ``cuda_graphs`` replays the encoders' forward and backward as CUDA graphs, which frees the host
    from launching their kernels and keeps their activations allocated. An encoder that cannot be
    captured (tp, cp or ep inside it, dropout, recomputation, fp8, weights to train outside
    Megatron's DDP, inputs on the host or of more than 4 shapes, waits for the device, no GPU) runs
    without, with a warning that says why. With DDP's ``overlap_grad_reduce`` buckets are reduced
    beside the last backward of a step, with ``overlap_param_gather`` weights are gathered while the
    batch is looked at.

    ``check`` says what is looked at before a step: with "every", all ranks ask one another, on the
    host, whether their batches are alike and without errors, before the step and after each
    encoding, so that an error of one rank is one error on all; "finite" looks for NaN and inf in
    the inputs, too, and waits for the device; "first" compares the first batch alone.

    ``timeout`` is that of the process groups which are opened here. COLOCC_DUMP in the environment
    names a folder for a page after each pass.

    Collective. Without an initialised torch.distributed the program can be printed, not run.

    Raises: LayoutError, CaptureError, before any training step and on every rank alike.
    """
    found, error = None, None
    dims: dict[str, BatchDim] = {}
    lengths: dict[str, int] = {}
    means: dict[str, Reduction] = {}
    order = Schedule()
    checks: Check = "every"
    try:
        checks = parse_check(check)
        dims = {**megatron.batch_dims_of(model), **(batch_dims or {})}
        lengths = dict(sequence_dims or {})
        means = dict(reductions or {})
        plain = {name: as_layout(name, layout) for name, layout in layouts.items()}
        check_world(plain, dist.get_world_size() if dist.is_initialized() else None)
        _check_groups(groups, plain)
        _check_options(model, plain, dims, lengths, means, ranks_per_node)
        options = {
            "batch_dims": dims,
            "sequence_dims": lengths,
            "ranks_per_node": ranks_per_node,
            "rows": rows,
        }
        graph = _build(model, plain, example_inputs, means, options, schedule)
        _check_rows(graph, rows or {})
        order = Schedule.parse(schedule, (graph.sink, plain[graph.sink]))
        if order.kind == "filled":
            portions = portions_of(graph)
            if dist.is_initialized() and Bubbles.needs_care():
                check_links(portions)
        if batches not in ("global", "local"):
            raise LayoutError(f"batches is {batches!r}: write 'global' or 'local'")
        if batches == "local":
            check_local(graph, order.kind, checks)
        found = graph, _specialized(graph, schedule)
    except Exception as problem:  # noqa: BLE001 - agreed on below, then raised on every rank
        error = problem
    text = (
        ""
        if found is None
        else f"{_digest(found[0])}, groups {groups is not None}, "
        f"{dims}, {lengths}, {means}, {order}, rows {sorted(rows or {})}, check {checks}, "
        f"balance {balance}, batches {batches}, cuda_graphs {cuda_graphs}"
    )
    agree_on("the compiled program", text, error)
    assert found is not None
    return Program(
        model,
        *found,
        groups,
        dims,
        timeout,
        order,
        rows=rows,
        check=checks,
        balance=balance,
        local=batches == "local",
        cuda_graphs=cuda_graphs,
    )


def _check_groups(groups: ProcessGroups | None, layouts: dict[str, Layout]) -> None:
    if groups is None:
        return
    if not isinstance(groups, ProcessGroups):
        raise LayoutError(
            f"groups is a {type(groups).__name__}: give what colocc.process_groups(layouts) returns"
        )
    if groups.layouts != layouts:
        raise LayoutError(
            f"groups were opened for {layouts_text(groups.layouts)}, the layouts are "
            f"{layouts_text(layouts)}. Open them with the same layouts."
        )


def _specialized(graph: Graph, schedule: str) -> Graph | None:
    """The part of this rank; None where there are no ranks."""
    if not dist.is_initialized():
        return None
    rank = dist.get_rank()
    mine = passes.specialize(graph, rank=rank)
    passes.check(mine, "specialize", (partial(_dump, schedule=schedule, rank=rank),))
    return mine


def _build(
    model: nn.Module,
    layouts: dict[str, Layout],
    example_inputs: Mapping[str, Any] | None,
    overrides: Mapping[str, Reduction],
    options: Mapping[str, Any],
    schedule: str,
) -> Graph:
    traits = megatron.traits_of(model, example_inputs)
    for name, dim in options["batch_dims"].items():
        if isinstance(dim, Items) and (traits.rows or example_inputs is None):
            why = "a MimoModel has its items in modality_inputs: leave it out"
            if not traits.rows:
                why = "items are told from an example: give compile() example_inputs"
            raise LayoutError(f"batch_dims has {name!r}: {dim!r}; {why}")
    megatron.check_sequence(model, layouts)
    targets = passes.capture_targets(model, layouts, traits)
    reductions = {
        name: overrides[name]
        if name in overrides
        else megatron.reduction_of(name, model.get_submodule(path))
        for name, path in targets.items()
    }
    return passes.run(
        model,
        layouts,
        reductions=reductions,
        example_inputs=example_inputs,
        traits=traits,
        between=(partial(_dump, schedule=schedule),),
        **options,
    )


def _check_options(
    model: nn.Module,
    layouts: dict[str, Layout],
    batch_dims: BatchDims,
    sequence_dims: Mapping[str, int],
    reductions: Mapping[str, Reduction],
    ranks_per_node: int | None,
) -> None:
    """Raise LayoutError for options that nothing would read, or that nothing can do."""
    parameters = inspect.signature(model.forward).parameters
    inputs = [name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD]
    takes_more = len(inputs) < len(parameters)
    for name, dim in batch_dims.items():
        known = name in inputs or takes_more
        place = dim.dim if isinstance(dim, Rows) else dim
        if isinstance(dim, Items) and known:
            _check_items(name, dim, layouts)
            continue
        if not known or (place is not None and (type(place) is not int or place < 0)):
            raise LayoutError(
                f"batch_dims has {name!r}: {dim!r}; give the name of an input of "
                f"{type(model).__name__}.forward ({', '.join(inputs)}) and a dim of at least 0, "
                "Rows(dim) where a sample has several rows, Items(module) where it has any number "
                "of them, or None where all samples share it"
            )
    for name, dim in sequence_dims.items():
        is_input = name in inputs or (takes_more and name not in layouts)
        if is_input == (name in layouts) or type(dim) is not int or dim < 0:
            both = " and not of both" * (name in inputs and name in layouts)
            raise LayoutError(
                f"sequence_dims has {name!r}: {dim!r}; give the name of a module of the layouts "
                f"({', '.join(layouts)}), whose output it is, or of an input of "
                f"{type(model).__name__}.forward ({', '.join(inputs)}){both}, and a dim of at "
                "least 0"
            )
        if isinstance(batch_dims.get(name), Items):
            raise LayoutError(
                f"sequence_dims has {name!r}: {dim!r}, and its items are encoded whole. Leave it "
                "out of sequence_dims."
            )
        if is_input and dim == dim_of(batch_dims, name):
            raise LayoutError(
                f"sequence_dims has {name!r}: {dim!r}, the dim that holds its samples. Give it a "
                f"dim of its own, or batch_dims={{{name!r}: None}} if all samples share it."
            )
    if ranks_per_node is not None and (type(ranks_per_node) is not int or ranks_per_node < 1):
        raise LayoutError(f"ranks_per_node is {ranks_per_node!r}: give an integer of at least 1")
    for name, reduction in reductions.items():
        if name not in layouts or reduction not in ("mean", "sum"):
            raise LayoutError(
                f"reductions has {name!r}: {reduction!r}; give the name of a layout "
                f"({', '.join(layouts)}) and 'mean' or 'sum'"
            )


def _check_items(name: str, items: Items, layouts: Mapping[str, Layout]) -> None:
    if items.module not in layouts:
        raise LayoutError(
            f"batch_dims has {name!r}: {items!r}; give the name of the module of the layouts "
            f"({', '.join(layouts)}) that encodes the items"
        )


def _check_rows(graph: Graph, rows: Mapping[str, RowsPerItem]) -> None:
    known = dict.fromkeys(places.items for places in graph.rows.values())
    for name, function in rows.items():
        if name not in known or not callable(function):
            raise LayoutError(
                f"rows has {name!r}: {type(function).__name__}; give the name of a module whose "
                f"rows belong to placeholders ({', '.join(known) or 'this model has none'}) and a "
                "function"
            )


def _digest(graph: Graph) -> str:
    """A line that is equal on two ranks exactly if their graphs and plans are."""
    seen = page(graph) + repr(sorted(graph.plans.items()))
    return f"{layouts_text(graph.layouts)}, graph {hashlib.sha256(seen.encode()).hexdigest()[:16]}"


def _dump(graph: Graph, after: str, *, schedule: str, rank: int | None = None) -> None:
    """Write the page after a pass into the folder that COLOCC_DUMP names, if it names one."""
    folder = os.environ.get("COLOCC_DUMP")
    if not folder or (rank is None and dist.is_initialized() and dist.get_rank() != 0):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = f"{PASSES.index(after) + 1:02d}_{after}" + (f".rank{rank}" if rank is not None else "")
    Path(folder, f"{name}.txt").write_text(page(graph, after, schedule))

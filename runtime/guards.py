"""Check a step's batches against the guards of the graph, before anything else is done.

Batches are global and so alike on every rank: a guard that fails is the same error everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from colocc.errors import CaptureError
from colocc.passes.graph import Graph
from colocc.passes.guards import Guards, ScatterGuard
from colocc.passes.shapes import attribute, lookup
from colocc.passes.sizes import evaluated
from colocc.runtime.nodes import call


def check_guards(graph: Graph, batch: Mapping[str, Any], samples: int, where: str) -> None:
    """Raise CaptureError for the first guard that ``batch``, of ``samples`` samples, breaks."""
    guards = graph.guards
    if guards is None:
        return
    counts = sorted({max(1, samples // layout.dp) for layout in graph.layouts.values()})
    problem = guards.failed(batch, samples, counts)
    for scatter in guards.scatters if problem is None else ():
        problem = problem or _miscounted(guards, scatter, batch, samples)
    if problem is not None:
        raise CaptureError(f"{where}: {problem}")


def _miscounted(
    guards: Guards, scatter: ScatterGuard, batch: Mapping[str, Any], samples: int
) -> str | None:
    """What is wrong with the places of a scatter, sample by sample."""
    known = guards.known(batch, samples)
    if not scatter.rows.free_symbols <= set(known):
        return None
    wanted = evaluated(scatter.rows, known)
    mask = value_of(scatter.mask, batch)
    places = mask.reshape(samples, -1).sum(dim=1)
    wrong = (places != wanted).nonzero()
    if not wrong.numel():
        return None
    sample = int(wrong[0])
    return (
        f"sample {sample} has {int(places[sample])} places for embeddings and "
        f"{wanted} embeddings ({scatter.name}, {scatter.line}). Give each sample as many "
        f"placeholder tokens as its encoder makes embeddings. {len(wrong)} of {samples} samples "
        "differ. Where samples have different numbers of items, say so of the encoder's inputs: "
        "compile(..., batch_dims={input: colocc.Items(module)})."
    )


def value_of(node: fx.Node, batch: Mapping[str, Any]) -> torch.Tensor:
    """The value of glue that is made of inputs alone, for the whole batch."""
    values: dict[fx.Node, Any] = {}
    todo = [node]
    while todo:
        last = todo[-1]
        missing = [source for source in last.all_input_nodes if source not in values]
        if missing:
            todo += missing
            continue
        todo.pop()
        values[last] = (
            lookup(batch, last.meta["path"]) if last.op == "placeholder" else call(last, values)
        )
    found: torch.Tensor = values[node]
    return found


def check_modes(guards: Guards | None, model: nn.Module) -> None:
    """Raise CaptureError if a module that the forward asked is in another mode than then."""
    for guard in guards.modes if guards is not None else ():
        training = (attribute(model, guard.module) if guard.module else model).training
        if training != guard.training:
            raise CaptureError(
                f"{guard.module or 'model'}.training is {training}, and the graph holds where "
                f"{guard.text} ({guard.line}). Compile again in this mode, or call "
                f".{'train' if guard.training else 'eval'}()."
            )

"""Three phases of a training step: encode, language pipeline, encode backward.

1. Encode the samples of the whole step and redistribute; cut the result into microbatches, each a
   leaf of its own.
2. Megatron's schedule (1F1B, or none at pp = 1) over the language module, which reads the leaves.
3. Return the leaves' gradients through the redistributions and the encoders; then finalise.

Source: the schedule of NVIDIA/Megatron-LM pull request 4784; pairing is by sample here, not by
position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from colocc.passes.graph import first_type
from colocc.runtime import megatron
from colocc.runtime.data import Batches
from colocc.runtime.gradients import finalize

if TYPE_CHECKING:
    from colocc.program import Program


@dataclass
class Encoded:
    """The values that cross from encode to language: whole, and cut into leaves by microbatch.

    ``counts`` gives, of values made of rows, the rows of each microbatch; all others have equally
    many samples in each.
    """

    nodes: list[fx.Node]
    whole: list[Any]
    counts: dict[fx.Node, list[int]] = field(default_factory=dict)
    leaves: list[list[Any]] = field(default_factory=list)

    def cut(self, microbatches: int) -> None:
        """Detach each value by microbatch; a microbatch's backward then fills its own leaf's
        grad."""
        self.leaves = [
            [self._leaf(node, value, index, microbatches) for node, value in self._pairs()]
            for index in range(microbatches)
        ]

    def _pairs(self) -> Iterator[tuple[fx.Node, Any]]:
        return zip(self.nodes, self.whole, strict=True)

    def _leaf(self, node: fx.Node, value: Any, index: int, count: int) -> Any:
        dim, counts = _batch_dim(node), self.counts.get(node)

        def part(tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor) or dim is None:
                return tensor
            sizes = counts or [tensor.shape[dim] // count] * count
            leaf = tensor.detach().narrow(dim, sum(sizes[:index]), sizes[index])
            return leaf.requires_grad_(tensor.requires_grad)

        return pytree.tree_map(part, value)

    def backward(self) -> None:
        """Phase 3: from the leaves' gradients to the encoders' parameters, on every rank alike.

        A rank that read nothing returns zero rows, so that all ranks run the same collectives.
        """
        tensors, gradients = [], []
        for place, (node, value) in enumerate(self._pairs()):
            dim = _batch_dim(node)
            parts = [pytree.tree_leaves(leaves[place]) for leaves in self.leaves]
            for which, tensor in enumerate(pytree.tree_leaves(value)):
                if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad or dim is None:
                    continue
                tensors.append(tensor)
                gradients.append(torch.cat([_grad_of(part[which]) for part in parts], dim=dim))
        self.leaves.clear()
        if tensors:
            torch.autograd.backward(tensors, gradients)


def _batch_dim(node: fx.Node) -> int | None:
    if "rows" in node.meta:
        return 0
    found = first_type(node.meta["types"])
    return found.batch if found is not None else None


def _grad_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def three_phase(
    program: Program,
    batches: Batches,
    loss_func: Callable[..., Any] | None,
    *,
    forward_only: bool,
    collect_non_loss_data: bool,
    force_all_reduce: bool,
    seq_length: int,
) -> list[Any]:
    """Run one step; return what Megatron's schedule returns on this rank."""
    count = len(batches.microbatches)
    encoded = Encoded(program.cut, [], program.row_counts(batches))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only):
        encoded.whole = program.encode(batches)
    encoded.cut(count)
    tokens: list[torch.Tensor | None] = []

    def collect(model: Any, num_tokens: torch.Tensor | None, **unused: Any) -> None:
        tokens.append(num_tokens)

    def forward_step(indices: Iterator[int], model: Any) -> tuple[Any, Callable[..., Any] | None]:
        index = next(indices)
        return program.language(batches, index, encoded.leaves[index]), loss_func

    results = megatron.run_schedule(
        megatron.Stage(program.sink_module, collect),
        forward_step,
        program.collection(program.graph.sink),
        num_microbatches=count,
        seq_length=seq_length,
        micro_batch_size=batches.size // batches.sink.dp,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        force_all_reduce=force_all_reduce,
        indices=iter(range(count)),
    )
    if not forward_only:
        encoded.backward()
        finalize(program, tokens[0], force_all_reduce=force_all_reduce)
    return results

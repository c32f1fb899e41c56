"""A sequence shared by context-parallel ranks: which chunks a rank holds, and the gather of keys
and values, which is all that attention needs of the other ranks.

Zigzag: the sequence is 2 * cp chunks, and rank c holds chunks c and 2 * cp - 1 - c, as Megatron's
get_batch_on_this_cp_rank has it; all ranks have the same work under a causal mask. Otherwise it is
cp chunks, rank c holds chunk c, and the last rank has the most work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from colocc.errors import LayoutError


def chunks_of(rank: int, size: int, *, zigzag: bool = True) -> tuple[int, ...]:
    """The chunks of the sequence that rank ``rank`` of ``size`` holds, in the order it holds them.

    The sequence has ``size`` times as many chunks as one rank holds.
    """
    return (rank, 2 * size - 1 - rank) if zigzag else (rank,)


def check_length(what: str, length: int, size: int, *, zigzag: bool = True) -> None:
    """Raise LayoutError unless ``size`` ranks can share a sequence of ``length`` tokens."""
    chunks = 2 * size if zigzag else size
    if length % chunks:
        each = " (two for each cp rank)" if zigzag else ""
        raise LayoutError(
            f"{what} has a sequence of {length}, which cp{size} cuts into {chunks} equal "
            f"chunks{each}: {length} % {chunks} = {length % chunks}. Make it a multiple of "
            f"{chunks}."
        )


def shard(
    whole: torch.Tensor, dim: int, rank: int, size: int, *, zigzag: bool = True
) -> torch.Tensor:
    """The part of ``whole`` that rank ``rank`` of ``size`` holds: its chunks of ``dim``, joined.

    Raises: LayoutError if ``dim`` cannot be cut into equal chunks.
    """
    check_length("the tensor to shard", whole.shape[dim], size, zigzag=zigzag)
    held = chunks_of(rank, size, zigzag=zigzag)
    chunks = whole.chunk(size * len(held), dim)
    return torch.cat([chunks[chunk] for chunk in held], dim)


def join(parts: Sequence[torch.Tensor], dim: int, *, zigzag: bool = True) -> torch.Tensor:
    """The inverse of ``shard``: the whole, in its order, from the parts of all ranks."""
    chunks: dict[int, torch.Tensor] = {}
    for rank, part in enumerate(parts):
        held = chunks_of(rank, len(parts), zigzag=zigzag)
        chunks.update(zip(held, part.chunk(len(held), dim), strict=True))
    return torch.cat([chunks[chunk] for chunk in range(len(chunks))], dim)


def gather(
    key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup, *, zigzag: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of the whole sequence (dim 0), in its order, from every rank's part.

    One all_gather moves both. Each rank's gradient of the whole is a partial one: backward is one
    reduce_scatter, which sums them over ``group``. Every rank brings the same shapes.
    Raises: LayoutError, before the collective, if a part cannot be the chunks of one rank.
    """
    size = group.size()
    check_length("key", size * key.shape[0], size, zigzag=zigzag)
    check_length("value", size * value.shape[0], size, zigzag=zigzag)
    whole: tuple[torch.Tensor, torch.Tensor] = _Gather.apply(  # type: ignore[no-untyped-call]
        key, value, group, zigzag
    )
    return whole


class _Gather(torch.autograd.Function):
    """all_gather of two tensors over their dim 0 by chunks; backward reduce_scatters."""

    @staticmethod
    def forward(
        ctx: Any, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup, zigzag: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shapes, ctx.group, ctx.zigzag = (key.shape, value.shape), group, zigzag
        part = torch.cat([key.reshape(-1), value.reshape(-1)])
        rows = part.new_empty(group.size(), part.numel())
        dist.all_gather_into_tensor(rows.view(-1), part, group=group)
        keys = [row[: key.numel()].view(key.shape) for row in rows]
        values = [row[key.numel() :].view(value.shape) for row in rows]
        return join(keys, 0, zigzag=zigzag), join(values, 0, zigzag=zigzag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        size = ctx.group.size()
        order = [
            chunk for rank in range(size) for chunk in chunks_of(rank, size, zigzag=ctx.zigzag)
        ]
        cut = [gradient.chunk(len(order)) for gradient in gradients]
        by_rank = [torch.cat([chunks[chunk] for chunk in order]).view(size, -1) for chunks in cut]
        rows = torch.cat(by_rank, dim=1)
        part = rows.new_empty(rows.shape[1])
        dist.reduce_scatter_tensor(part, rows.view(-1), group=ctx.group)
        key, value = part.split([shape.numel() for shape in ctx.shapes])
        return key.view(ctx.shapes[0]), value.view(ctx.shapes[1]), None, None

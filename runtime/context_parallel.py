"""A sequence shared by context-parallel ranks: which chunks a rank holds, and the gather of keys
and values, which is all that attention needs of the other ranks.

The two placements, for cp ranks:

zigzag      2 * cp chunks, rank c holds chunks c and 2 * cp - 1 - c: Megatron's
            get_batch_on_this_cp_rank; every rank has the same work under a causal mask
contiguous  cp chunks, rank c holds chunk c; the last rank has the most work
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from colocc.errors import LayoutError

Placement = Literal["zigzag", "contiguous"]


def chunks_of(rank: int, size: int, placement: Placement = "zigzag") -> tuple[int, ...]:
    """The chunks of the sequence that rank ``rank`` of ``size`` holds, in the order it holds them.

    The sequence has ``size`` times as many chunks as one rank holds.
    """
    return (rank, 2 * size - 1 - rank) if placement == "zigzag" else (rank,)


def chunk_length(length: int, size: int, placement: Placement = "zigzag") -> int:
    """Tokens of one chunk, where each of ``size`` ranks holds ``length`` tokens.

    Raises: LayoutError if the tokens cannot be cut into the rank's chunks.
    """
    held = len(chunks_of(0, size, placement))
    if length % held:
        raise LayoutError(
            f"a rank of cp{size} holds {length} tokens of a sequence of {size * length}: {length} "
            f"% {held} = {length % held}, and {placement} places {held} equal chunks on each rank. "
            f"Pad the sequence to a multiple of {held * size}."
        )
    return length // held


def shard(
    whole: torch.Tensor, dim: int, rank: int, size: int, placement: Placement = "zigzag"
) -> torch.Tensor:
    """The part of ``whole`` that rank ``rank`` of ``size`` holds: its chunks of ``dim``, joined.

    Raises: LayoutError if ``dim`` cannot be cut into equal chunks.
    """
    held = chunks_of(rank, size, placement)
    if whole.shape[dim] % (count := size * len(held)):
        raise LayoutError(
            f"{whole.shape[dim]} tokens on cp{size}: {whole.shape[dim]} % {count} = "
            f"{whole.shape[dim] % count}, and {placement} cuts them into {count} equal chunks. "
            f"Pad the sequence to a multiple of {count}."
        )
    chunks = whole.chunk(count, dim)
    return torch.cat([chunks[chunk] for chunk in held], dim)


def gather(
    key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup, placement: Placement
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of the whole sequence (dim 0), in its order, from every rank's part.

    One all_gather moves both. Each rank's gradient of the whole is a partial one: backward is one
    reduce_scatter, which sums them over ``group``. Every rank brings the same shapes.
    Raises: LayoutError, before the collective, if dim 0 cannot be cut into the rank's chunks.
    """
    chunk_length(key.shape[0], group.size(), placement)
    chunk_length(value.shape[0], group.size(), placement)
    whole: tuple[torch.Tensor, torch.Tensor] = _Gather.apply(key, value, group, placement)
    return whole


class _Gather(torch.autograd.Function):
    """all_gather of two tensors over their dim 0 by chunks; backward reduce_scatters."""

    @staticmethod
    def forward(
        ctx: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        group: dist.ProcessGroup,
        placement: Placement,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shapes, ctx.group, ctx.placement = (key.shape, value.shape), group, placement
        part = torch.cat([key.reshape(-1), value.reshape(-1)])
        parts = part.new_empty(group.size(), part.numel())
        dist.all_gather_into_tensor(parts.view(-1), part, group=group)
        keys, values = parts.split([key.numel(), value.numel()], dim=1)
        return (
            _in_order(keys, key.shape, placement),
            _in_order(values, value.shape, placement),
        )

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        size = ctx.group.size()
        parts = torch.cat([_by_rank(whole, size, ctx.placement) for whole in gradients], dim=1)
        part = parts.new_empty(parts.shape[1])
        dist.reduce_scatter_tensor(part, parts.view(-1), group=ctx.group)
        key, value = part.split([shape.numel() for shape in ctx.shapes])
        return key.view(ctx.shapes[0]), value.view(ctx.shapes[1]), None, None


def _in_order(parts: torch.Tensor, shape: torch.Size, placement: Placement) -> torch.Tensor:
    """The whole sequence from one row per rank, each the elements of a tensor of ``shape``."""
    size = parts.shape[0]
    places = {
        chunk: (rank, place)
        for rank in range(size)
        for place, chunk in enumerate(chunks_of(rank, size, placement))
    }
    held = len(places) // size
    by_chunk = parts.view(size, held, shape[0] // held, *shape[1:])
    return torch.cat([by_chunk[places[chunk]] for chunk in range(len(places))])


def _by_rank(whole: torch.Tensor, size: int, placement: Placement) -> torch.Tensor:
    """The inverse of ``_in_order``: one row per rank."""
    order = [chunk for rank in range(size) for chunk in chunks_of(rank, size, placement)]
    chunks = whole.chunk(len(order))
    return torch.cat([chunks[chunk] for chunk in order]).view(size, -1)

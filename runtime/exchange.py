"""Give each member of a group its pieces, and get theirs, in one collective.

Who gives anything to whom follows from the layouts; only the sizes may follow from the batch. So an
empty piece is sent where the layouts say that something may go, and all ranks issue the same
collectives whatever the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

Pieces = Sequence[torch.Tensor]


def exchange(
    parts: Sequence[Pieces | None],
    counts: Sequence[int | None],
    *,
    group: dist.ProcessGroup,
    kind: Literal["all_to_all", "send_recv"],
    like: torch.Tensor,
) -> torch.Tensor:
    """Return what the members of ``group`` gave to this rank: one tensor, in the order of the
    members.

    ``parts[i]`` are the pieces for member i of the group, of any shape and strides, packed in their
    order; ``counts[i]`` is the number of elements that member i gives. None where the layouts say
    that nothing ever goes: such a pair does not meet in a send_recv. A rank may give pieces to
    itself in an all_to_all, not in a send_recv.

    Shapes: the result is [sum of counts], of the dtype and device of ``like``, as are the pieces.
    Collective over ``group``. No autograd.
    """
    received = like.new_empty(sum(count or 0 for count in counts))
    if kind == "all_to_all":
        sizes = [sum(piece.numel() for piece in pieces or ()) for pieces in parts]
        dist.all_to_all_single(
            received,
            pack([piece for pieces in parts for piece in pieces or ()], like),
            output_split_sizes=[count or 0 for count in counts],
            input_split_sizes=sizes,
            group=group,
        )
        return received
    operations = [
        dist.P2POp(dist.isend, pack(pieces, like), group=group, group_peer=peer)
        for peer, pieces in enumerate(parts)
        if pieces is not None
    ]
    start = 0
    for peer, count in enumerate(counts):
        if count is not None:
            part = received[start : start + count]
            operations.append(dist.P2POp(dist.irecv, part, group=group, group_peer=peer))
            start += count
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received


def pack(pieces: Pieces, like: torch.Tensor) -> torch.Tensor:
    """The elements of ``pieces``, one after the other, in one copy; one contiguous piece as it is.

    Shapes: [elements], of the dtype and device of ``like``.
    """
    if len(pieces) == 1 and pieces[0].is_contiguous():
        return pieces[0].detach().view(-1)
    packed = like.new_empty(sum(piece.numel() for piece in pieces))
    start = 0
    for piece in pieces:
        stop = start + piece.numel()
        packed[start:stop].view(piece.shape).copy_(piece)
        start = stop
    return packed


def unpack(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The pieces of these shapes that ``flat`` holds one after the other; views.

    Raises: ValueError if their elements are not those of ``flat``.
    """
    pieces = []
    start = 0
    for shape in shapes:
        stop = start + torch.Size(shape).numel()
        pieces.append(flat[start:stop].view(*shape))
        start = stop
    if start != flat.numel():
        raise ValueError(f"pieces of {[tuple(s) for s in shapes]} are not {flat.numel()} elements")
    return pieces


def share(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()

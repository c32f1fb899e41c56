"""Covers runtime/exchange.py: pieces of any shape between the members of a group, exactly."""

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colocc.runtime.exchange import exchange, pack, unpack
from tests.harness import run_threads

MEMBERS = (0, 2, 3)
WORLD = 4


def code(sender: int, receiver: int, count: int) -> Tensor:
    return torch.arange(count) + 100 * sender + 10 * receiver


def amount(sender: int, receiver: int) -> int:
    """Elements from one place in the group to another; some pairs have none."""
    return (sender * 2 + receiver) % 4


@pytest.mark.parametrize("own", [True, False])
def test_all_to_all_with_splits(own: bool) -> None:
    def main(rank: int) -> Tensor | None:
        group = dist.new_group(list(MEMBERS))
        if rank not in MEMBERS:
            return None
        me, places = MEMBERS.index(rank), range(3)
        parts = [[code(me, i, amount(me, i))] if own or i != me else None for i in places]
        counts = [amount(i, me) if own or i != me else None for i in places]
        like = torch.zeros(1, dtype=torch.int64)
        return exchange(parts, counts, group=group, kind="all_to_all", like=like)

    found = run_threads(WORLD, main, timeout=20)
    for me, rank in enumerate(MEMBERS):
        senders = [i for i in range(3) if own or i != me]
        wanted = torch.cat([code(i, me, amount(i, me)) for i in senders])
        got = found[rank]
        assert got is not None and torch.equal(got, wanted)
    assert found[1] is None


@pytest.mark.parametrize("count", [0, 5])
def test_a_chain_of_send_recv(count: int) -> None:
    def main(rank: int) -> Tensor | None:
        group = dist.new_group(list(MEMBERS))
        if rank not in MEMBERS:
            return None
        me, places = MEMBERS.index(rank), range(3)
        # The last one only receives, the first one only sends.
        parts = [[code(me, i, count)] if i == me + 1 else None for i in places]
        counts = [count if i == me - 1 else None for i in places]
        like = torch.zeros(1, dtype=torch.int64)
        return exchange(parts, counts, group=group, kind="send_recv", like=like)

    found = run_threads(WORLD, main, timeout=20)
    assert [None if f is None else f.tolist() for f in found] == [
        [],
        None,
        code(0, 1, count).tolist(),
        code(1, 2, count).tolist(),
    ]


KINDS: list[Literal["all_to_all", "send_recv"]] = ["all_to_all", "send_recv"]


@pytest.mark.parametrize("kind", KINDS)
def test_strided_pieces_of_half_precision(kind: Literal["all_to_all", "send_recv"]) -> None:
    whole = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    pieces = [whole[1:3, 2:4], whole.t()[4:], whole[:0]]

    def main(rank: int) -> Tensor:
        assert dist.group.WORLD is not None
        parts = [None if peer == rank else pieces for peer in range(2)]
        counts = [None if peer == rank else 12 for peer in range(2)]
        return exchange(parts, counts, group=dist.group.WORLD, kind=kind, like=whole)

    wanted = torch.cat([piece.reshape(-1) for piece in pieces])
    for found in run_threads(2, main, timeout=20):
        assert torch.equal(found, wanted)


def test_pack_and_unpack_are_inverse() -> None:
    whole = torch.arange(24).reshape(4, 6)
    pieces = [whole[:2, ::2], whole[3], whole[:0]]
    flat = pack(pieces, whole)
    for found, piece in zip(unpack(flat, [p.shape for p in pieces]), pieces, strict=True):
        assert torch.equal(found, piece)
        assert found.shape == piece.shape
    with pytest.raises(ValueError, match=r"pieces of \[\(3,\)\] are not 12 elements"):
        unpack(flat, [(3,)])


def test_one_contiguous_piece_is_not_copied() -> None:
    whole = torch.arange(24).reshape(4, 6)
    assert pack([whole[1:3]], whole).data_ptr() == whole[1:].data_ptr()
    assert pack([whole[:, 1:]], whole).data_ptr() != whole[:, 1:].data_ptr()
    assert pack([], whole).shape == (0,)

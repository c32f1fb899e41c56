"""Match the collectives of all ranks against each other, without one of them running.

Each rank's work runs alone, in a world of the fake backend, and every call that reaches torch's
process groups is written down: kind, group, what goes to and comes from each member, dtype. The
lists are then played against each other. A collective completes when it is the next call of all
members. Messages are taken for the strictest kind: a rank goes on when the peer of each has met it,
be it in one call or, as in a pipeline, in several. What is left when nothing moves is a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import DebugLevel, get_debug_level, set_debug_level
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

NONE = -1


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one rank: ``sent[i]`` elements go to member i of the group, ``received[i]`` come
    from it, NONE if there is no message. Sends and receives issued together are one call."""

    kind: str
    members: tuple[int, ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Writes down what reaches the process groups."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._batch: Call | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, the messages of one ``batch_isend_irecv`` are one call."""
        issue = dist.batch_isend_irecv

        def issue_as_one(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
            first = p2p_op_list[0]
            members = tuple(dist.get_process_group_ranks(first.group))
            none = (NONE,) * len(members)
            self._batch = Call("p2p", members, none, none, first.tensor.dtype)
            try:
                found = issue(p2p_op_list)
                self.calls.append(self._batch)
            finally:
                self._batch = None
            return found

        dist.batch_isend_irecv = issue_as_one
        try:
            yield
        finally:
            dist.batch_isend_irecv = issue

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._add(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        members = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        size = len(members)
        assert self._batch is None or name in ("send", "recv_")
        if name == "_allgather_base_":
            out, given = args[:2]
            assert out.numel() == size * given.numel()
            amounts = ((given.numel(),) * size,) * 2
            self.calls.append(Call("all_gather", members, *amounts, given.dtype))
        elif name == "_reduce_scatter_base_":
            out, given = args[:2]
            assert given.numel() == size * out.numel()
            amounts = ((out.numel(),) * size,) * 2
            self.calls.append(Call("reduce_scatter", members, *amounts, given.dtype))
        elif name in ("allreduce_", "allreduce_coalesced_"):
            (dtype,) = {value.dtype for value in args[0]}
            amounts = ((sum(value.numel() for value in args[0]),) * size,) * 2
            self.calls.append(Call("all_reduce", members, *amounts, dtype))
        elif name == "alltoall_base_":
            received, given = args[:2]
            width = given[:1].numel() if len(given) else received[:1].numel()
            outs, ins = (tuple(width * split for split in splits) for splits in args[3:5])
            assert (sum(ins), sum(outs)) == (given.numel(), received.numel())
            assert given.dtype == received.dtype
            self.calls.append(Call("all_to_all", members, ins, outs, given.dtype))
        elif name in ("send", "recv_"):
            self._add_one(name, members, args)
        else:
            raise NotImplementedError(f"{name} cannot be matched")

    def _add_one(self, name: str, members: tuple[int, ...], args: tuple[Any, ...]) -> None:
        (value,), peer = args[0], args[2]
        none = (NONE,) * len(members)
        call = self._batch or Call("p2p", members, none, none, value.dtype)
        assert (call.members, call.dtype) == (members, value.dtype)
        before = call.sent if name == "send" else call.received
        assert before[peer] == NONE, f"two messages of {members} in one call"
        after = (*before[:peer], value.numel(), *before[peer + 1 :])
        call = replace(call, sent=after) if name == "send" else replace(call, received=after)
        if self._batch is None:
            self.calls.append(call)
        else:
            self._batch = call


@contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """A world in which this process is ``rank`` and collectives do nothing."""
    level = get_debug_level()
    set_debug_level(DebugLevel.OFF)  # DETAIL would connect real gloo ranks
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        set_debug_level(level)


def traces(world: int, work: Callable[[int], Callable[[], object]]) -> list[list[Call]]:
    """The calls of each rank: ``work(rank)`` opens groups, and what it returns is written down."""
    found = []
    for rank in range(world):
        with fake_world(rank, world):
            run = work(rank)
            with Recorder() as recorder, recorder.together():
                run()
            found.append(recorder.calls)
    return found


def match(calls: list[list[Call]]) -> int:
    """Play the ranks against each other; how many collectives and messages completed.

    Raises: AssertionError naming the ranks that wait, or the members that disagree.
    """
    return _Play(calls).run()


class _Play:
    """Where each rank is, and what its next call still waits for."""

    def __init__(self, calls: list[list[Call]]) -> None:
        self.calls = calls
        self.place = [0] * len(calls)
        self.done = 0
        self.left = [self._messages(rank) for rank in range(len(calls))]

    def run(self) -> int:
        moved = True
        while moved:
            moves = [self._move(rank) for rank in range(len(self.calls))]
            moved = any(moves)
        waiting = {
            rank: call for rank in range(len(self.calls)) if (call := self._next(rank)) is not None
        }
        assert not waiting, f"deadlock: {waiting}"
        return self.done

    def _next(self, rank: int) -> Call | None:
        mine = self.calls[rank]
        return mine[self.place[rank]] if self.place[rank] < len(mine) else None

    def _messages(self, rank: int) -> set[tuple[int, int]]:
        """The (sender, receiver) of each message of the next call of ``rank``."""
        call = self._next(rank)
        if call is None or call.kind != "p2p":
            return set()
        sent = {(rank, peer) for peer, n in zip(call.members, call.sent, strict=True) if n != NONE}
        return sent | {
            (peer, rank) for peer, n in zip(call.members, call.received, strict=True) if n != NONE
        }

    def _move(self, rank: int) -> bool:
        """Complete what can be of the next call of ``rank``; whether anything was."""
        call = self._next(rank)
        if call is None:
            return False
        assert rank in call.members, f"rank {rank} calls the group {call.members}"
        if call.kind == "p2p":
            return self._meet(rank, call)
        heads = {peer: self._next(peer) for peer in call.members}
        ready = {peer: c for peer, c in heads.items() if c is not None}
        if len(ready) < len(heads) or any(
            # A pipeline has a group of its own, which may have the members of another one.
            other.members != call.members or other.kind == "p2p"
            for other in ready.values()
        ):
            return False
        _agree(ready)
        self._advance(call.members)
        return True

    def _meet(self, rank: int, call: Call) -> bool:
        met = False
        for sender, receiver in sorted(self.left[rank]):
            peer = sender + receiver - rank
            other = self._next(peer)
            if other is None or (sender, receiver) not in self.left[peer]:
                continue
            if other.members != call.members:
                continue
            one, two = (call, other) if rank == sender else (other, call)
            at = [call.members.index(who) for who in (sender, receiver)]
            assert one.dtype == two.dtype, f"peers issue different calls: {one}, {two}"
            assert one.sent[at[1]] == two.received[at[0]], f"peers disagree on sizes: {one}, {two}"
            self.left[rank].discard((sender, receiver))
            self.left[peer].discard((sender, receiver))
            self.done += 1
            met = True
        for who in call.members:
            head = self._next(who)
            if head is not None and head.kind == "p2p" and not self.left[who]:
                self._advance((who,), count=False)
                met = True
        return met

    def _advance(self, ranks: tuple[int, ...], *, count: bool = True) -> None:
        for rank in ranks:
            self.place[rank] += 1
            self.left[rank] = self._messages(rank)
        self.done += count


def _agree(calls: dict[int, Call]) -> None:
    kinds = {(call.kind, call.dtype) for call in calls.values()}
    assert len(kinds) == 1, f"members issue different calls: {calls}"
    for i, call in enumerate(calls.values()):
        for j, other in enumerate(calls.values()):
            assert call.sent[j] == other.received[i], f"members disagree on sizes: {calls}"

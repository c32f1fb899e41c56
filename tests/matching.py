"""Match the collectives of all ranks against each other, without one of them running.

Each rank's work runs alone, in a world of the fake backend, and every call that reaches torch's
process groups is written down: kind, group, what goes to and comes from each member, dtype. The
lists are then played against each other. Ranks wait for their group at their next call, so a call
completes when it is the next one of all members; what is left when nothing completes is a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import DebugLevel, get_debug_level, set_debug_level
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one rank: ``sent[i]`` elements go to member i of the group, ``received[i]`` come
    from it. Sends and receives that are issued together are one call."""

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
        self._fenced = 0

    def fence(self) -> None:
        """Sends and receives from here on are another call."""
        self._fenced = len(self.calls)

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
        if name == "_allgather_base_":
            out, given = args[:2]
            assert out.numel() == size * given.numel()
            amounts = ((given.numel(),) * size,) * 2
            self.calls.append(Call("all_gather", members, *amounts, given.dtype))
        elif name == "allreduce_":
            (value,) = args[0]
            amounts = ((value.numel(),) * size,) * 2
            self.calls.append(Call("all_reduce", members, *amounts, value.dtype))
        elif name == "alltoall_base_":
            received, given = args[:2]
            outs, ins = (tuple(splits) for splits in args[3:5])
            assert (sum(ins), sum(outs)) == (given.numel(), received.numel())
            assert given.dtype == received.dtype
            self.calls.append(Call("all_to_all", members, ins, outs, given.dtype))
        elif name in ("send", "recv_"):
            self._add_one(name, members, args)
        else:
            raise NotImplementedError(f"{name} cannot be matched")

    def _add_one(self, name: str, members: tuple[int, ...], args: tuple[Any, ...]) -> None:
        (value,), peer = args[0], args[2]
        last = self.calls[-1] if len(self.calls) > self._fenced else None
        zeros = (0,) * len(members)
        found = {"send": zeros, "recv_": zeros}
        # A second send to a peer, or receive from it, begins another call.
        if last and (last.kind, last.members, last.dtype) == ("p2p", members, value.dtype):
            before = {"send": last.sent, "recv_": last.received}
            if not before[name][peer]:
                found = before
                self.calls.pop()
        mine = found[name]
        found[name] = (*mine[:peer], value.numel(), *mine[peer + 1 :])
        self.calls.append(Call("p2p", members, found["send"], found["recv_"], value.dtype))


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


def traces(world: int, work: Callable[[int], Callable[[Recorder], object]]) -> list[list[Call]]:
    """The calls of each rank: ``work(rank)`` opens groups, and what it returns is written down,
    given the recorder."""
    found = []
    for rank in range(world):
        with fake_world(rank, world):
            run = work(rank)
            with Recorder() as recorder:
                run(recorder)
            found.append(recorder.calls)
    return found


def match(calls: list[list[Call]]) -> int:
    """Play the ranks against each other; how many calls of groups completed.

    Raises: AssertionError naming the ranks that wait, or the members that disagree.
    """
    place = [0] * len(calls)
    done = 0
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(calls):
            if place[rank] == len(mine):
                continue
            members = mine[place[rank]].members
            assert rank in members, f"rank {rank} calls the group {members}"
            ready = all(
                place[peer] < len(calls[peer]) and calls[peer][place[peer]].members == members
                for peer in members
            )
            if ready:
                _agree({peer: calls[peer][place[peer]] for peer in members})
                for peer in members:
                    place[peer] += 1
                done += 1
                moved = True
    waiting = {
        r: mine[at] for r, (mine, at) in enumerate(zip(calls, place, strict=True)) if mine[at:]
    }
    assert not waiting, f"deadlock: {waiting}"
    return done


def _agree(calls: dict[int, Call]) -> None:
    kinds = {(call.kind, call.dtype) for call in calls.values()}
    assert len(kinds) == 1, f"members issue different calls: {calls}"
    for i, call in enumerate(calls.values()):
        for j, other in enumerate(calls.values()):
            assert call.sent[j] == other.received[i], f"members disagree on sizes: {calls}"

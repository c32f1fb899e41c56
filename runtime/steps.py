"""The steps of a plan on one rank: bound to its groups once, run on fragments for each value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from colocc.errors import LayoutError
from colocc.passes.solve.boxes import Box
from colocc.passes.solve.plan import Holding, Step
from colocc.runtime.exchange import exchange, pack, share, unpack
from colocc.runtime.fragments import (
    Cut,
    Sizes,
    box_of,
    held,
    join,
    locate,
    moved,
    runs_of,
    shape_of,
)

Groups = Mapping[tuple[int, ...], dist.ProcessGroup]


class Direction:
    """One direction of a plan on this rank: the box that it has, the steps, the box that it wants.

    ``places`` says where each part of what the steps leave lies, there and in the box: (from, to).
    It is None where they leave the box as one fragment.
    """

    def __init__(
        self, steps: tuple[Step, ...], start: Holding, end: Holding, groups: Groups, rank: int
    ) -> None:
        self.has, self.wants = box_of(start, rank), box_of(end, rank)
        state = [self.has] if self.has[0] else []
        self.steps: list[Bound] = []
        for index, step in enumerate(steps):
            bound = _bind(step, state, partial(held, steps[:index], start), groups, rank)
            if bound is not None:
                self.steps.append(bound)
                state = bound.after
        self.places: list[tuple[Cut, Cut]] | None = None
        if state != [self.wants]:
            self.places = [
                (Cut(index, *_corner(run, box)), locate(run, [self.wants]))
                for index, box in enumerate(state)
                for run in runs_of(box)
            ]

    def run(
        self, fragments: list[torch.Tensor], sizes: Sizes, like: torch.Tensor
    ) -> list[torch.Tensor]:
        """The fragments after all steps; ``like`` is a tensor of their dtype and their other
        dims."""
        for step in self.steps:
            fragments = step(fragments, sizes, like)
        return fragments


def _corner(run: Box, box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = locate(run, [box])
    return found.starts, found.lengths


class Bound(Protocol):
    """A step with this rank's group; it turns fragments into those of the boxes ``after``."""

    after: list[Box]
    members: tuple[int, ...]

    def __call__(
        self, fragments: list[torch.Tensor], sizes: Sizes, like: torch.Tensor
    ) -> list[torch.Tensor]: ...


def _bind(
    step: Step, state: list[Box], holds: Callable[[int], list[Box]], groups: Groups, rank: int
) -> Bound | None:
    """``step`` on this rank; None where it leaves the rank as it is. ``holds`` gives what a peer
    holds before it."""
    members = step.group_of(rank) or ()
    group = groups[members] if members else None
    if group is not None:
        # new_group sorts its ranks: positions come from the group itself.
        order = dist.get_process_group_ranks(group)
        if tuple(order) != members:
            raise LayoutError(f"group {order} does not ascend like the plan's {members}")
    if step.kind in ("all_gather", "all_reduce"):
        if group is None:
            return None
        if step.kind == "all_reduce":
            return _Reduce(state, members, group)
        return _Gather([box for member in members for box in holds(member)], members, group)
    return _Exchange(step, state, members, group, rank)


class _Gather:
    def __init__(
        self, boxes: list[Box], members: tuple[int, ...], group: dist.ProcessGroup
    ) -> None:
        self.members, self.group = members, group
        joined = join(boxes)
        self.after = boxes if joined is None else [joined]

    def __call__(
        self, fragments: list[torch.Tensor], sizes: Sizes, like: torch.Tensor
    ) -> list[torch.Tensor]:
        given = pack(fragments, like)
        gathered = given.new_empty(len(self.members) * given.numel())
        dist.all_gather_into_tensor(gathered, given, group=self.group)
        rest = like.shape[len(sizes) :]
        return unpack(gathered, [shape_of(box, sizes, rest) for box in self.after])


class _Reduce:
    def __init__(
        self, boxes: list[Box], members: tuple[int, ...], group: dist.ProcessGroup
    ) -> None:
        self.after, self.members, self.group = boxes, members, group

    def __call__(
        self, fragments: list[torch.Tensor], sizes: Sizes, like: torch.Tensor
    ) -> list[torch.Tensor]:
        total = pack(fragments, like)
        if any(share(total, fragment) for fragment in fragments):
            total = total.clone()
        dist.all_reduce(total, group=self.group)
        return unpack(total, [fragment.shape for fragment in fragments])


class _Exchange:
    """A narrow, an all_to_all or a send_recv: each rank ends with the pieces that are moved to it.

    Its own pieces stay where they are, as views, unless all that arrives lies in memory as one box:
    then they go through the collective's buffer, which becomes the fragment.
    """

    def __init__(
        self,
        step: Step,
        state: list[Box],
        members: tuple[int, ...],
        group: dist.ProcessGroup | None,
        rank: int,
    ) -> None:
        self.kind, self.members, self.group = step.kind, members, group
        arriving = step.moves.of(dst=rank)
        pieces = moved(arriving)
        joined = None if group is None or step.adds else join(pieces)
        away = arriving.src != rank
        if joined is not None and not away.all() and step.kind == "send_recv":
            joined = None
        stays = [False] * len(pieces) if joined is not None else [not far for far in away.tolist()]
        self.own = [locate(p, state) for p, stay in zip(pieces, stays, strict=True) if stay]
        self.before = sum(src < rank for src in arriving.src.tolist())
        self.arrive = [p for p, stay in zip(pieces, stays, strict=True) if not stay]
        self.outgoing: list[list[Cut] | None] = []
        self.incoming: list[list[Box] | None] = []
        leaving = step.moves.of(src=rank)
        for peer in members:
            skip = peer == rank and joined is None
            sent = [] if skip else moved(leaving.of(dst=peer))
            got = [] if skip else moved(arriving.of(src=peer))
            self.outgoing.append([locate(piece, state) for piece in sent] or None)
            self.incoming.append(got or None)
        self.arrive = self.arrive if joined is None else [joined]
        self.after = [joined] if joined is not None else list(dict.fromkeys(pieces))
        self.sums = [[i for i, p in enumerate(pieces) if p == box] for box in self.after]
        self.adds = step.adds

    def __call__(
        self, fragments: list[torch.Tensor], sizes: Sizes, like: torch.Tensor
    ) -> list[torch.Tensor]:
        found = self._receive(fragments, sizes, like)
        found[self.before : self.before] = [cut.of(fragments, sizes) for cut in self.own]
        return [_sum([found[i] for i in same]) for same in self.sums] if self.adds else found

    def _receive(
        self, fragments: list[torch.Tensor], sizes: Sizes, like: torch.Tensor
    ) -> list[torch.Tensor]:
        if self.group is None:
            return []
        rest = like.shape[len(sizes) :]

        def elements(boxes: list[Box]) -> int:
            return sum(torch.Size(shape_of(box, sizes, rest)).numel() for box in boxes)

        flat = exchange(
            [None if cuts is None else [c.of(fragments, sizes) for c in cuts]
             for cuts in self.outgoing],
            [None if boxes is None else elements(boxes) for boxes in self.incoming],
            group=self.group,
            kind="send_recv" if self.kind == "send_recv" else "all_to_all",
            like=like,
        )  # fmt: skip
        return unpack(flat, [shape_of(box, sizes, rest) for box in self.arrive])


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum of ``parts``, in their order; one alone as it is."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total

"""Reduce gradients beside the CUDA graph that makes them.

A graph is one launch: what waits for it waits for all of it. Events inside it are seen outside
while it runs (external: torch pull request 155372), so each group of DDP's buckets has one where
the last of its gradients is complete, and its reduction waits for that on a stream of its own.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from colocc.runtime import megatron

# Some milliseconds, in which a stream that does not wait is seen not to.
CYCLES = 5_000_000


class Marks:
    """The points of a captured backward of ``module`` at which groups of buckets are complete."""

    def __init__(self, module: nn.Module) -> None:
        groups = megatron.reductions(module)
        if groups and not sees_marks(torch.cuda.current_device()):
            groups = []
        self._of = {id(weight): group for group in groups for weight in megatron.weights_of(group)}
        self._left = {group: {id(w) for w in megatron.weights_of(group)} for group in groups}
        self._streams: dict[Any, torch.cuda.Stream] = {}
        self._events: dict[Any, torch.cuda.Event] = {}
        # Groups that no point is the end of. An event in a graph must live as long as the graph.
        self._endless: dict[Any, torch.cuda.Event | None] = {}

    def made(self, weight: nn.Parameter) -> None:
        """Mark this point of the graph that is being captured, if the gradient of ``weight`` was
        the last of its group.

        A backward inside the backward may add to a weight more than once, and a part of the module
        may run on a stream of its own: such a group has no mark.
        """
        group, stream = self._of.get(id(weight)), torch.cuda.current_stream()
        if group is None:
            return
        left = self._left[group]
        if id(weight) not in left or self._streams.setdefault(group, stream) != stream:
            self._endless[group] = self._events.pop(group, self._endless.get(group))
            return
        left.remove(id(weight))
        if not left and group not in self._endless:
            self._events[group] = torch.cuda.Event(external=True)
            self._events[group].record()

    def start(self, groups: Iterable[Any], reduce: Callable[[Any], None]) -> None:
        """Have each of ``groups`` reduced when the replay that was just launched is at its mark.

        They start in DDP's order, the same on all ranks: behind one that has no mark, none.
        """
        for group in groups:
            if group not in self._events:
                return
            beside = _beside(torch.cuda.current_device())
            beside.wait_event(self._events[group])
            with torch.cuda.stream(beside):
                reduce(group)


@functools.cache
def _beside(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def sees_marks(device: int) -> bool:
    """Whether a stream that waits for a mark waits for the last replay; if not, a warning says
    so, and gradients are reduced when all are complete.

    Waits for the device, as a capture does.
    """
    value, seen = torch.zeros(2, device=f"cuda:{device}").unbind()
    event, graph, beside = torch.cuda.Event(external=True), torch.cuda.CUDAGraph(), _beside(device)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.cuda._sleep(CYCLES)
        value.fill_(1.0)
        event.record()
    for _ in range(3):
        value.zero_()
        seen.zero_()
        torch.cuda.synchronize()
        # The wait is there before the graph begins, as it is where the host is ahead.
        torch.cuda._sleep(CYCLES)
        graph.replay()
        beside.wait_event(event)
        with torch.cuda.stream(beside):
            seen.copy_(value)
        torch.cuda.synchronize()
        if not seen:
            warnings.warn(
                "cuda_graphs: gradients are reduced after the last backward, not beside it: an "
                "event inside a graph is not seen outside",
                stacklevel=2,
            )
            return False
    return True

"""Two streams of a GPU: the pipeline's tasks go first, the encoders' run behind and beside them.

A stage's language tasks and its encoders' work are two lists, each in the order of the timeline.
The pipeline never waits for an encoder but for embeddings. An encoder's task begins behind the
language tasks that the timeline has before it: a low priority holds back no block of a kernel that
runs already, and work that began too early would slow what all other stages wait for. Once it has
begun, the GPU gives it what the pipeline leaves free: the rest of the bubble, and what small
kernels do not fill.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch


@functools.cache
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    low, high = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
    return torch.cuda.Stream(device, high), torch.cuda.Stream(device, low)


class Lanes:
    """The streams of one step; without a GPU, or if not ``apart``, there is one, the current."""

    def __init__(self, streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None) -> None:
        self._streams = streams
        if streams is not None:
            current = torch.cuda.current_stream()
            for stream in streams:
                stream.wait_stream(current)

    @staticmethod
    def streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
        """The pipeline's and the encoders' stream of the current GPU, the same for all programs, as
        each stream has memory and workspaces of its own; None without a GPU."""
        return _streams(torch.cuda.current_device()) if torch.cuda.is_available() else None

    def pipeline(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the pipeline's stream is the current one."""
        return self._on(0)

    def encoders(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the encoders' stream is the current one."""
        return self._on(1)

    def _on(self, which: int) -> contextlib.AbstractContextManager[object]:
        if self._streams is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._streams[which])

    def behind(self) -> None:
        """Have the encoders' stream wait for what the pipeline's has been given so far."""
        if self._streams is not None:
            pipeline, encoders = self._streams
            encoders.wait_stream(pipeline)

    def mark(self) -> torch.cuda.Event | None:
        """This point of the current stream."""
        return None if self._streams is None else torch.cuda.current_stream().record_event()

    @staticmethod
    def take(tensor: torch.Tensor, mark: torch.cuda.Event | None) -> torch.Tensor:
        """``tensor``, made on the other stream before ``mark``, for use on the current one."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)
            tensor.record_stream(torch.cuda.current_stream())
        return tensor

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """What runs inside on the streams is done for what comes after on the current one."""
        try:
            yield
        finally:
            for stream in self._streams or ():
                torch.cuda.current_stream().wait_stream(stream)

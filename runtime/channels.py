"""Messages between pairs of ranks, in one direction and in order; a send never waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist


class Arrival:
    """A message on its way."""

    def __init__(self, work: dist.Work, found: torch.Tensor, buffer: torch.Tensor) -> None:
        self._work, self._found, self._buffer = work, found, buffer

    def wait(self) -> None:
        """Return when the buffer holds the message; on a GPU, its stream waits instead."""
        self._work.wait()
        if self._found is not self._buffer:
            self._buffer.copy_(self._found)


class Channel:
    """Process groups for messages of one kind.

    On a GPU all messages between two ranks in one group are one queue, in which a message that
    waits for its peer holds up those behind it: were there some of both directions in it, each end
    could wait for the other. So ``groups`` has one for messages to higher ranks and one for those
    to lower, None where there are none.

    A message on a GPU is a kernel that spins until its peer's runs. CUDA may wait for it when it
    loads a kernel, or takes memory, that the peer depends on, and never return. So where
    ``careful``, until all kernels of a step are loaded and its memory is there, messages go through
    ``host``, a gloo group, as ``tag``.
    """

    def __init__(
        self,
        groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None],
        host: dist.ProcessGroup | None = None,
        tag: int = 0,
    ) -> None:
        self.groups, self.host, self.tag = groups, host, tag
        self.careful = False
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def connect(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Open the connection of each (sender, receiver); all ranks give the same pairs.

        The first message of a pair waits for both of its ranks, which later ones must not.
        """
        device, rank = torch.cuda.current_device(), dist.get_rank()
        for sender, receiver in pairs:
            probe = torch.zeros(1, device=device)
            if rank == sender:
                dist.send(probe, receiver, group=self._group(sender, receiver))
            elif rank == receiver:
                dist.recv(probe, sender, group=self._group(sender, receiver))

    def _group(self, sender: int, receiver: int) -> dist.ProcessGroup:
        group = self.groups[receiver < sender]
        assert group is not None
        return group

    def send(self, tensor: torch.Tensor, receiver: int) -> None:
        """Hand over ``tensor``, which must not change until it is sent; it is kept as long."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        # A tensor of its own: the caller may empty the one that it holds.
        kept = tensor.detach().contiguous()
        if self._by_host():
            kept = kept.cpu()
            work = dist.isend(kept, receiver, group=self.host, tag=self.tag)
        else:
            work = dist.isend(kept, receiver, group=self._group(dist.get_rank(), receiver))
        assert work is not None
        self._sent.append((work, kept))

    def receive(self, buffer: torch.Tensor, sender: int) -> Arrival:
        """Ask for the next message of ``sender``; ``buffer`` holds it after ``wait()``."""
        if self._by_host():
            found = torch.empty_like(buffer, device="cpu")
            work = dist.irecv(found, sender, group=self.host, tag=self.tag)
        else:
            found = buffer
            work = dist.irecv(buffer, sender, group=self._group(sender, dist.get_rank()))
        assert work is not None
        return Arrival(work, found, buffer)

    def _by_host(self) -> bool:
        return self.careful and self.host is not None

    def flush(self) -> None:
        """Wait for all sends; on a GPU, its stream does."""
        while self._sent:
            self._sent.popleft()[0].wait()

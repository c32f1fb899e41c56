"""Messages between pairs of ranks, in one direction and in order; a send never waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist


class Channel:
    """A process group for sends of one kind.

    Sends and receives between two ranks share a stream on a GPU: one kind of message in one
    direction a group, or they wait for each other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def connect(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Open the connection of each (sender, receiver); all ranks give the same pairs.

        The first message of a pair waits for both of its ranks, which later ones must not.
        """
        device = torch.cuda.current_device()
        for sender, receiver in pairs:
            probe = torch.zeros(1, device=device)
            if dist.get_rank() == sender:
                dist.send(probe, receiver, group=self.group)
            elif dist.get_rank() == receiver:
                dist.recv(probe, sender, group=self.group)

    def send(self, tensor: torch.Tensor, receiver: int) -> None:
        """Hand over ``tensor``, which must not change until it is sent; it is kept as long."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        # A tensor of its own: the caller may empty the one that it holds.
        kept = tensor.detach().contiguous()
        work = dist.isend(kept, receiver, group=self.group)
        assert work is not None
        self._sent.append((work, kept))

    def receive(self, buffer: torch.Tensor, sender: int) -> dist.Work:
        """Ask for the next message of ``sender``; ``buffer`` holds it after ``wait()``."""
        work = dist.irecv(buffer, sender, group=self.group)
        assert work is not None
        return work

    def flush(self) -> None:
        """Wait for all sends; on a GPU, its stream does."""
        while self._sent:
            self._sent.popleft()[0].wait()

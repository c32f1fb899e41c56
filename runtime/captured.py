"""All calls of encoders that are to run as CUDA graphs, in one step of a program."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from colocc.runtime.cuda_graphs import CapturedModule


class Captured(dict[str, CapturedModule]):
    """The captured modules of a program, by the names of their nodes in the order of the graph."""

    def names(self) -> list[str]:
        """The encoders among them, in the order of their backwards, also those that run without."""
        return list(dict.fromkeys(call.name for call in reversed(self.values())))

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Inside, nobody moves or freezes the weights of an encoder, or changes how it runs."""
        with contextlib.ExitStack() as stack:
            for call in self.values():
                stack.enter_context(call.steady())
            yield

    @contextlib.contextmanager
    def last_backward(
        self, trainable: Mapping[str, nn.Module], *, force_all_reduce: bool
    ) -> Iterator[None]:
        """Inside, backward is the last of the step through these, which start to reduce the
        gradients of the ``trainable`` among them where they are complete."""
        calls, order = Counter(call.name for call in self.values()), self.names()
        with contextlib.ExitStack() as stack:
            for call in self.values():
                # Of two calls, neither knows when the other has made its part.
                if calls[call.name] > 1:
                    continue
                # Modules may share a communicator, and on a peer one of them may run without.
                first = order[: order.index(call.name)]
                behind = [trainable[name] for name in first if name in trainable]
                stack.enter_context(call.last_backward(behind, force_all_reduce=force_all_reduce))
            yield

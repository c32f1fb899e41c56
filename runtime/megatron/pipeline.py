"""Megatron's pipeline communication with work between the tasks of its schedule.

Megatron's 1F1B asks its communicator for the input of every language task, with exactly one call
before each: call number k comes before task k of ``passes.timeline.one_f_one_b``. So this
communicator hands on what is to be sent, runs what is to be done before task k, sends among it, and
waits for the input only then. The input may have been asked for before, while an earlier task was
the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, is_single_shape

from colocc.errors import LayoutError
from colocc.passes.timeline import LANGUAGE, Kind
from colocc.runtime.channels import Arrival, Channel


class Between(Protocol):
    """What runs between the language tasks of this stage."""

    def before(self, place: int, ask: Callable[[Kind], object]) -> None:
        """Run what comes before language task number ``place`` of this stage. ``ask`` asks for the
        input of the next language task of a kind."""

    def hand_on(self, kind: Kind, channel: Channel, tensor: torch.Tensor, receiver: int) -> None:
        """What the next language task of ``kind`` hands on through ``channel``."""


class FilledCommunicator(P2PCommunicator):
    """P2PCommunicator of one pipeline; ``onward`` carries hidden states, ``back`` gradients."""

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: Any,
        onward: Channel,
        back: Channel,
        between: Between,
    ) -> None:
        super().__init__(pp_group, config)
        if config.variable_seq_lengths:
            raise LayoutError(
                "schedule 'filled' needs hidden states of one shape: variable_seq_lengths is set. "
                "Write schedule='three_phase'."
            )
        self.onward, self.back, self.between = onward, back, between
        self._place = 0
        self._shape: Any = None
        self._asked: dict[Kind, deque[tuple[torch.Tensor, Arrival]]] = {
            kind: deque() for kind in LANGUAGE
        }

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> Any:
        """The input of a forward."""
        return self._next(tensor_shapes, None if is_first_stage else "forward")

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> Any:
        """The input of a backward."""
        return self._next(tensor_shapes, None if is_last_stage else "backward")

    def send_forward(self, output_tensors: Any, is_last_stage: bool) -> None:
        """Hand the output of a forward to the next stage."""
        if not is_last_stage:
            self.between.hand_on("forward", self.onward, _only(output_tensors), self.next_rank)

    def send_backward(self, input_tensor_grads: Any, is_first_stage: bool) -> None:
        """Hand the output of a backward to the stage before."""
        if not is_first_stage:
            self.between.hand_on("backward", self.back, _only(input_tensor_grads), self.prev_rank)

    def send_forward_recv_backward(
        self, output_tensors: Any, tensor_shapes: Any, is_last_stage: bool
    ) -> Any:
        """Both."""
        self.send_forward(output_tensors, is_last_stage)
        return self.recv_backward(tensor_shapes, is_last_stage)

    def send_backward_recv_forward(
        self, input_tensor_grads: Any, tensor_shapes: Any, is_first_stage: bool
    ) -> Any:
        """Both."""
        self.send_backward(input_tensor_grads, is_first_stage)
        return self.recv_forward(tensor_shapes, is_first_stage)

    def _next(self, shapes: Any, kind: Kind | None) -> Any:
        """The input of the next language task, of ``kind`` if it comes from a peer."""
        single = is_single_shape(shapes)
        self._shape = shapes if single else _only(shapes)
        self.between.before(self._place, self.ask)
        self._place += 1
        if kind is None:
            return None if single else [None]
        if not self._asked[kind]:
            self.ask(kind)
        buffer, arrival = self._asked[kind].popleft()
        arrival.wait()
        buffer.requires_grad_()
        return buffer if single else [buffer]

    def ask(self, kind: Kind) -> None:
        """Ask for the input of the first language task of ``kind`` whose input was not asked
        for."""
        channel, sender = (
            (self.onward, self.prev_rank) if kind == "forward" else (self.back, self.next_rank)
        )
        assert self._shape is not None
        buffer = torch.empty(
            self._shape, device=torch.cuda.current_device(), dtype=self.config.pipeline_dtype
        )
        self._asked[kind].append((buffer, channel.receive(buffer, sender)))


def _only(found: Any) -> Any:
    """The one tensor, or shape, that a stage hands on."""
    if not isinstance(found, list):
        return found
    if len(found) != 1:
        raise LayoutError(f"schedule 'filled' hands one tensor from stage to stage, not {found}")
    return found[0]

"""A process group of one rank that opens no communicator.

An axis of size one still needs a group object, because Megatron asks for its size and runs
collectives over it. Every collective over one rank is a copy, so this backend copies and returns.
"""

# mypy: disable-error-code="override"
# torch overloads each collective for callers; a backend gets one form.

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import Work
from torch.futures import Future

BACKEND = "colocc_lone"
Tensors = list[torch.Tensor]


def _done(result: Any) -> Work:
    future: Future[Any] = Future()
    future.set_result(result)
    work: Work = c10d._create_work_from_future(future)  # type: ignore[attr-defined]
    return work


def _copy(outputs: Tensors, inputs: Tensors) -> Work:
    with torch.no_grad():
        for output, source in zip(outputs, inputs, strict=True):
            output.copy_(source.view(output.shape))
    return _done(outputs)


class LoneGroup(dist.ProcessGroup):
    """All collectives of torch.distributed for a world of one; sending to oneself is refused."""

    _known_as = ""
    # Nothing is opened ahead for a device that torch is bound to (device_id), nor split from it.
    supports_splitting = False

    def _get_backend(self, device: torch.device) -> LoneGroup:
        """The backend of every device: this group is its own."""
        return self

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return BACKEND

    @property
    def pg_name(self) -> str:
        return self._known_as

    @property
    def group_name(self) -> str:
        return self.pg_name

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Work:
        return _done(tensors)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Work:
        return _done(tensors)

    def reduce(self, tensors: Tensors, opts: Any = None) -> Work:
        return _done(tensors)

    def broadcast(self, tensors: Tensors, opts: Any = None) -> Work:
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Work:
        return _done([])

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        return _copy([output for (output,) in outputs], inputs)

    def allgather_coalesced(
        self, outputs: list[Tensors], inputs: Tensors, opts: Any = None
    ) -> Work:
        return _copy(outputs[0], inputs)

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        return self.allgather(outputs, inputs)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> Work:
        return _copy(outputs, [source for (source,) in inputs])

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> Work:
        return self.scatter(outputs, inputs)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        return _copy(outputs, inputs)

    def alltoall_base(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: list[int] | None,
        input_splits: list[int] | None,
        opts: Any = None,
    ) -> Work:
        return _copy([output], [source])

    def _allgather_base(self, output: torch.Tensor, source: torch.Tensor, opts: Any = None) -> Work:
        return _copy([output], [source])

    def _reduce_scatter_base(
        self, output: torch.Tensor, source: torch.Tensor, opts: Any = None
    ) -> Work:
        return _copy([output], [source])

    def allgather_into_tensor_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Work:
        return _copy(outputs, inputs)

    def reduce_scatter_tensor_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Work:
        return _copy(outputs, inputs)

    def _start_coalescing(self, device: torch.device) -> None:
        """Nothing is put off: each collective is done when its call returns."""

    def _end_coalescing(self, device: torch.device) -> Work:
        return _done([])


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> LoneGroup:
    if size != 1:
        raise ValueError(f"{BACKEND} is a backend for one rank, not for {size}")
    return LoneGroup(rank, size)  # type: ignore[call-arg]


def open_lone(timeout: timedelta) -> dist.ProcessGroup:
    """The group of this rank alone. Only this rank takes part in opening it."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    group = dist.new_group(
        [dist.get_rank()], timeout=timeout, backend=BACKEND, use_local_synchronization=True
    )
    assert isinstance(group, LoneGroup)
    # Destroying a group asks for its name after the world has forgotten it.
    group._known_as = str(dist.distributed_c10d._world.pg_names[group])
    return group

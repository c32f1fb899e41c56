"""What carries the collectives of this process."""

from __future__ import annotations

import torch.distributed as dist


def uses_nccl() -> bool:
    """Whether the default group's tensors are a GPU's, and its collectives NCCL's.

    ``get_backend`` knows no name where init_process_group was given none.
    """
    return "nccl" in dist.get_backend_config()


def may_close(error: type[BaseException] | None) -> bool:
    """Whether groups can be closed now without waiting for a peer.

    After an ``error`` of this rank a peer may still be inside a collective. NCCL would wait for it
    and nobody would see the error; the end of the process aborts its communicators instead.
    """
    return error is None or not (dist.is_initialized() and uses_nccl())

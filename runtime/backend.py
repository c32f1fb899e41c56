"""What carries the collectives of this process."""

from __future__ import annotations

import torch.distributed as dist


def uses_nccl() -> bool:
    """Whether the default group's tensors are a GPU's, and its collectives NCCL's.

    ``get_backend`` knows no name where init_process_group was given none.
    """
    return "nccl" in dist.get_backend_config()

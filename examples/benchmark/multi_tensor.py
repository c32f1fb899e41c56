"""Gradient norm and clipping in a few kernels where Transformer Engine and Apex are missing.

Megatron's own stand-ins launch kernels for every parameter, and wait for the GPU as often: on the
models of the benchmark that is a large part of a step, in all arms alike. What everyone trains with
does not.
"""

from typing import Any

import torch
from megatron.core.optimizer import clip_grads

Tensors = list[torch.Tensor]


def l2_norm(chunk: int, noop: Any, lists: list[Tensors], per_tensor: bool) -> tuple[Any, None]:
    """The norm of all tensors of the first list, as a tensor of one element."""
    norms = torch._foreach_norm(lists[0])
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


def scale(chunk: int, noop: Any, lists: list[Tensors], factor: float) -> None:
    """Write the tensors of the first list times ``factor`` into those of the second."""
    torch._foreach_copy_(lists[1], torch._foreach_mul(lists[0], factor))


def use_multi_tensor() -> None:
    """Give them to Megatron, unless it has a library's."""
    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":
        clip_grads.l2_norm_impl = l2_norm
        clip_grads.multi_tensor_scale_impl = scale

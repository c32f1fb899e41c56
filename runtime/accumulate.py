"""Add a gradient in 16 bits to one in 32 bits at the speed of the GPU's memory.

torch adds tensors of two dtypes one element at a time, at half of that speed: a tenth of the
backward of an encoder of billions of weights.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

HALVES = (torch.bfloat16, torch.float16)


def accumulate(total: torch.Tensor, part: torch.Tensor, *, dry: bool = False) -> None:
    """Add ``part`` to ``total``, as ``total.add_(part)`` does, to the bit.

    ``dry``: add nothing, but load what would run, which no capture of a CUDA graph may see.
    """
    mixed = total.dtype == torch.float32 and part.dtype in HALVES
    flat = total.is_contiguous() and part.is_contiguous() and total.shape == part.shape
    if mixed and flat and total.is_cuda and part.is_cuda and _has_kernel(total.device):
        from colocc.runtime import accumulate_kernel

        accumulate_kernel.launch(total, part, total.numel(), dry=dry)
    elif not dry:
        total.add_(part)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """Whether Triton, where it is installed, can build its kernel here; if not, a warning says
    why."""
    if importlib.util.find_spec("triton") is None:
        return False
    from colocc.runtime import accumulate_kernel

    try:
        total = torch.ones(5, device=device)
        accumulate_kernel.launch(total, total.bfloat16(), 3)
        if total.tolist() != [2.0, 2.0, 2.0, 1.0, 1.0]:
            raise RuntimeError(f"1 + 1 three times of five is {total.tolist()}")
    except Exception as problem:  # noqa: BLE001 - said in the warning; torch then adds
        warnings.warn(
            f"gradients are added by torch, at half the speed: Triton has no kernel for "
            f"{torch.cuda.get_device_name(device)}: {type(problem).__name__}: {problem}",
            stacklevel=2,
        )
        return False
    return True

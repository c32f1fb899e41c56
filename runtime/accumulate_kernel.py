"""The kernel of accumulate.py; imported where Triton is."""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit(do_not_specialize=["size"])  # type: ignore[untyped-decorator]
def _add(total, part, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    # Whole blocks without a mask, which would keep loads from being wide.
    if first + BLOCK <= size:
        tl.store(total + at, tl.load(total + at) + tl.load(part + at).to(tl.float32))
    else:
        inside = at < size
        found = tl.load(total + at, mask=inside) + tl.load(part + at, mask=inside).to(tl.float32)
        tl.store(total + at, found, mask=inside)


def launch(total: torch.Tensor, part: torch.Tensor, size: int, *, dry: bool = False) -> None:
    """Add the first ``size`` elements of ``part`` to those of ``total``, on the current stream; if
    ``dry`` none, by the same kernel."""
    if dry:
        # Triton has a kernel for sizes of 32 bits and one for 64.
        size = -size
    with torch.cuda.device(total.device):
        _add[(max(1, triton.cdiv(size, BLOCK)),)](total, part, size, BLOCK=BLOCK, num_warps=8)

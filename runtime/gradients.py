"""Finalise gradients once, after the encoders' backward: reduce each module, divide by one token
count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colocc.runtime import megatron

if TYPE_CHECKING:
    from colocc.program import Program


def finalize(program: Program, tokens: torch.Tensor | None, *, force_all_reduce: bool) -> None:
    """Reduce every trainable module's gradients over its own groups and divide by the global
    tokens.

    ``tokens`` is this rank's token count with per-token loss, None with mean losses. The count is
    summed over the language module's replicas once, and divides every module. That encoders and
    language module reduce over different dp sizes is already made up for where the gradient crosses
    (``plan.scale``).
    """
    divisor = None
    if tokens is not None:
        total = megatron.global_tokens(tokens, program.collection(program.graph.sink))
        divisor = 1.0 / torch.clamp(total, min=1)
    for name, module in program.trainable().items():
        megatron.finish_gradients(
            module, program.collection(name), force_all_reduce=force_all_reduce
        )
        if divisor is not None:
            megatron.scale_gradients(module, divisor)

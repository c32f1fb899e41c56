"""Core attention on torch's scaled_dot_product_attention, where Transformer Engine is missing."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SdpaAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention and CrossAttention; runs on CPUs and GPUs.

    Shapes: query [s, b, heads, d], key and value [t, b, groups, d], heads a multiple of groups;
    returns [s, b, heads * d]. A mask is Megatron's: True where a position must not be seen,
    broadcast to [b, heads, s, t]. A causal mask lets the last query see the last key.
    Raises: NotImplementedError for packed sequences, an attention bias, or
    apply_query_key_layer_scaling.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if config.apply_query_key_layer_scaling:
            raise NotImplementedError("SdpaAttention wants apply_query_key_layer_scaling=False")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> torch.Tensor:
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("SdpaAttention takes neither packed sequences nor a bias")
        length, batch, heads, width = query.shape
        kind = attn_mask_type or self.attn_mask_type
        mask = None if kind is AttnMaskType.no_mask else attention_mask
        # torch's is_causal excludes a mask, and lets the first query see the first key alone.
        plain_causal = kind in _CAUSAL and mask is None and length == key.shape[0]
        allowed = None if plain_causal else _allowed(kind, mask, length, key)
        dropout = self.dropout if self.training else 0.0
        with self._random_states(dropout):
            out = functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=plain_causal,
                scale=self.softmax_scale,
                enable_gqa=key.shape[2] != heads,
            )
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * width)

    def _random_states(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        """Tensor-parallel ranks hold different heads, so they drop with different states."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        fork: contextlib.AbstractContextManager[Any] = get_cuda_rng_tracker().fork()
        return fork


def _allowed(
    kind: AttnMaskType, mask: torch.Tensor | None, length: int, key: torch.Tensor
) -> torch.Tensor | None:
    """torch's mask, True where a position may be seen; None where all may."""
    allowed = None if mask is None else ~mask
    if kind not in _CAUSAL:
        return allowed
    square = torch.ones(length, key.shape[0], dtype=torch.bool, device=key.device)
    causal = square.tril(key.shape[0] - length)
    return causal if allowed is None else allowed & causal

"""Core attention on torch's scaled_dot_product_attention, for Megatron models without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional


class SdpaAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention and CrossAttention; runs on CPUs and GPUs.

    Shapes: query [s, b, heads, d], key and value [t, b, groups, d] with heads a multiple of groups;
    returns [s, b, heads * d]. A mask is Megatron's: True where a position must not be seen, broadcast
    to [b, heads, s, t]. Causal masking follows ``attn_mask_type``.
    Raises: NotImplementedError for packed sequences, an attention bias, or a softmax scale per layer.
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
            raise NotImplementedError("SdpaAttention has no apply_query_key_layer_scaling: set it False")

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
        causal = kind in (AttnMaskType.causal, AttnMaskType.padding_causal)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        allowed = None
        if attention_mask is not None and kind is not AttnMaskType.no_mask:
            # torch's mask is True where Megatron's is False, and excludes is_causal.
            allowed = ~attention_mask
            if causal:
                square = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
                allowed, causal = allowed & square.tril(key.shape[2] - length), False
        out = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != heads,
        )
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * width)

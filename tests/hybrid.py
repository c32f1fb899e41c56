"""Megatron's HybridModel on CPU ranks: its own model, stack and layers, and two stand-ins.

MambaMixer needs CUDA kernels, so ``Mixer`` computes a selective scan in plain torch; HybridStack's
last norm needs Transformer Engine, so ``Stack`` brings torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu, softplus

STATE, CHANNELS, MIXER_HEADS, TAPS = 4, 4, 8, 3
PATTERNS = {1: "M*M-", 2: "M*|M-"}
"""Mamba, attention, Mamba, MLP; by the number of pipeline stages."""


class Mixer(MegatronModule):
    """A selective scan over the sequence, heads split over tp; what MambaMixer computes, with a
    group for each head and the parts of ``in_proj`` side by side in each."""

    def __init__(
        self,
        config: TransformerConfig,
        d_model: int,
        layer_number: int,
        pg_collection: Any,
        pp_layer_offset: int,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.heads = MIXER_HEADS // pg_collection.tp.size()
        self.widths = [CHANNELS, CHANNELS + 2 * STATE, 1]
        linear: Mapping[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "tp_group": pg_collection.tp,
        }
        self.in_proj = ColumnParallelLinear(
            d_model, MIXER_HEADS * sum(self.widths), gather_output=False, **linear
        )
        self.out_proj = RowParallelLinear(
            MIXER_HEADS * CHANNELS, d_model, input_is_parallel=True, skip_bias_add=True, **linear
        )
        self.taps = self._of_heads(self.widths[1] * TAPS)
        self.dt_bias, self.decay, self.skip = (self._of_heads(1) for _ in range(3))

    def _of_heads(self, width: int) -> nn.Parameter:
        made: Any = nn.Parameter(torch.empty(self.heads, width, dtype=self.config.params_dtype))
        made.tensor_model_parallel, made.partition_dim = True, 0
        found: nn.Parameter = made
        return found

    def forward(
        self, hidden_states: Tensor, inference_context: None = None, packed_seq_params: None = None
    ) -> tuple[Tensor, None]:
        """Shape: [s, b, h] to [s, b, h]."""
        packed = self.in_proj(hidden_states)[0]
        packed = packed.unflatten(2, (self.heads, sum(self.widths)))
        gate, mixed, dt = packed.split(self.widths, dim=3)
        value, key, query = self._convolved(mixed).split([CHANNELS, STATE, STATE], dim=3)
        dt = softplus(dt + self.dt_bias)
        keep = torch.exp(-torch.exp(self.decay) * dt).unsqueeze(4)
        added = (dt * value).unsqueeze(4) * key.unsqueeze(3)
        state, found = torch.zeros_like(added[0]), []
        for step in range(len(added)):
            state = keep[step] * state + added[step]
            found.append((state * query[step].unsqueeze(2)).sum(dim=3))
        made = (torch.stack(found) + self.skip * value) * silu(gate)
        return self.out_proj(made.flatten(2))[0], None

    def _convolved(self, mixed: Tensor) -> Tensor:
        """Each channel of each head convolved with its taps over the positions up to its own."""
        flat = pad(mixed.flatten(2).permute(1, 2, 0), (TAPS - 1, 0))
        taps = self.taps.view(-1, 1, TAPS)
        found = silu(conv1d(flat, taps, groups=flat.shape[1]))
        return found.permute(2, 0, 1).reshape(mixed.shape)


class Stack(HybridStack):
    """HybridStack with torch's norm behind its last layer."""

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, post_layer_norm=False, **options)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = WrappedTorchNorm(config, config.hidden_size)


def stack_spec(layer: TransformerLayerSubmodules) -> ModuleSpec:
    """Mamba, attention and MLP layers from the parts of ``layer``, a transformer layer's."""
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda
    )
    mamba = MambaLayerSubmodules(
        norm=layer.input_layernorm, mixer=ModuleSpec(module=Mixer), mamba_bda=get_bias_dropout_add
    )
    return ModuleSpec(
        module=Stack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def language_spec(
    layer: TransformerLayerSubmodules, stages: int, common: Mapping[str, Any]
) -> ModuleSpec:
    """HybridModel of four layers; ``common`` is what it shares with GPTModel."""
    params = {
        **common,
        "hybrid_stack_spec": stack_spec(layer),
        "hybrid_layer_pattern": PATTERNS[stages],
    }
    return ModuleSpec(module=HybridModel, params=params)

"""A small MimoModel of megatron-core's own layers, for any layouts, and batches for it."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from colocc.layout import Layout
from colocc.runtime.attention import SdpaAttention
from colocc.testing import seed_parameters
from tests import hybrid

HIDDEN, HEADS, ENCODER_HIDDEN, VOCABULARY = 32, 8, 16, 64
LENGTH, ROWS, FEATURES = 12, 3, 6


class Encoder(MegatronModule):
    """A projection in, Megatron's TransformerBlock, a projection out: [b, s, 6] -> [b, s,
    width]."""

    def __init__(self, config: TransformerConfig, groups: Any, width: int = HIDDEN) -> None:
        super().__init__(config)
        self.inward = torch.nn.Linear(FEATURES, ENCODER_HIDDEN, dtype=config.params_dtype)
        self.trunk = TransformerBlock(
            config, layer_spec(AttnMaskType.no_mask), pg_collection=groups
        )
        self.outward = torch.nn.Linear(ENCODER_HIDDEN, width, dtype=config.params_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(self.inward(x).transpose(0, 1).contiguous(), None)
        out: torch.Tensor = self.outward(hidden).transpose(0, 1).contiguous()
        return out


class SequenceParallelNorm(torch.nn.LayerNorm):
    """A layer norm over this tp rank's part of the sequence; Megatron's torch norm refuses to be
    one."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        for weight in self.parameters():
            weight.sequence_parallel = True  # type: ignore[attr-defined]


def sequence_parallel_block(
    layout: Layout, layers: int, experts: int | None = None
) -> TransformerBlockSubmodules:
    spec = layer_spec(AttnMaskType.causal, experts)
    spec.submodules.input_layernorm = SequenceParallelNorm
    spec.submodules.pre_mlp_layernorm = SequenceParallelNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * (layers // layout.pp), layer_norm=SequenceParallelNorm
    )


def layer_spec(mask: AttnMaskType, experts: int | None = None) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(num_experts=experts)
    spec.submodules.self_attention.params = {"attn_mask_type": mask}
    spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    return spec


def projector_spec(layout: Layout, groups: Any) -> ModuleSpec:
    """Megatron's projector from an encoder's width to the language model's, on an encoder's
    layout."""
    config = config_of(replace(layout, cp=1, ep=1), 1, HIDDEN)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    params = {
        "config": config,
        "submodules": submodules,
        "projector_type": "mlp",
        "input_size": ENCODER_HIDDEN,
        "tp_group": groups.tp,
    }
    return ModuleSpec(module=MultimodalProjector, params=params)


def config_of(layout: Layout, layers: int, hidden: int, **options: Any) -> TransformerConfig:
    dtype = torch.get_default_dtype()
    return TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=HEADS,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **options,
    )


def mixture_of(experts: int, layout: Layout) -> dict[str, Any]:
    """Two of ``experts`` for each token, and a loss that keeps their loads alike."""
    return {
        "add_bias_linear": False,
        "num_moe_experts": experts,
        "expert_model_parallel_size": layout.ep,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_token_dispatcher_type": "allgather",
    }


def build(
    groups: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    *,
    tied: bool = False,
    per_token: bool = True,
    sequence_parallel: bool = False,
    frozen: tuple[str, ...] = (),
    distributed_optimizer: bool = False,
    overlap: bool = False,
    bucket_size: int | None = None,
    gather: bool = False,
    recompute: bool = False,
    is_hybrid: bool = False,
    projector: bool = False,
    experts: int | None = None,
    layers: int | None = None,
    wrap: bool = True,
    length: int = LENGTH,
    positions: str = "learned_absolute",
    seed: int = 0,
) -> MimoModel:
    """The model on this rank, seeded alike for every layout; trainable modules in Megatron's DDP.

    The language module has two ``layers``, or one for each of more stages.
    An encoder whose layout has cp computes whole items on each cp rank, as MimoModel feeds it.
    """
    language, pg = layouts["language"], groups["language"]
    layers = layers or max(2, language.pp)
    per = {"calculate_per_token_loss": per_token}
    configs = {
        name: config_of(replace(layout, cp=1, ep=1), 2, ENCODER_HIDDEN, **per)
        for name, layout in layouts.items()
    }
    mixture = {} if experts is None else mixture_of(experts, language)
    configs["language"] = config_of(
        language, layers, HIDDEN, sequence_parallel=sequence_parallel, **per, **mixture
    )
    if positions == "mrope":
        configs["language"].mrope_section = [1, 0, 1]
    if sequence_parallel or recompute:
        model_parallel_cuda_manual_seed(seed, tp_rank=pg.tp.rank(), ep_rank=0, etp_rank=0)
    names = [name for name in layouts if name != "language"]
    if recompute:
        for name in names:
            configs[name].recompute_granularity = "full"
            configs[name].recompute_method = "uniform"
            configs[name].recompute_num_layers = 1
    specs = {
        name: ModuleSpec(
            module=VisionModalitySubmodules,
            params={"pg_collection": groups[name]},
            submodules={
                "encoders": {
                    "vit": ModuleSpec(
                        module=Encoder,
                        params={
                            "config": configs[name],
                            "groups": groups[name],
                            "width": ENCODER_HIDDEN if projector else HIDDEN,
                        },
                    )
                },
                "input_projections": [projector_spec(layouts[name], groups[name])] * projector,
            },
        )
        for name in names
    }
    common = {
        "config": configs["language"],
        "vocab_size": VOCABULARY,
        "max_sequence_length": length,
        "position_embedding_type": positions,
        "pre_process": pg.pp.rank() == 0,
        "post_process": pg.pp.rank() == pg.pp.size() - 1,
        "share_embeddings_and_output_weights": tied,
        "scatter_embedding_sequence_parallel": False,
        "pg_collection": pg,
    }
    layer = layer_spec(AttnMaskType.causal, experts)
    block = sequence_parallel_block(language, layers, experts) if sequence_parallel else layer
    gpt = ModuleSpec(module=GPTModel, params={**common, "transformer_layer_spec": block})
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "MimoModel is experimental"
        model = MimoModel(
            MimoModelConfig(
                language_model_spec=hybrid.language_spec(layer.submodules, language.pp, common)
                if is_hybrid
                else gpt,
                modality_submodules_spec=specs,
                special_token_ids={n: VOCABULARY - 1 - i for i, n in enumerate(names)},
            ),
            cp_group=pg.cp,
            tp_group=pg.tp,
        )
    modules = {name: model.modality_submodules[name] for name in names}
    for name, module in (modules | {"language": model.language_model}).items():
        seed_parameters(module, groups[name], seed=seed)
        module.to(torch.cuda.current_device())
        module.requires_grad_(name not in frozen)
        if not wrap or name in frozen:
            continue
        ddp = DistributedDataParallel(
            configs[name],
            DistributedDataParallelConfig(
                use_distributed_optimizer=distributed_optimizer,
                grad_reduce_in_fp32=configs[name].bf16,
                overlap_grad_reduce=overlap,
                bucket_size=bucket_size,
                overlap_param_gather=gather,
            ),
            module,
            pg_collection=groups[name],
        )
        if name == "language":
            model.language_model = ddp
        else:
            model.modality_submodules[name] = ddp
    return model


def batch(
    size: int, names: tuple[str, ...] = ("images",), seed: int = 0, length: int = LENGTH
) -> dict[str, Any]:
    """One global microbatch: ROWS placeholders per encoder and sample, an uneven loss mask."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.get_default_dtype()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def tokens() -> torch.Tensor:
        return torch.randint(0, VOCABULARY - 8, (size, length), generator=generator)

    ids = tokens()
    for index, _ in enumerate(names):
        ids[:, 1 + index * (ROWS + 1) : 1 + index * (ROWS + 1) + ROWS] = VOCABULARY - 1 - index
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand(size, -1).contiguous(),
        "labels": tokens(),
        "loss_mask": (random(size, length) > 0.3).to(dtype),
        "modality_inputs": {name: {"vit": {"x": random(size, ROWS, FEATURES)}} for name in names},
    }


def loss_func(output: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Megatron's contract: the loss summed over tokens, the number of tokens, the log."""
    losses, mask = output
    total, count = (losses * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"loss": (float(total.detach()), int(count))}

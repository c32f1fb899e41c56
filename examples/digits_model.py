"""The digits VLM: a ViT and a GPT made of megatron-core's layers, inside its MimoModel.

Every parameter starts from its own name and its whole shape, so any layout starts from the same
weights.
"""

import logging
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from colocc.runtime.attention import SdpaAttention
from colocc.testing import global_names
from examples import digits_data

Groups = Mapping[str, ProcessGroupCollection]


@dataclass(frozen=True)
class Sizes:
    """The sizes of both towers; heads and vocabulary divide by every tp up to 8."""

    hidden: int = 64
    ffn: int = 128
    heads: int = 8
    vision_layers: int = 2
    language_layers: int = 2
    gain: float = 1.0


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, known notices of megatron-core are silenced, each by name."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.addFilter(_not_deprecated)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is experimental and still under active.*")
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        try:
            yield
        finally:
            logger.removeFilter(_not_deprecated)


def _not_deprecated(record: logging.LogRecord) -> bool:
    return "GPTModel IS DEPRECATED" not in record.getMessage()


class VisionTransformer(MegatronModule):
    """Batch-first embeddings of scans cut into 2x2 patches: [b, 8, 8] -> [b, 16, hidden]."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        dtype = config.params_dtype
        self.patches = torch.nn.Linear(
            digits_data.PATCH**2, config.hidden_size, bias=False, dtype=dtype
        )
        self.positions = torch.nn.Parameter(
            torch.zeros(digits_data.PATCHES, config.hidden_size, dtype=dtype)
        )
        self.trunk = TransformerBlock(
            config, layer_spec(AttnMaskType.no_mask), pg_collection=pg_collection
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        side = digits_data.PATCH
        cut = pixel_values.unfold(1, side, side).unfold(2, side, side).flatten(3).flatten(1, 2)
        embedded = self.patches(cut.to(self.positions.dtype)) + self.positions
        encoded: torch.Tensor = self.trunk(embedded.transpose(0, 1).contiguous(), None)
        # MIMO flattens [b, s, h] to [b * s, h]: sample-major only if the batch comes first.
        return encoded.transpose(0, 1).contiguous()


def layer_spec(mask: AttnMaskType) -> ModuleSpec:
    """Megatron's own layer, with an attention that needs neither Transformer Engine nor CUDA."""
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.params = {"attn_mask_type": mask}
    spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    return spec


def transformer_config(
    sizes: Sizes, groups: ProcessGroupCollection, layers: int, bf16: bool
) -> TransformerConfig:
    """Megatron's configuration of one tower, laid out as its groups say."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
    )


@quiet()
def build_model(
    groups: Groups, sizes: Sizes = Sizes(), *, seed: int = 0, bf16: bool = False
) -> MimoModel:
    """The VLM on this rank, each tower in a Megatron DDP of its own, ready for colocc.compile."""
    images, language = groups["images"], groups["language"]
    vision_config = transformer_config(sizes, images, sizes.vision_layers, bf16)
    language_config = transformer_config(sizes, language, sizes.language_layers, bf16)
    stage, stages = language.pp.rank(), language.pp.size()
    config = MimoModelConfig(
        language_model_spec=ModuleSpec(
            module=GPTModel,
            params={
                "config": language_config,
                "transformer_layer_spec": layer_spec(AttnMaskType.causal),
                "vocab_size": digits_data.VOCABULARY_SIZE,
                "max_sequence_length": digits_data.LENGTH,
                "pre_process": stage == 0,
                "post_process": stage == stages - 1,
                "pg_collection": language,
            },
        ),
        modality_submodules_spec={"images": vision_spec(vision_config, images)},
        special_token_ids={"images": digits_data.IMAGE},
    )
    model = MimoModel(config)
    fill(model.modality_submodules["images"], images, sizes.gain, seed)
    fill(model.language_model, language, sizes.gain, seed)
    # Megatron leaves position embeddings and norms in fp32, whatever params_dtype says.
    model.to(torch.cuda.current_device(), dtype=language_config.params_dtype)
    model.modality_submodules["images"] = data_parallel(
        model.modality_submodules["images"], vision_config, images
    )
    model.language_model = data_parallel(model.language_model, language_config, language)
    return model


def vision_spec(config: TransformerConfig, groups: ProcessGroupCollection) -> ModuleSpec:
    """The images module: the ViT and the projection to the language model's hidden size."""
    # An affine projector gathers its output over tp, and would add a bias that is not gathered.
    unbiased = replace(config, add_bias_linear=False)
    projector = ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": unbiased,
            "submodules": MLPSubmodules(ColumnParallelLinear, RowParallelLinear),
            "projector_type": "affine",
            "input_size": config.hidden_size,
            "tp_group": groups.tp,
        },
    )
    vit = ModuleSpec(module=VisionTransformer, params={"config": config, "pg_collection": groups})
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups},
        submodules={"encoders": {"vit": vit}, "input_projections": [projector]},
    )


def data_parallel(
    module: torch.nn.Module, config: TransformerConfig, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    """The module in Megatron's DDP, gradients summed in fp32."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp_config, module, pg_collection=groups)


def fill(module: torch.nn.Module, groups: ProcessGroupCollection, gain: float, seed: int) -> None:
    """Fill every matrix from a generator seeded by its global name; this rank keeps its slice.

    Vectors keep Megatron's ones and zeros, which no layout changes.
    """
    with torch.no_grad():
        for name, weight in global_names(module):
            if weight.dim() < 2:
                continue
            shape = list(weight.shape)
            tp, dim = groups.tp, getattr(weight, "partition_dim", -1)
            split = getattr(weight, "tensor_model_parallel", False)
            if split:
                shape[dim] *= tp.size()
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            whole = torch.randn(shape, generator=generator) * gain / shape[-1] ** 0.5
            weight.copy_(whole.chunk(tp.size(), dim)[tp.rank()] if split else whole)

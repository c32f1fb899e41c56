"""The models of the benchmark, of megatron-core's own layers; weights depend on names alone."""

import copy
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from colocc import Layout
from colocc.testing import global_names
from examples.benchmark.cases import Model, Tower
from examples.digits_model import layer_spec, quiet

Groups = Mapping[str, ProcessGroupCollection]


class Encoder(MegatronModule):
    """Patches in, embeddings of the language model out: [b, patches, features] -> [b, patches,
    hidden]."""

    def __init__(
        self, config: TransformerConfig, groups: ProcessGroupCollection, features: int, out: int
    ) -> None:
        super().__init__(config)
        dtype = config.params_dtype
        self.inward = torch.nn.Linear(features, config.hidden_size, dtype=dtype)
        self.trunk = TransformerBlock(
            config, layer_spec(AttnMaskType.no_mask), pg_collection=groups
        )
        self.outward = torch.nn.Linear(config.hidden_size, out, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(self.inward(x).transpose(0, 1).contiguous(), None)
        embeddings: torch.Tensor = self.outward(hidden).transpose(0, 1).contiguous()
        return embeddings


def config_of(
    tower: Tower,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    *,
    whole: bool = False,
    **options: Any,
) -> TransformerConfig:
    """``whole``: each cp rank computes whole sequences, as MimoModel has encoders do."""
    return TransformerConfig(
        num_layers=tower.layers,
        hidden_size=tower.hidden,
        num_attention_heads=tower.heads,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        context_parallel_size=1 if whole else groups.cp.size(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,  # fill() does it
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **options,
    )


def language_spec(
    model: Model, config: TransformerConfig, groups: ProcessGroupCollection
) -> ModuleSpec:
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": layer_spec(AttnMaskType.causal),
            "vocab_size": model.vocabulary,
            "max_sequence_length": model.length,
            "pre_process": groups.pp.rank() == 0,
            "post_process": groups.pp.rank() == groups.pp.size() - 1,
            "share_embeddings_and_output_weights": False,
            "pg_collection": groups,
        },
    )


@quiet()
def build_mimo(
    model: Model,
    layouts: Mapping[str, Layout],
    groups: Groups,
    dtype: torch.dtype,
    ddp: DistributedDataParallelConfig,
) -> MimoModel:
    """Megatron's MimoModel on this rank, each module in a DDP of its own; at pp1 with the
    communicators that Megatron builds from the grids."""
    configs = {
        "images": config_of(model.images, groups["images"], dtype, whole=True),
        "language": config_of(model.language, groups["language"], dtype),
    }
    encoder = ModuleSpec(
        module=Encoder,
        params={
            "config": configs["images"],
            "groups": groups["images"],
            "features": model.features,
            "out": model.language.hidden,
        },
    )
    grids = {
        name: HyperCommGrid([layout.tp, layout.dp], ["tp", "dp"])
        for name, layout in layouts.items()
    }
    # Megatron's own communicators know tp and dp.
    apart = layouts["language"].pp == layouts["language"].cp == 1
    mimo = MimoModel(
        MimoModelConfig(
            language_model_spec=language_spec(model, configs["language"], groups["language"]),
            modality_submodules_spec={
                "images": ModuleSpec(
                    module=VisionModalitySubmodules,
                    params={"pg_collection": groups["images"]},
                    submodules={"encoders": {"vit": encoder}},
                )
            },
            special_token_ids={"images": model.vocabulary - 1},
            module_to_grid_map=grids if apart else None,
        ),
        cp_group=groups["language"].cp,
        tp_group=groups["language"].tp,
    )
    mimo.model_type = mimo.language_model.model_type  # Megatron's schedules ask for it
    mimo.to(torch.cuda.current_device(), dtype=dtype)
    fill(mimo.modality_submodules["images"], groups["images"])
    fill(mimo.language_model, groups["language"])
    mimo.modality_submodules["images"] = data_parallel(
        mimo.modality_submodules["images"], configs["images"], groups["images"], ddp
    )
    mimo.language_model = data_parallel(
        mimo.language_model, configs["language"], groups["language"], ddp
    )
    return mimo


class FirstStage(MegatronModule):
    """The encoder as a part of the language model's first stage, in one DDP with it."""

    def __init__(
        self, model: Model, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.token = model.vocabulary - 1
        self.language = GPTModel(**language_spec(model, config, groups).params)
        # Megatron's schedules and its finalisation of gradients ask for these.
        self.model_type = self.language.model_type
        self.pre_process, self.post_process = self.language.pre_process, self.language.post_process
        self.share_embeddings_and_output_weights = False
        self.images = None
        if groups.pp.rank() == 0:
            here = _one_stage(groups)
            images = config_of(model.images, here, config.params_dtype)
            self.images = Encoder(images, here, model.features, model.language.hidden)

    def set_input_tensor(self, tensor: Any) -> None:
        """Give this stage the hidden states of the stage before it."""
        self.language.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Hidden states, and on the last stage (losses, loss mask)."""
        merged = None
        if self.images is not None:
            rows = self.images(batch["modality_inputs"]["images"]["vit"]["x"])
            ids = batch["input_ids"]
            text = self.language.embedding(ids, batch["position_ids"]).transpose(0, 1)
            image = (ids == self.token).unsqueeze(-1)
            merged = text.masked_scatter(image, rows.flatten()).transpose(0, 1).contiguous()
        output = self.language(
            input_ids=None,
            position_ids=batch["position_ids"],
            attention_mask=None,
            decoder_input=merged,
            labels=batch["labels"],
        )
        return (output, batch["loss_mask"]) if self.post_process else output


def _one_stage(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """``groups`` for a module of the first stage: its pp is a group of this rank alone."""
    one = copy.copy(groups)
    one.pp = groups.pos_embd
    return one


@quiet()
def build_first_stage(
    model: Model,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    layers: int,
    ddp: DistributedDataParallelConfig,
) -> DistributedDataParallel:
    """FirstStage on this rank with ``layers`` language layers beside the encoder."""
    config = config_of(model.language, groups, dtype, num_layers_in_first_pipeline_stage=layers)
    stage = FirstStage(model, config, groups)
    stage.to(torch.cuda.current_device(), dtype=dtype)
    if stage.images is not None:
        fill(stage.images, groups, "encoders.vit.")
    fill(stage.language, groups)
    return data_parallel(stage, config, groups, ddp)


def data_parallel(
    module: torch.nn.Module,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    ddp: DistributedDataParallelConfig,
) -> DistributedDataParallel:
    """The module in Megatron's DDP."""
    return DistributedDataParallel(config, ddp, module, pg_collection=groups)


def ddp_config(*, overlap: bool, distributed: bool = True) -> DistributedDataParallelConfig:
    """Gradients summed in fp32, for the distributed optimizer or whole on every rank; ``overlap``:
    reduced beside the backward, and weights gathered beside the forward."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
    )


def fill(module: torch.nn.Module, groups: ProcessGroupCollection, prefix: str = "") -> None:
    """Fill every matrix from a generator seeded by its global name, vectors with zeros, and ones
    for norms; this rank keeps its slice."""
    tp = groups.tp
    with torch.no_grad():
        for name, weight in global_names(module):
            if weight.dim() < 2:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            shape, dim = list(weight.shape), getattr(weight, "partition_dim", -1)
            split = getattr(weight, "tensor_model_parallel", False)
            if split:
                shape[dim] *= tp.size()
            generator = torch.Generator(weight.device).manual_seed(
                zlib.crc32(f"{prefix}{name}".encode())
            )
            whole = torch.randn(shape, generator=generator, device=weight.device)
            whole *= shape[-1] ** -0.5
            weight.copy_(whole.chunk(tp.size(), dim)[tp.rank()] if split else whole)


def make_batches(model: Model, size: int, count: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """``count`` global microbatches of ``size`` samples, the same on every rank."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)

    def tokens() -> torch.Tensor:
        return torch.randint(
            0, model.vocabulary - 8, (size, model.length), generator=generator, device=device
        )

    found = []
    for _ in range(count):
        ids, shape = tokens(), (size, model.patches, model.features)
        ids[:, : model.patches] = model.vocabulary - 1
        mask = torch.ones(size, model.length, device=device)
        mask[:, : model.patches] = 0.0
        places = torch.arange(model.length, device=device).expand(size, -1).contiguous()
        pixels = torch.randn(shape, generator=generator, device=device).to(dtype)
        found.append(
            {
                "input_ids": ids,
                "position_ids": places,
                "labels": tokens(),
                "loss_mask": mask,
                "modality_inputs": {"images": {"vit": {"x": pixels}}},
            }
        )
    return found

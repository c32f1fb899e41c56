"""All that colocc knows of megatron-core's internals (0.19): its MimoModel, schedules, DDP,
optimizer."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError, LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Glue, Merging, Reduction, Traits
from colocc.sequence import cuts
from colocc.types import DTYPES

if TYPE_CHECKING:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.process_groups_config import ProcessGroupCollection

    from colocc.runtime.channels import Channel
    from colocc.runtime.groups import ProcessGroups
    from colocc.runtime.pipeline import Between

LANGUAGE = "language"
_PACKING = "packing_kwargs"
_INPUTS = ("input_ids", "position_ids", "loss_mask", "labels")


def is_mimo(model: nn.Module) -> bool:
    """Whether ``model`` is Megatron's MimoModel; false without importing Megatron for the
    question."""
    base = sys.modules.get("megatron.core.models.mimo.model.base")
    return base is not None and isinstance(model, base.MimoModel)


def traits_of(model: Any, example_inputs: Mapping[str, Any] | None) -> Traits:
    """What is known of ``model`` beforehand: everything of a MimoModel, nothing of other models."""
    if not is_mimo(model):
        return Traits()
    if model.role.mode.value != "colocated" or model.language_model is None:
        raise CaptureError(
            "the MimoModel was built for modules on different ranks (module_to_grid_map): colocc "
            "compiles modules that share all ranks. Build it with module_to_grid_map=None."
        )
    names = tuple(model.modality_submodules)
    shapes = _Shapes(model, example_inputs or {})
    glue = [
        Glue("get_text_embeddings", "text", LANGUAGE, shapes.text),
        Glue("align_embeddings_by_token_positions", "merged", LANGUAGE, shapes.merged),
        Glue("_build_packed_seq_params", "packed", LANGUAGE, stage="all"),
    ]
    if model.partition_adapter is not None:
        glue.append(
            Glue("_shard_language_inputs", "sharded", LANGUAGE, shapes.sharded, stage="all")
        )
    outputs: dict[str, Callable[[Mapping[str, Any], Layout], Any]] = {
        name: shapes.encoded(name) for name in names
    }
    return Traits(
        targets={name: f"modality_submodules.{name}" for name in names}
        | {LANGUAGE: "language_model"},
        glue=tuple(glue),
        inputs=_INPUTS,
        nested={"modality_inputs": names},
        outputs=outputs | {LANGUAGE: shapes.language},
        disabled=("colocated_comms",),
        rows={
            name: model.special_token_ids[name] for name in names if name in model.special_token_ids
        },
        merging=Merging(
            "get_text_embeddings", "align_embeddings_by_token_positions", "_shard_language_inputs"
        ),
        handed={LANGUAGE: ("attention_mask",)},
        packing=_PACKING,
    )


def optional_inputs(model: nn.Module) -> frozenset[str]:
    """The captured inputs that may be left out: those that the trace did not specialise on."""
    if not is_mimo(model):
        return frozenset()
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.default is not p.empty)


class _Shapes:
    """The shapes of MimoModel's values: hidden size and dtype from its config, tokens per sample
    from the placeholders in the example's input_ids."""

    def __init__(self, model: Any, example_inputs: Mapping[str, Any]) -> None:
        config = unwrapped(model.language_model).config
        dtype = (
            torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype
        )
        self.dtype = DTYPES[str(dtype).removeprefix("torch.")]
        self.hidden = config.hidden_size
        self.tokens = {}
        ids = example_inputs.get("input_ids")
        for name, token in model.special_token_ids.items():
            if isinstance(ids, torch.Tensor) and ids.dim() == 2:
                counts = (ids == token).sum(dim=1).tolist()
                self.tokens[name] = counts[0] if len(set(counts)) == 1 else None

    def encoded(self, name: str) -> Callable[[Mapping[str, Any], Layout], Any]:
        def shape(arguments: Mapping[str, Any], layout: Layout) -> Any:
            inputs = [
                leaf
                for leaf in pytree.tree_leaves(arguments.get("encoder_inputs"))
                if isinstance(leaf, torch.Tensor) and leaf.dim()
            ]
            tokens = self.tokens.get(name)
            if not inputs or not tokens:
                return None
            return (self.dtype, (inputs[0].shape[0] * tokens, self.hidden))

        return shape

    def text(self, arguments: Mapping[str, Any], layout: Layout) -> Any:
        batch, length = arguments["input_ids"].shape
        special = list(self.tokens.values())
        if not special or None in special:
            return None
        return (self.dtype, (batch * (length - sum(n for n in special if n)), self.hidden))

    def merged(self, arguments: Mapping[str, Any], layout: Layout) -> Any:
        batch, length = arguments["input_ids"].shape
        return (self.dtype, (length, batch, self.hidden))

    def sharded(self, arguments: Mapping[str, Any], layout: Layout) -> Any:
        length, batch, hidden = arguments["embeddings"].shape
        return (
            (self.dtype, (length, batch, hidden)),
            arguments["labels"],
            arguments["loss_mask"],
            arguments.get("packed_seq_params"),
        )

    def language(self, arguments: Mapping[str, Any], layout: Layout) -> Any:
        labels = arguments.get("labels")
        return ("f32", tuple(labels.shape)) if isinstance(labels, torch.Tensor) else None


def check_sequence(model: Any, layouts: Mapping[str, Layout]) -> None:
    """Raise LayoutError unless the language model of a MimoModel cuts its sequence as its layout
    says."""
    if not is_mimo(model) or LANGUAGE not in layouts or model.language_model is None:
        return
    for name, layout in layouts.items():
        if name != LANGUAGE and layout.sp and layout.cp > 1:
            raise LayoutError(
                f"{name} ({layout}) has sp and cp: MimoModel gives each cp rank whole items, of "
                "whose rows sp makes a part on each tp rank. Leave out one of them."
            )
    layout = layouts[LANGUAGE]
    config = unwrapped(model.language_model).config
    if layout.cp != config.context_parallel_size:
        raise LayoutError(
            f"{LANGUAGE} ({layout}) has cp{layout.cp}, its config context_parallel_size="
            f"{config.context_parallel_size}. Give both the same size."
        )
    if layout.cp > 1 and not layout.zigzag:
        raise LayoutError(
            f"{LANGUAGE} ({layout}) cuts its sequence into {layout.cp} runs, Megatron gives each "
            f"cp rank two chunks of {2 * layout.cp}, one from either end. Write zigzag=True."
        )
    if layout.tp > 1 and layout.sp != config.sequence_parallel and (layout.sp or layout.cp > 1):
        raise LayoutError(
            f"{LANGUAGE} ({layout}) {'cuts' if layout.sp else 'does not cut'} its sequence over "
            f"tp, its config has sequence_parallel={config.sequence_parallel}. Write "
            f"sp={config.sequence_parallel} in the layout, or sequence_parallel={layout.sp} in the "
            "config."
        )


def no_rows(model: Any) -> torch.Tensor:
    """What an encoder of a MimoModel returns for no items. Shape: [0, hidden]."""
    weight: torch.Tensor = next(model.language_model.parameters())
    config = unwrapped(model.language_model).config
    return weight.new_empty((0, config.hidden_size), dtype=config.params_dtype)


class MergeInPart:
    """The merge of text and rows in this rank's part of the sequence, for a MimoModel.

    It does what get_text_embeddings, align_embeddings_by_token_positions and the partition adapter
    do one after the other, for the positions of this part alone, and waits for no device.
    """

    def __init__(self, model: Any, layout: Layout, rank: int) -> None:
        self.model = model
        self.chunks, parts = cuts(replace(layout, sp=False))
        self.runs = parts[int(layout.coordinates("cp")[rank])]
        self.lanes = layout.tp if layout.sp else 1
        self.lane = int(layout.coordinates("tp")[rank]) if layout.sp else 0

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        rows: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Return the embeddings of the part.

        Shapes: ``input_ids`` [b, s], ``position_ids`` [b, s] or [channels, b, s], ``rows`` [n, h]
        by sample and position; the result is [s / (cp * lanes), b, h].
        """
        ids = self._of_cp(input_ids)
        if position_ids is not None:
            position_ids = self._of_cp(position_ids[0] if position_ids.dim() == 3 else position_ids)
        tokens = self.model.special_token_ids
        special = torch.zeros_like(ids, dtype=torch.bool)
        for token in tokens.values():
            special |= ids == token
        # A placeholder's id may lie outside the vocabulary; its row replaces the embedding.
        text = self._embed(ids.masked_fill(special, 0), position_ids)
        mine = ids.chunk(self.lanes, dim=1)[self.lane]
        batch = ids.shape[0]
        places = []
        for name, value in rows.items():
            found = torch.nonzero_static(mine == tokens[name], size=len(value))
            places.append(found[:, 1] * batch + found[:, 0])
        values = torch.cat(list(rows.values()))
        merged = text.flatten(0, 1).index_copy(0, torch.cat(places), values.to(text.dtype))
        return merged.view(text.shape)

    def _of_cp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The positions, in the last dim, that are on this cp rank."""
        size = tensor.shape[-1] // self.chunks
        return torch.cat([tensor[..., a * size : b * size] for a, b in self.runs], dim=-1)

    def _embed(self, ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        embedding = unwrapped(self.model.language_model).embedding
        with _scattering(embedding) if self.lanes > 1 else contextlib.nullcontext():
            found: torch.Tensor = embedding(input_ids=ids, position_ids=position_ids)
        return found


@contextlib.contextmanager
def _scattering(embedding: Any) -> Iterator[None]:
    """Inside, the language model's embedding returns this tp rank's part of the sequence, by a
    reduce-scatter where no positions are added; MIMO builds it to return the whole one."""
    words = embedding.word_embeddings
    kept = [(embedding, "scatter_to_sequence_parallel"), (embedding, "reduce_scatter_embeddings"),
            (words, "reduce_scatter_embeddings")]  # fmt: skip
    before = [getattr(owner, name) for owner, name in kept]
    whole = embedding.add_position_embedding or embedding.num_tokentypes > 0
    try:
        for (owner, name), value in zip(kept, (True, not whole, not whole), strict=True):
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in zip(kept, before, strict=True):
            setattr(owner, name, value)


class QuietGlue:
    """Two methods of MimoModel that wait for the GPU several times a microbatch, without a wait.

    Both need to know how many placeholders a microbatch has, which ``count`` asks for once a step.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._counts: list[dict[str, int]] = []
        self._at = 0

    def methods(self) -> dict[str, Callable[..., Any]]:
        """What stands in for the model's methods of these names; those of a subclass stay."""
        base = sys.modules["megatron.core.models.mimo.model.base"].MimoModel
        mine: dict[str, Callable[..., Any]] = {
            "get_text_embeddings": self._text,
            "align_embeddings_by_token_positions": self._merged,
        }
        own: Any = type(self.model)
        found = {n: call for n, call in mine.items() if vars(base)[n] is getattr(own, n)}
        return found | {"_build_packed_seq_params": self._packed}

    def _packed(self, packing_kwargs: Mapping[str, Any] | None) -> Any:
        """The model's own, of a dict that it may change."""
        given = None if packing_kwargs is None else dict(packing_kwargs)
        return self.model._build_packed_seq_params(given)

    def count(self, input_ids: list[torch.Tensor]) -> None:
        """Learn the placeholders in each microbatch of a step; waits for the device, once."""
        tokens = self.model.special_token_ids
        found = [torch.stack([(ids == t).sum() for t in tokens.values()]) for ids in input_ids]
        rows = torch.stack(found).tolist()
        self._counts = [dict(zip(tokens, row, strict=True)) for row in rows]

    def turn_to(self, microbatch: int) -> None:
        """The calls that follow are about ``microbatch``."""
        self._at = microbatch

    def _text(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """The embeddings of the tokens that are text. Shape: [tokens, hidden]."""
        adapter, embedding = self.model.partition_adapter, self._embedding()
        scatters = getattr(embedding, "scatter_to_sequence_parallel", False)
        if adapter is not None and adapter.cfg.seq_parallel and scatters:
            # Megatron's own refusal.
            found: torch.Tensor = self.model.get_text_embeddings(
                input_ids, position_ids, special_token_ids
            )
            return found
        text = self._mask(input_ids, special_token_ids)
        size = input_ids.numel() - sum(self._counts[self._at].values())
        rows, places = torch.nonzero_static(text, size=size).unbind(dim=1)
        if position_ids is not None:
            if position_ids.dim() == 3:
                position_ids = position_ids[0]
            position_ids = position_ids[rows, places].unsqueeze(0)
        embedded: torch.Tensor = embedding(
            input_ids=input_ids[rows, places].unsqueeze(0), position_ids=position_ids
        )
        return embedded.squeeze(1)

    def _merged(
        self,
        modality_embeddings: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """All embeddings at the places of their tokens. Shape: [sequence, batch, hidden]."""
        counts = self._counts[self._at]
        wanted = counts | {"text": input_ids.numel() - sum(counts.values())}
        first = next(iter(modality_embeddings.values()))
        like = modality_embeddings.get("text", first)
        merged = like.new_zeros((*input_ids.shape, like.shape[-1]))
        for name, rows in modality_embeddings.items():
            if len(rows) != wanted[name]:
                raise ValueError(
                    f"Number of {name} tokens ({wanted[name]}) does not match number of {name} "
                    f"embeddings ({len(rows)})"
                )
            text = name == "text"
            mask = (
                self._mask(input_ids, special_token_ids)
                if text
                else input_ids == special_token_ids[name]
            )
            merged.masked_scatter_(mask.unsqueeze(-1).expand_as(merged), rows.flatten())
        return merged.transpose(0, 1).contiguous()

    def _embedding(self) -> Any:
        return unwrapped(self.model.language_model).embedding

    @staticmethod
    def _mask(input_ids: torch.Tensor, special_token_ids: Mapping[str, int]) -> torch.Tensor:
        text = torch.ones_like(input_ids, dtype=torch.bool)
        for token in special_token_ids.values():
            text &= input_ids != token
        return text


def unwrapped(module: nn.Module) -> Any:
    """``module`` without wrappers such as DDP or Float16Module."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return module


def reduction_of(name: str, module: nn.Module) -> Reduction:
    """How DDP reduces the gradients of ``module``: a sum with per-token loss, else the mean over
    dp.

    Megatron's DDP reads it from the config; torch's DDP always takes the mean.
    """
    for part in module.modules():
        config = getattr(part, "config", None)
        per_token = getattr(config, "calculate_per_token_loss", None)
        if per_token is not None:
            return "sum" if per_token else "mean"
    return "mean"


def prepare_buffers() -> None:
    """Give Megatron the scratch buffer that its sequence parallelism takes from parallel_state,
    which only ``initialize_model_parallel`` would otherwise make."""
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def is_ddp(module: nn.Module) -> bool:
    """Whether ``module`` is wrapped in Megatron's DDP."""
    return hasattr(module, "finish_grad_sync") and hasattr(module, "scale_gradients")


def no_sync(module: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, backward adds to the gradients that DDP holds, and reduces none of them."""
    held: contextlib.AbstractContextManager[None] = module.no_sync()
    return held


class Stage(nn.Module):
    """This rank's part of the pipelined module as Megatron's schedules want it.

    It carries a copy of the config, so that the schedule hands its token count to ``collect``
    instead of finalising gradients, while the user's config stays as it is.
    """

    def __init__(self, module: nn.Module, collect: Callable[..., None]) -> None:
        super().__init__()
        self.module = module
        inner = unwrapped(module)
        self.config = copy.copy(inner.config)
        self.config.finalize_model_grads_func = collect
        self.config.grad_sync_func = None
        if self.config.no_sync_func is None and is_ddp(module):
            self.config.no_sync_func = module.no_sync
        self.model_type = inner.model_type
        self.vp_stage = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Give this stage the hidden states of the stage before it."""
        unwrapped(self.module).set_input_tensor(tensor)


def run_schedule(
    stage: Stage,
    forward_step: Callable[..., Any],
    collection: ProcessGroupCollection,
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
    collect_non_loss_data: bool,
    force_all_reduce: bool,
    indices: Iterator[int],
    filled: tuple[Channel, Channel, Between] | None = None,
) -> list[Any]:
    """Return what Megatron's schedule returns: the losses on the last stage, [] elsewhere.

    ``filled`` is the pipeline's way onward, its way back, and what runs between its tasks.
    """
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from colocc.runtime.pipeline import FilledCommunicator

    common: dict[str, Any] = {
        "forward_step_func": forward_step,
        "data_iterator": indices,
        "model": stage,
        "num_microbatches": num_microbatches,
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
        "forward_only": forward_only,
        "collect_non_loss_data": collect_non_loss_data,
        "pg_collection": collection,
        "force_all_reduce": force_all_reduce,
    }
    if collection.pp.size() == 1:
        result = schedules.forward_backward_no_pipelining(**common)
    else:
        communicator = (
            P2PCommunicator(pp_group=collection.pp, config=stage.config)
            if filled is None
            else FilledCommunicator(collection.pp, stage.config, *filled)
        )
        result = schedules.forward_backward_pipelining_without_interleaving(
            p2p_communicator=communicator, **common
        )
    return list(result)


def global_tokens(tokens: torch.Tensor, collection: ProcessGroupCollection) -> torch.Tensor:
    """The token count of the whole step, on every rank: the last stages hold their replicas'
    counts, each of its tp ranks the same one, of which the first is counted."""
    last = collection.pp.rank() == collection.pp.size() - 1
    counts = last and collection.tp.rank() == 0
    total = tokens.clone() if counts else torch.zeros_like(tokens)
    dist.all_reduce(total)
    return total


def scale_gradients(module: Any, factor: torch.Tensor) -> None:
    """Multiply the gradients that DDP holds by ``factor``."""
    module.scale_gradients(factor)


def gather_parameters(module: Any) -> None:
    """Gather what ``overlap_param_gather`` has put off until a forward, which a rank may not run.

    The last group comes first: as Megatron's hooks have it, each starts the one before it.
    """
    if not is_ddp(module) or not module.ddp_config.overlap_param_gather:
        return
    for groups in (module.bucket_groups, module.expert_parallel_bucket_groups):
        for group in reversed(groups):
            group.finish_param_sync()


def start_reductions(module: Any) -> None:
    """Start what backward would have with ``overlap_grad_reduce``, had it not run in ``no_sync``.

    Until DDP has seen a backward outside of it, it waits for none and starts them by itself.
    """
    if not module.ddp_config.overlap_grad_reduce:
        return
    for group in module.bucket_groups + module.expert_parallel_bucket_groups:
        if not group.is_first_batch:
            group.start_grad_sync()


def finish_gradients(
    module: nn.Module, collection: ProcessGroupCollection, *, force_all_reduce: bool
) -> None:
    """Reduce the gradients of one module over its own groups: dp, tied embeddings, sequence
    parallel."""
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    finalize_model_grads([module], None, collection, force_all_reduce)


def mimo_optimizer(
    modules: Mapping[str, nn.Module], groups: ProcessGroups, config: OptimizerConfig
) -> Any:
    """Megatron's MimoOptimizer over ``modules``: one optimizer each on its own groups, one norm.

    Raises: LayoutError for a trainable module that is not wrapped in Megatron's DDP.
    """
    from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
    from megatron.core.optimizer import get_megatron_optimizer

    infos = {}
    for name, module in modules.items():
        optimizer = None
        if any(parameter.requires_grad for parameter in module.parameters()):
            require_ddp(name, module)
            optimizer = get_megatron_optimizer(
                config=config,
                model_chunks=[module],
                pg_collection=groups[name],
                use_gloo_process_groups=False,
            )
        infos[name] = ModuleOptimizerInfo(
            optimizer=optimizer, grid=None, pg_collection=groups[name], is_active=True
        )
    return MimoOptimizer(infos, config)


def require_ddp(name: str, module: nn.Module) -> None:
    """Raise LayoutError unless ``module`` is wrapped in Megatron's DDP."""
    if not is_ddp(module):
        raise LayoutError(
            f"{name} has parameters to train and is no Megatron DistributedDataParallel: nothing "
            f"would reduce its gradients. Wrap it: DistributedDataParallel(config, ddp_config, "
            f"module, pg_collection=groups[{name!r}])"
        )


def main_gradient(weight: torch.Tensor) -> torch.Tensor:
    """Where DDP adds up the gradient of a weight to train."""
    held: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
    return held


def add_gradient(weight: Any) -> None:
    """Do what DDP does with the gradient of ``weight`` once a backward has made it, but reduce."""
    # A fused layer has added it already, and leaves a tensor without meaning.
    if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
        weight.main_grad.add_(weight.grad)


def uncapturable(module: nn.Module) -> str | None:
    """Why forward and backward of ``module`` cannot be replayed as CUDA graphs; None if they
    can."""
    learns = any(weight.requires_grad for weight in module.parameters())
    if learns and not is_ddp(module):
        return "its gradients are not held by Megatron's DDP"
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "recompute_granularity", None) is not None:
            return "it recomputes activations, which sets the state of random numbers"
        if getattr(config, "fp8", None):
            return "it scales to fp8 from step to step"
        rates = [getattr(config, f"{name}_dropout", 0.0) for name in ("hidden", "attention")]
        if isinstance(part, nn.modules.dropout._DropoutNd):
            rates.append(part.p)
        if module.training and any(rate for rate in rates):
            return "it drops out at random"
    return None

"""What is known of Megatron's MimoModel beforehand: its modules, glue and inputs, the shapes of its
values, the positions of its language model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError, LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Glue, Merging, Traits
from colocc.passes.rows import BatchDim
from colocc.runtime.megatron.engine import unwrapped
from colocc.types import DTYPES

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

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


def batch_dims_of(model: nn.Module) -> dict[str, BatchDim]:
    """The batch dims of inputs of ``model`` that are known beforehand to be other than 0.

    The position_ids of multimodal rotary positions (mRoPE) are [3, samples, tokens], of the whole
    sequence on every rank: also under context parallelism, where Megatron cuts their angles.
    """
    return {"position_ids": 1} if _rotary(model) is not None else {}


def cut_angles(model: nn.Module, collection: ProcessGroupCollection) -> None:
    """Let the angles be cut over the cp group of the language module.

    GPTModel hands every other kind of rotary positions its cp group; this one takes that of
    parallel_state, which there is none of, or another's, where modules have layouts of their own.
    """
    rotary = _rotary(model)
    if rotary is not None:
        rotary.cp_group = collection.cp


def _rotary(model: Any) -> Any:
    """The rotary positions of the language model of a MimoModel, if they are multimodal."""
    if not is_mimo(model):
        return None
    language = unwrapped(model.language_model)
    known = getattr(language, "position_embedding_type", None) == "mrope"
    return getattr(language, "rotary_pos_emb", None) if known else None

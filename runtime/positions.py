"""Multimodal rotary positions (mRoPE) of Megatron's language models.

Their position_ids are [3, samples, tokens], of the whole sequence on every rank: also under context
parallelism, where Megatron cuts the angles that it computes from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from colocc.passes.rows import BatchDim
from colocc.runtime.megatron import is_mimo, unwrapped

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def batch_dims_of(model: nn.Module) -> dict[str, BatchDim]:
    """The batch dims of inputs of ``model`` that are known beforehand to be other than 0."""
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

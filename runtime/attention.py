"""Core attention on torch's scaled_dot_product_attention, where Transformer Engine is missing.

Under context parallelism (``config.context_parallel_size`` > 1), with megatron-core 0.19:

- Each cp rank feeds its zigzag part of the sequence. get_batch_on_this_cp_rank cuts tokens,
  position_ids, labels and loss_mask alike; MimoModel is given whole ones and its partition adapter
  cuts the merged embeddings, labels and loss_mask.
- Learned positions are looked up by position_ids, so GPTModel wants those of the rank's own tokens,
  and MimoModel, which embeds before it cuts, those of the whole sequence.
- Rotary angles come from no ids: GPTModel computes those of ``tokens here * cp`` (``* tp`` with
  sequence_parallel) and takes the zigzag part of ``pg_collection.cp``. mrope does so with the
  position_ids of the whole sequence. ``zigzag=False`` is thus for models without rotary angles.
- SelfAttention hands its own pg_collection to core attention, whose ``cp`` is the group here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, causal_lower_right

from colocc.errors import LayoutError
from colocc.runtime.context_parallel import chunks_of, gather

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SdpaAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention and CrossAttention; runs on CPUs and GPUs.

    Shapes: query [s, b, heads, d], key and value [t, b, groups, d], heads a multiple of groups;
    returns [s, b, heads * d]. A mask is Megatron's: True where a position must not be seen,
    broadcast to [b, heads, s, t]. A causal mask lets the last query see the last key.
    Packed sequences (``packed_seq_params``, thd) are [s, heads, d] and return [s, heads * d]; each
    sees itself alone, and padding is seen by none but itself.

    With config.context_parallel_size > 1, s and t are a cp rank's own tokens: two chunks, or a run
    with ``zigzag`` False (bind it with functools.partial in the ModuleSpec). Keys and values are
    gathered over ``pg_collection.cp``, whatever cp_comm_type says, and held until backward.
    Raises: NotImplementedError for packed sequences or a mask under cp, for both together, for an
    attention bias or apply_query_key_layer_scaling; LayoutError for a cp group of another size than
    the config's, or tokens that cannot be cut into the rank's chunks.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        zigzag: bool = True,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.zigzag = zigzag
        self.cp_group = _cp_group(config, pg_collection)
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
        if attention_bias is not None:
            raise NotImplementedError("SdpaAttention takes no bias")
        kind = attn_mask_type or self.attn_mask_type
        mask = None if kind is AttnMaskType.no_mask else attention_mask
        causal = kind in _CAUSAL
        if packed_seq_params is not None:
            return self._packed(query, key, value, mask, packed_seq_params, causal)
        if self.cp_group is not None:
            return self._context_parallel(self.cp_group, query, key, value, mask, causal)
        with self._random_states():
            return self._attend(query, key, value, mask, causal).flatten(2)

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        packing: Any,
        causal: bool,
    ) -> torch.Tensor:
        """Attention inside each of the sequences that are joined in dim 0."""
        if mask is not None or self.cp_group is not None or packing.qkv_format != "thd":
            raise NotImplementedError(
                "SdpaAttention takes packed sequences in the format thd, without an "
                "attention_mask and without context parallelism"
            )
        queries, keys = (
            Places.of(
                getattr(packing, f"cu_seqlens_{side}"),
                getattr(packing, f"cu_seqlens_{side}_padded"),
                len(tensor),
            )
            for side, tensor in (("q", query), ("kv", key))
        )
        hidden = ~queries.see(keys, causal=causal)
        with self._random_states():
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            return self._attend(query, key, value, hidden, causal=False).flatten(1)

    def _context_parallel(
        self,
        group: dist.ProcessGroup,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """Attention of this rank's queries to the keys of all cp ranks."""
        if mask is not None:
            raise NotImplementedError(
                "SdpaAttention takes no attention_mask under context parallelism: a rank has its "
                "own rows of it alone. Pass None, and a causal or no_mask attn_mask_type."
            )
        if causal and query.shape[0] != key.shape[0]:
            raise LayoutError(
                f"causal attention on cp{group.size()} of {query.shape[0]} queries to "
                f"{key.shape[0]} keys on a rank: which keys come before a query is known where "
                f"both are parts of one sequence. Pass equally many of both, or no_mask."
            )
        keys, values = gather(key, value, group, zigzag=self.zigzag)
        with self._random_states():
            if not causal:
                return self._attend(query, keys, values, None, causal=False).flatten(2)
            chunks = chunks_of(group.rank(), group.size(), zigzag=self.zigzag)
            length = query.shape[0] // len(chunks)
            # The queries of a chunk see the chunks up to their own, that one causally.
            ends = [(chunk + 1) * length for chunk in chunks]
            parts = [
                self._attend(part, keys[:end], values[:end], None, causal=True)
                for part, end in zip(query.split(length), ends, strict=True)
            ]
        return torch.cat(parts).flatten(2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """torch's attention in Megatron's shapes: [s, b, heads, d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # torch's is_causal excludes a mask, and lets the first query see the first key alone.
        square = causal and mask is None and query.shape[2] == key.shape[2]
        allowed = None if square else _allowed(query, key, mask, causal)
        grouped = query.shape[1] != key.shape[1]
        if grouped and isinstance(allowed, CausalBias) and not _flash(query, key, value, dropout):
            # The one other kernel that knows this alignment does not know groups.
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
            grouped = False
        out = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=dropout,
            is_causal=square,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )
        return out.permute(2, 0, 1, 3)

    def _random_states(self) -> contextlib.AbstractContextManager[Any]:
        """Tensor-parallel ranks hold different heads, so they drop with different states."""
        if self.dropout == 0.0 or not self.training or self.config.sequence_parallel:
            return contextlib.nullcontext()
        fork: contextlib.AbstractContextManager[Any] = get_cuda_rng_tracker().fork()
        return fork


@dataclass(frozen=True)
class Places:
    """Where each token of joined sequences stands: its sequence, its place from the end of that
    (the last is -1), and whether it is padding. Shapes: [tokens]."""

    sequence: torch.Tensor
    from_end: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor, borders: torch.Tensor | None, tokens: int) -> Places:
        """From cu_seqlens and, where there is padding, cu_seqlens_padded; waits for no device."""
        borders = (lengths if borders is None else borders).long()
        place = torch.arange(tokens, device=borders.device)
        sequence = torch.searchsorted(borders, place, right=True) - 1
        # What stands behind the last border is one more sequence, of padding.
        ends = torch.cat([borders[:-1] + lengths.diff(), borders[-1:]])
        from_end = place - ends[sequence]
        return cls(sequence, from_end, from_end >= 0)

    def see(self, keys: Places, *, causal: bool) -> torch.Tensor:
        """Which of ``keys`` each query sees, [queries, keys]: all of its sequence but padding, or
        those up to its own place, the last query up to the last key."""
        same = self.sequence[:, None] == keys.sequence
        seen = same & ~keys.padding
        if causal:
            seen &= keys.from_end <= self.from_end[:, None]
        # A query that sees nothing has no softmax: padding sees the padding of its own place.
        return seen | (same & keys.padding & (keys.from_end == self.from_end[:, None]))


def _cp_group(
    config: Any, pg_collection: ProcessGroupCollection | None
) -> dist.ProcessGroup | None:
    """The group whose ranks share the sequence, None where each rank has all of it."""
    if config.context_parallel_size == 1:
        return None
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
    group: dist.ProcessGroup | None = getattr(pg_collection, "cp", None)
    size = 0 if group is None else group.size()
    if size != config.context_parallel_size:
        raise LayoutError(
            f"config.context_parallel_size is {config.context_parallel_size}, and "
            f"pg_collection.cp has {size} ranks. Write the cp of the layout into the config, and "
            f"pass the module's own collection."
        )
    return group


def _allowed(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor | None:
    """torch's mask, True where a position may be seen; None where all may.

    On a GPU a causal one alone is no tensor but the name of an alignment that kernels know.
    """
    allowed = None if mask is None else ~mask
    if not causal:
        return allowed
    queries, keys = query.shape[2], key.shape[2]
    if allowed is None and key.is_cuda:
        return causal_lower_right(queries, keys)
    lower_right = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril(
        keys - queries
    )
    return lower_right if allowed is None else allowed & lower_right


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether torch's flash kernel takes these, grouped heads included."""
    return can_use_flash_attention(SDPAParams(query, key, value, None, dropout, False, True))

"""The glue of Megatron's MimoModel without a wait for the device: text embeddings, and their merge
with the rows of the encoders."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from colocc.layout import Layout
from colocc.runtime.megatron.engine import unwrapped
from colocc.sequence import cuts


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
        # A placeholder's id may lie outside the vocabulary; its row replaces the embedding.
        text = self._embed(ids.masked_fill(_special(ids, tokens), 0), position_ids)
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

    Both need to know how many placeholders a microbatch has, which ``know`` tells them once a step.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._counts: list[dict[str, int]] = []
        self._at = 0
        # The input_ids that were looked at last, and where in them text stands.
        self._text_in: tuple[torch.Tensor, torch.Tensor] | None = None

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

    def know(self, counts: Mapping[str, Sequence[int]], input_ids: Sequence[torch.Tensor]) -> None:
        """Learn the placeholders in each microbatch of a step, of each modality: its ``counts``, or
        where these lack one, those in ``input_ids``, in one wait for the device."""
        tokens = self.model.special_token_ids
        found = dict(counts)
        if lacking := [name for name in tokens if name not in counts]:
            seen = [torch.stack([(ids == tokens[n]).sum() for n in lacking]) for ids in input_ids]
            columns = zip(*torch.stack(seen).tolist(), strict=True)
            found |= dict(zip(lacking, columns, strict=True))
        every = range(len(input_ids))
        self._counts = [{name: int(found[name][index]) for name in tokens} for index in every]

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
            refused: torch.Tensor = self.model.get_text_embeddings(
                input_ids, position_ids, special_token_ids
            )
            return refused
        text = ~_special(input_ids, special_token_ids)
        size = input_ids.numel() - sum(self._counts[self._at].values())
        found = torch.nonzero_static(text, size=size)
        self._text_in = input_ids, found
        rows, places = found.unbind(dim=1)
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
        if not modality_embeddings:
            raise ValueError("No modality embeddings provided")
        counts = self._counts[self._at]
        wanted = counts | {"text": input_ids.numel() - sum(counts.values())}
        samples, tokens = input_ids.shape
        places = []
        for name, rows in modality_embeddings.items():
            if len(rows) != wanted[name]:
                raise ValueError(
                    f"Number of {name} tokens ({wanted[name]}) does not match number of {name} "
                    f"embeddings ({len(rows)})"
                )
            found = self._places(name, input_ids, special_token_ids, wanted[name])
            sample, token = found.unbind(dim=1)
            places.append(token * samples + sample)
        # The backward of index_copy waits for nothing; that of masked_scatter would.
        values = torch.cat(list(modality_embeddings.values()))
        like = modality_embeddings.get("text", values)
        merged = like.new_zeros((tokens * samples, like.shape[-1]))
        return merged.index_copy_(0, torch.cat(places), values).view(tokens, samples, -1)

    def _places(
        self, name: str, input_ids: torch.Tensor, special_token_ids: Mapping[str, int], count: int
    ) -> torch.Tensor:
        """Where the ``count`` tokens of a modality, or of text, stand. Shape: [count, 2]."""
        if name != "text":
            return torch.nonzero_static(input_ids == special_token_ids[name], size=count)
        known, self._text_in = self._text_in, None
        if known is not None and known[0] is input_ids:
            return known[1]
        return torch.nonzero_static(~_special(input_ids, special_token_ids), size=count)

    def _embedding(self) -> Any:
        return unwrapped(self.model.language_model).embedding


def _special(input_ids: torch.Tensor, special_token_ids: Mapping[str, int]) -> torch.Tensor:
    """Where a placeholder stands, and no text."""
    if not special_token_ids:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    first, *others = special_token_ids.values()
    found = input_ids == first
    for token in others:
        found |= input_ids == token
    return found

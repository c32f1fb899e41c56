"""Packed sequences (THD): several in a row of tokens, with borders between them.

A global microbatch of packed sequences is [samples, tokens] as any other, each sample a row of
sequences that are joined. ``cu_seqlens`` counts the tokens of the microbatch, row after row: from
0, over the end of each sequence, to samples * tokens. A replica of the language model reads its
rows as one, [1, its samples * tokens], and the borders in them from 0.

Where sequences are padded, the ``_padded`` borders are those of the tokens and the plain ones count
what is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.runtime.rows import Ids

SIDES = ("q", "kv")
KNOWN = frozenset(
    ["qkv_format", "total_tokens"]
    + [name for s in SIDES for name in (f"cu_seqlens_{s}", f"cu_seqlens_{s}_padded")]
    + [f"max_seqlen_{s}" for s in SIDES]
)


@dataclass(frozen=True)
class Packing:
    """The borders of the sequences of one global microbatch, on the host and as they were given."""

    given: Mapping[str, Any]
    borders: Mapping[str, Ids]
    tokens: int
    replicas: int

    def of_replica(self, replica: int) -> dict[str, Any]:
        """The packing of the rows that ``replica`` reads, its tokens counted from 0."""
        found: dict[str, Any] = {"qkv_format": "thd"}
        share = self.tokens // self.replicas
        for side in SIDES:
            of_tokens = self.borders.get(f"cu_seqlens_{side}_padded")
            if of_tokens is None:
                of_tokens = self.borders[f"cu_seqlens_{side}"]
            # Sequences without tokens, as at the end of borders of one size for all microbatches,
            # belong to the replica that begins there; at the end of all, to the last.
            first = int(np.searchsorted(of_tokens, replica * share))
            last = int(np.searchsorted(of_tokens, (replica + 1) * share))
            last = len(of_tokens) - 1 if replica + 1 == self.replicas else last
            for name in (f"cu_seqlens_{side}", f"cu_seqlens_{side}_padded"):
                if name in self.borders:
                    part = self.given[name][first : last + 1]
                    found[name] = part - part[0]
            longest = int(np.diff(of_tokens[first : last + 1]).max())
            like = self.given.get(f"max_seqlen_{side}")
            found[f"max_seqlen_{side}"] = (
                torch.full_like(like, longest) if isinstance(like, torch.Tensor) else longest
            )
        if self.given.get("total_tokens") is not None:
            found["total_tokens"] = share
        return found


def packings(
    name: str, microbatches: Sequence[Mapping[str, Any]], sink: tuple[str, Layout]
) -> list[Packing] | None:
    """The packing of each microbatch, from its input ``name``; None where no sequence is packed.

    Waits for the device if the borders are there.
    Raises: LayoutError for borders that are none, or that a replica of ``sink`` would cut.
    """
    given = [batch.get(name) for batch in microbatches] if name else []
    if all(packing is None for packing in given):
        return None
    module, layout = sink
    for index, packing in enumerate(given):
        if packing is None:
            raise LayoutError(
                f"microbatch {index} has no {name}, others of the step have: pack the sequences of "
                "all of them, or of none"
            )
    if layout.cp > 1:
        raise LayoutError(
            f"{module} ({layout}) cuts sequences over cp{layout.cp}, and {name} packs several into "
            "a row: which tokens a rank gets then is Transformer Engine's own. Write cp=1, or "
            "leave the sequences unpacked."
        )
    return [
        _packing(f"{name} of microbatch {index}", packing, batch["input_ids"], sink)
        for index, (packing, batch) in enumerate(zip(given, microbatches, strict=True))
    ]


def _packing(what: str, given: Any, ids: torch.Tensor, sink: tuple[str, Layout]) -> Packing:
    if not isinstance(given, Mapping):
        raise LayoutError(f"{what} is a {type(given).__name__}: give a dict with cu_seqlens_q")
    unknown = sorted(key for key in given if key not in KNOWN and given[key] is not None)
    if unknown or given.get("qkv_format") not in (None, "thd"):
        wrong = unknown[0] if unknown else f"qkv_format={given['qkv_format']!r}"
        raise LayoutError(
            f"{what} has {wrong}, which cannot be cut by sample; known are "
            f"{', '.join(sorted(KNOWN))}, with qkv_format='thd'"
        )
    borders = {}
    for key in sorted(key for key in KNOWN if key.startswith("cu_seqlens")):
        value = given.get(key)
        if value is None and not key.endswith("_padded"):
            raise LayoutError(f"{what} has no {key}: give cu_seqlens_q and cu_seqlens_kv")
        if value is not None:
            borders[key] = _ascending(f"{what}: {key}", value)
    for side in SIDES:
        _check_borders(what, side, borders, ids, sink)
    return Packing(given, borders, ids.numel(), sink[1].dp)


def _ascending(what: str, value: Any) -> Ids:
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.is_floating_point():
        kind = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise LayoutError(f"{what} is {kind}: give a tensor of integers [sequences + 1]")
    found = value.detach().cpu().numpy().astype(np.int64)
    falls = np.flatnonzero(np.diff(found) < 0)
    if len(found) < 2 or found[0] != 0 or len(falls):
        shown = found[falls[0] : falls[0] + 2] if len(falls) else found[:2]
        raise LayoutError(f"{what} has {shown.tolist()}: it ascends, and begins with 0")
    return found


def _check_borders(
    what: str, side: str, borders: Mapping[str, Ids], ids: torch.Tensor, sink: tuple[str, Layout]
) -> None:
    """Raise LayoutError unless the borders end with the tokens, and each replica's part of them
    begins at one."""
    plain, padded = f"cu_seqlens_{side}", f"cu_seqlens_{side}_padded"
    key = padded if padded in borders else plain
    found, (samples, tokens), (module, layout) = borders[key], ids.shape, sink
    if len(borders[plain]) != len(found):
        raise LayoutError(
            f"{what} has {len(borders[plain])} borders in {plain} and {len(found)} in {padded}: "
            "give one for each sequence and the 0 before them in both"
        )
    if (np.diff(borders[plain]) > np.diff(found)).any():
        raise LayoutError(f"{what} has a sequence that is longer in {plain} than in {padded}")
    if found[-1] != samples * tokens:
        raise LayoutError(
            f"{what}: {key} ends with {found[-1]}, input_ids is [{samples}, {tokens}]: it counts "
            f"all {samples * tokens} tokens of the microbatch, row after row. If the last tokens "
            f"of a row are padding, give {padded}."
        )
    share = samples * tokens // layout.dp
    missing = sorted(set(range(0, samples * tokens, share)) - set(found.tolist()))
    if missing:
        raise LayoutError(
            f"{what}: {key} has no border at {missing[0]}, where the rows of another replica of "
            f"{module} ({layout}) begin ({samples} / {layout.dp} rows of {tokens} tokens each). A "
            "sequence lies in one row."
        )

"""What all ranks must have alike of a step's batches, as a text that they compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils import _pytree as pytree

from colocc.runtime.data import Batches


def fingerprint(batches: Batches) -> str:
    """Names, shapes and a digest of the content of a step's batches."""
    digest = hashlib.sha256()
    leaves = _leaves(batches, digest)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return f"shapes {_shapes(leaves)} content {digest.hexdigest()[:16]}"


def outline(batches: Batches) -> str:
    """What of a step's batches decides on its collectives: names, shapes, the rows of samples."""
    digest = hashlib.sha256()
    leaves = _leaves(batches, digest)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
    for part in batches.chunks or [batches]:
        for rows in part.ragged.rows.values():
            for found in (rows.starts, rows.position, rows.items):
                digest.update(found.tobytes())
    return f"shapes {_shapes(leaves)} rows {digest.hexdigest()[:16]}"


def _leaves(batches: Batches, digest: Any) -> list[Any]:
    """The values of the batches; the digest learns their names, and those that are no tensors."""
    found = []
    for batch in batches.common():
        leaves, spec = pytree.tree_flatten(_by_name(batch))
        digest.update(str(spec).encode())
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                # The repr of an object may hold its address, which differs between ranks.
                plain = isinstance(leaf, (bool, int, float, str, type(None)))
                digest.update((repr(leaf) if plain else type(leaf).__name__).encode())
        found += leaves
    return found


def _by_name(value: Any) -> Any:
    """``value`` with the keys of its mappings sorted: what differs in their order is the same."""
    if not isinstance(value, Mapping):
        return value
    return {key: _by_name(value[key]) for key in sorted(value, key=str)}


def _shapes(leaves: list[Any]) -> list[list[int]]:
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return [list(tensor.shape) for tensor in islice(tensors, 6)]

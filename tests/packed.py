"""Packed sequences for the model of mimo.py: rows of several sequences, and the sequences alone."""

from __future__ import annotations

from typing import Any

import torch

from tests import mimo
from tests.ragged import TOKEN

# By row, the lengths of its sequences; with room for padding at the end of each in ``PADDED``.
LENGTHS = [[5, 7], [12], [3, 4, 5], [6, 6], [1, 11], [4, 8], [7, 5], [2, 10]]
PADDED = [[(5, 6), (4, 6)], [(9, 12)], [(3, 4), (4, 4), (1, 4)], [(6, 6), (6, 6)]] * 2


def row(lengths: list[tuple[int, int]], positions: str, generator: torch.Generator) -> Any:
    """The sequences of one row; one that has room for it has an image at its second token."""
    found = []
    for length, padded in lengths:
        batch = mimo.batch(1, seed=int(torch.randint(1 << 30, (), generator=generator)))
        ids = torch.randint(0, TOKEN - 7, (1, length), generator=generator)
        image = length > mimo.ROWS + 1
        if image:
            ids[:, 1 : 1 + mimo.ROWS] = TOKEN
        places = torch.arange(length).expand(1, -1)
        if positions == "mrope":
            steps = torch.randint(0, 3, (3, 1, length), generator=generator)
            places = steps.cumsum(dim=2)
        sequence = {
            "input_ids": ids,
            "position_ids": places,
            "labels": batch["labels"][:, :length],
            "loss_mask": batch["loss_mask"][:, :length],
            "modality_inputs": {"images": batch["modality_inputs"]["images"] if image else None},
        }
        found.append((sequence, padded))
    return found


def sequences(padded: bool, positions: str, seed: int) -> list[Any]:
    """The rows of a microbatch, each a list of sequences and the room of each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = PADDED if padded else [[(n, n) for n in found] for found in LENGTHS]
    return [row(one, positions, generator) for one in lengths]


def batch(rows: list[Any]) -> dict[str, Any]:
    """One global microbatch of all rows, packed."""
    every = [one for row in rows for one in row]
    packing: dict[str, Any] = {}
    lengths = torch.tensor([0] + [one["input_ids"].shape[1] for one, _ in every])
    rooms = torch.tensor([0] + [room for _, room in every])
    for side in ("q", "kv"):
        packing[f"cu_seqlens_{side}"] = lengths.cumsum(0).int()
        if not torch.equal(lengths, rooms):
            packing[f"cu_seqlens_{side}_padded"] = rooms.cumsum(0).int()
    packing["max_seqlen_q"] = torch.tensor(999, dtype=torch.int32)
    images = [one["modality_inputs"]["images"] for one, _ in every]
    x = torch.cat([image["vit"]["x"] for image in images if image is not None])
    return {
        **{name: join(rows, name) for name in ("input_ids", "position_ids", "labels", "loss_mask")},
        "modality_inputs": {"images": {"vit": {"x": x}}},
        "packing_kwargs": packing,
    }


def join(rows: list[Any], name: str) -> torch.Tensor:
    """A field of all rows, the room of a sequence filled with zeros."""
    joined = [
        torch.cat(
            [
                torch.nn.functional.pad(one[name], (0, room - one["input_ids"].shape[1]))
                for one, room in row
            ],
            dim=-1,
        )
        for row in rows
    ]
    return torch.cat(joined, dim=-2)

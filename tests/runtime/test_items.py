"""Covers runtime/items.py: what an entry of a value made of items is, and missing inputs."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from colocc.errors import LayoutError
from colocc.passes.graph import Entries, Places
from colocc.runtime.items import Learned, ModuleItems

COUNTS = [[2, 0, 3], [0, 1, 0]]


def module(**changed: Any) -> ModuleItems:
    """Of two microbatches, samples with so many rows; each item makes as many as ``sizes`` says."""
    microbatches: list[dict[str, Any]] = [
        {"sizes": torch.tensor([2, 1, 2]), "pixels": torch.arange(3), **changed},
        {"sizes": torch.tensor([1]), "pixels": torch.arange(1)},
    ]
    masks = [(torch.arange(4)[None] < torch.tensor(counts)[:, None]).numpy() for counts in COUNTS]
    return ModuleItems(
        Places("eyes", (), ("sizes", "pixels"), stated=True),
        microbatches,
        masks,
        1,
        lambda given: given["sizes"],
        Learned(),
        sizes=[{}, {}],
    )


def test_a_row_may_be_several_entries() -> None:
    rows = module().entries(Entries(sympy.Integer(4), by_row=True))
    assert rows.counts.tolist() == [8, 0, 12, 0, 4, 0]
    assert rows.items.tolist() == [8, 4, 8, 4]
    assert len(rows.position) == 24


def test_an_item_may_be_several_entries() -> None:
    sizes = sympy.Symbol("pixels.shape[1]")
    masks = [(torch.arange(4)[None] < torch.tensor([[2], [0], [4]])).numpy()]
    places = Places("eyes", (), ("pixels",), each=sympy.Integer(2))
    given = [{"pixels": torch.zeros(3, 5)}]
    alike = ModuleItems(places, given, masks, 1, None, Learned(), sizes=[{sizes: 5}])
    rows = alike.entries(Entries(sizes + 1, by_row=False))
    assert rows.counts.tolist() == [6, 0, 12]
    assert rows.items.tolist() == [6, 6, 6]


def test_inputs_of_the_same_items_come_together() -> None:
    with pytest.raises(LayoutError, match="microbatch 0 has sizes and lacks pixels"):
        module(pixels=None)

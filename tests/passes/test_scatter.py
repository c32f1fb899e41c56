"""Covers passes/scatter.py: which scatters keep samples apart, and under which guard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from colocc.errors import CaptureError
from colocc.passes.guards import ScatterGuard
from tests.passes.kit import PAIR_LAYOUTS, graph_of

Merge = Callable[["Model", Tensor, Tensor, Tensor], Tensor]
BATCH = {"ids": torch.zeros(8, 6, dtype=torch.int64), "pixels": torch.zeros(8, 4)}


class Model(nn.Module):
    """Two rows of 8 for each sample, written where ``merge`` says."""

    def __init__(self, merge: Merge) -> None:
        super().__init__()
        self.vision, self.language, self.merge = nn.Linear(4, 16), nn.Linear(8, 8), merge

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        rows = self.vision(pixels).unflatten(1, (2, 8))
        text = ids.unsqueeze(-1).expand(-1, -1, 8).float()
        out: Tensor = self.language(self.merge(self, text, ids, rows))
        return out


def guard_of(merge: Merge) -> ScatterGuard:
    graph = graph_of(Model(merge), PAIR_LAYOUTS, BATCH)
    assert graph.guards is not None
    (guard,) = graph.guards.scatters
    return guard


def one_place_for_a_row(model: Model, text: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return text.masked_scatter((ids == 9).unsqueeze(-1), rows)


def one_place_for_an_element(model: Model, text: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return text.masked_scatter((ids.unsqueeze(-1) + torch.zeros(8)) == 9, source=rows)


def an_expanded_mask(model: Model, text: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    mask = (ids == 9).unsqueeze(-1).expand_as(text).to(text.device)
    return text.masked_scatter(mask, rows)


def an_index(model: Model, text: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    text = text.clone()
    text[ids == 9] = rows.flatten(0, 1)
    return text


@pytest.mark.parametrize(
    ("merge", "places"),
    [
        (one_place_for_a_row, 2),
        (one_place_for_an_element, 16),
        (an_expanded_mask, 2),
        (an_index, 2),
    ],
)
def test_the_places_that_each_sample_must_have(merge: Merge, places: int) -> None:
    guard = guard_of(merge)
    assert guard.rows == places
    assert "passes/test_scatter.py:" in guard.line


def a_mask_of_values(model: Model, text: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return text.masked_scatter(rows.sum(1, keepdim=True) > 0, rows)


def a_mask_of_weights(model: Model, text: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return text.masked_scatter(model.vision.weight[:1, :1] > 0, rows)


def samples_behind(model: Model, text: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    mask = (ids == 9).t().unsqueeze(-1)
    return text.transpose(0, 1).masked_scatter(mask, rows).transpose(0, 1)


@pytest.mark.parametrize("merge", [a_mask_of_values, a_mask_of_weights, samples_behind])
def test_other_scatters_are_refused(merge: Merge) -> None:
    with pytest.raises(CaptureError) as info:
        graph_of(Model(merge), PAIR_LAYOUTS, BATCH)
    message = str(info.value)
    assert "masked_scatter on a tensor that is split by sample may mix samples" in message
    assert "passes/test_scatter.py:" in message and "@colocc.leaf" in message

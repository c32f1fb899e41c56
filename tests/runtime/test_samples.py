"""Covers runtime/samples.py: the samples that are dealt by their rows, and how even that is."""

from __future__ import annotations

import itertools

import pytest
import torch

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Graph, token_places
from colocc.runtime.data import Batches
from colocc.runtime.holdings import deals
from colocc.runtime.samples import imbalances, step_samples

TOKEN, LENGTH = 9, 12
FAN_IN = {"images": Layout(dp=8), "language": Layout(tp=4, dp=2)}
FAN_OUT = {"images": Layout(tp=8), "language": Layout(tp=2, dp=4)}
# The rows of each sample, by microbatch; samples 0 to 3 are replica 0's.
ROWS = [[12, 6, 0, 3, 3, 3, 3, 3], [9, 0, 3, 3, 3, 3, 3, 3]]


def graph_of(layouts: dict[str, Layout]) -> Graph:
    """What a MimoModel leaves of itself here: its inputs and its placeholder."""
    rows = token_places({"images": TOKEN})
    graph = Graph(torch.fx.Graph(), "model", layouts, {}, sink="language", rows=rows)
    for path in (("input_ids",), ("modality_inputs", "images")):
        node = graph.fx.placeholder(path[-1])
        node.meta |= {"path": path, "module": "language" if len(path) == 1 else "images"}
    return graph


def batches(graph: Graph, rank: int, *, balance: bool) -> Batches:
    step = []
    for microbatch, rows in enumerate(ROWS):
        ids = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
        for sample, count in enumerate(rows):
            ids[sample, :count] = TOKEN
        # Each image of 3 rows says whose it is.
        codes = [10 * microbatch + s for s, count in enumerate(rows) for _ in range(count // 3)]
        step.append({"input_ids": ids, "modality_inputs": {"images": torch.tensor(codes)}})
    return Batches(graph, step, rank, {}, balance=balance)


@pytest.mark.parametrize("dealt", [True, False])
def test_samples_are_those_that_the_encoders_are_given(dealt: bool) -> None:
    graph = graph_of(FAN_IN)
    (images,) = (n for n in graph.placeholders() if n.meta["module"] == "images")
    everything = []
    for rank in range(8):
        pairs = step_samples(graph, [range(2)], 8, rank, {"images": ROWS} if dealt else None)
        mine = pairs["images"]
        everything += mine
        wanted = [10 * m + s for m, s in mine for _ in range(ROWS[m][s] // 3)]
        given = batches(graph, rank, balance=dealt).encoder_input(images)
        # A rank without an image gets one, whose rows count for nothing.
        assert given.tolist() == (wanted or [0])
        assert pairs["language"] == [
            (m, s) for m in range(2) for s in range(rank // 4 * 4, rank // 4 * 4 + 4)
        ]
    assert sorted(everything) == list(itertools.product(range(2), range(8)))


def test_each_chunk_is_dealt_by_itself() -> None:
    graph = graph_of(FAN_IN)
    for rank in range(8):
        parts = [
            step_samples(graph, [range(1)], 8, rank, {"images": [rows]})["images"] for rows in ROWS
        ]
        both = step_samples(graph, [range(1), range(1, 2)], 8, rank, {"images": ROWS})["images"]
        assert both == parts[0] + [(1, sample) for _, sample in parts[1]]


def test_imbalance_before_and_after() -> None:
    """Replica 0 in order: 18 rows, 3, 9, 6 on its slots; dealt: 12, 9, 9, 6. The mean of all slots
    is 7.5."""
    graph = graph_of(FAN_IN)
    dealt = imbalances(graph, [batches(graph, 0, balance=True)])["images"]
    assert dealt == pytest.approx((18 / 7.5, 12 / 7.5))
    kept = imbalances(graph, [batches(graph, 0, balance=False)])["images"]
    assert kept == pytest.approx((18 / 7.5, 18 / 7.5))


def test_where_nothing_can_be_dealt_no_rows_are_asked_for() -> None:
    assert deals(graph_of(FAN_IN), "images") and not deals(graph_of(FAN_IN), "language")
    assert not deals(graph_of(FAN_OUT), "images")
    assert len(step_samples(graph_of(FAN_OUT), [range(2)], 8, 0, {})["images"]) == 16


def test_rows_that_do_not_cover_the_step_are_refused() -> None:
    graph = graph_of(FAN_IN)
    for rows in ({}, {"images": ROWS[:1]}, {"images": [[1] * 7] * 2}):
        with pytest.raises(LayoutError, match=r"rows of each of 8 samples, .* balance=False"):
            step_samples(graph, [range(2)], 8, 0, rows)

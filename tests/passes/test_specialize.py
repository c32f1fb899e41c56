"""Specialize: one rank's part of the graph."""

from __future__ import annotations

import pytest

from colocc.layout import Layout
from colocc.passes.dump import page
from colocc.passes.graph import Graph
from colocc.passes.specialize import specialize
from colocc.passes.verify import verify
from tests.passes.kit import pair_graph, trio_graph

ENCODE = ["images", "clips", "vision", "vision_language", "audio", "audio_language"]


def names(graph: Graph) -> list[str]:
    return sorted(n.name for n in graph.fx.nodes)


def test_the_first_stage_merges_and_hands_on() -> None:
    mine = specialize(trio_graph(), rank=0)
    assert names(mine) == sorted([*ENCODE, "mask", "unsqueeze", "where", "language", "output"])
    assert str(mine.output().args[0]) == "language"


def test_the_last_stage_has_no_merge_and_loads_no_mask() -> None:
    mine = specialize(trio_graph(), rank=7)
    assert names(mine) == sorted([*ENCODE, "language", "output"])
    call = next(n for n in mine.fx.nodes if n.name == "language")
    assert call.args == (None,)


@pytest.mark.parametrize("rank", range(8))
def test_every_rank_takes_part_in_every_redistribution(rank: int) -> None:
    graph = trio_graph()
    mine = specialize(graph, rank=rank)
    verify(mine, after="specialize")
    assert [n.name for n in mine.fx.nodes if n.name in graph.plans] == list(graph.plans)
    assert mine.plans is graph.plans


def test_ranks_of_one_stage_run_the_same_graph() -> None:
    graph = trio_graph(language=Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp"))
    pages = [page(specialize(graph, rank=rank), "specialize") for rank in range(8)]
    assert pages[0] == pages[1] == pages[4] == pages[5]
    assert pages[2] == pages[3] == pages[6] == pages[7]
    assert pages[0] != pages[2]


def test_the_graph_of_all_ranks_stays_as_it_is() -> None:
    graph = trio_graph()
    before = page(graph)
    specialize(graph, rank=7)
    assert page(graph) == before


def test_without_a_pipeline_nothing_is_dropped() -> None:
    graph = pair_graph()
    assert page(specialize(graph, rank=3)) == page(graph)

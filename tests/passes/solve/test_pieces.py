"""Pieces have one owner and one reader; places are those of the ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from colocc.layout import Layout
from colocc.passes.solve.boxes import overlap
from colocc.passes.solve.pieces import pieces_of, places_of
from colocc.passes.solve.plan import Holding
from colocc.passes.solve.solver import holdings
from tests.passes.solve.pairs import SEQUENCE

SRC, DST = Layout(tp=2, dp=6, sp=True), Layout(tp=3, cp=2, dp=2, zigzag=True, order="cp-tp-dp")


def ends() -> tuple[Holding, Holding, tuple[int, ...]]:
    language = ("language", DST)
    return holdings(("images", SRC), language, language, SEQUENCE)


def test_pieces_are_the_grid_cut_at_the_borders_of_both_ends() -> None:
    have, need, grid = ends()
    pieces = pieces_of(have, need)
    assert (pieces.high - pieces.low).prod(axis=1).sum() == np.prod(grid)
    for holding, numbers in ((have, pieces.owner), (need, pieces.reader)):
        boxes = dict(zip(places_of(holding).index.tolist(), holding.boxes(), strict=True))
        for low, high, number in zip(pieces.low, pieces.high, numbers.tolist(), strict=True):
            for first, last, cut in zip(low.tolist(), high.tolist(), boxes[number], strict=True):
                assert overlap(((first, last),), cut) == last - first


def test_pieces_turned_are_those_of_the_way_back() -> None:
    have, need, _ = ends()
    there, back = pieces_of(have, need).turned(), pieces_of(need, have)
    for name in ("low", "high", "owner", "reader"):
        assert np.array_equal(getattr(there, name), getattr(back, name))


@pytest.mark.parametrize("side", [0, 1])
def test_base_and_lane_of_a_holder_make_its_rank(side: int) -> None:
    places = places_of(ends()[:2][side])
    assert (places.base[places.index] + places.lane).tolist() == list(range(12))


def test_a_stage_that_holds_nothing_stands_for_the_first() -> None:
    layout = Layout(tp=2, pp=2, dp=2)
    have = replace(ends()[0], layout=layout, stages=(0,))
    places = places_of(have)
    assert places.holds.tolist() == [True] * 4 + [False] * 4
    assert (places.base[places.index] + places.lane).tolist() == [0, 1, 2, 3] * 2

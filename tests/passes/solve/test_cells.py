"""Pieces as functions: what they have in common, and where they differ."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocc.errors import VerifyError
from colocc.passes.solve.cells import Pieces, differs, keys, meet

Box = tuple[int, tuple[int, int], tuple[int, int]]
ranges = st.tuples(st.integers(0, 4), st.integers(1, 4)).map(lambda pair: (pair[0], sum(pair)))
boxes = st.lists(st.tuples(st.integers(0, 2), ranges, ranges), max_size=6)


def pieces(found: list[Box]) -> Pieces:
    rows = sorted(found)
    return Pieces(
        np.array([owner for owner, _, _ in rows], dtype=np.int64),
        np.array([[a, c] for _, (a, _), (c, _) in rows], dtype=np.int64).reshape(-1, 2),
        np.array([[b, d] for _, (_, b), (_, d) in rows], dtype=np.int64).reshape(-1, 2),
    )


def count(found: list[Box]) -> Counter[tuple[int, int, int]]:
    return Counter(
        (owner, x, y) for owner, one, two in found for x, y in product(range(*one), range(*two))
    )


@given(boxes, boxes)
def test_boxes_differ_exactly_where_their_cells_do(left: list[Box], right: list[Box]) -> None:
    cells = [count(side) for side in (left, right)]
    owners = [i for i in range(3) if _of(cells[0], i) != _of(cells[1], i)]
    assert differs(pieces(left), pieces(right), 3) == (owners[0] if owners else None)


def _of(cells: Counter[tuple[int, int, int]], owner: int) -> dict[tuple[int, int, int], int]:
    return {cell: times for cell, times in cells.items() if cell[0] == owner}


@given(boxes)
def test_boxes_do_not_differ_from_the_same_cells_in_other_boxes(found: list[Box]) -> None:
    single = [
        (i, (x, x + 1), (y, y + 1)) for (i, x, y), n in count(found).items() for _ in range(n)
    ]
    assert differs(pieces(found), pieces(single), 3) is None


@given(boxes, boxes)
def test_boxes_meet_in_their_common_cells(left: list[Box], right: list[Box]) -> None:
    index, found = meet(pieces(left), pieces(right))
    cells = [count(side) for side in (left, right)]
    assert found.cells().sum() == sum(n * cells[1][cell] for cell, n in cells[0].items())
    assert (pieces(left).owner[index] == found.owner).all()


def test_a_grid_too_large_to_number_is_refused() -> None:
    with pytest.raises(VerifyError, match="too large to check"):
        keys([np.zeros(1, dtype=np.int64)] * 4, [1 << 20] * 4)

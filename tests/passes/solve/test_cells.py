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


def tiles(size: int) -> list[Box]:
    """A square of 12 x 12 cells for each of two owners, in tiles of so many cells a side."""
    starts = range(0, 12, size)
    return [
        (owner, (x, x + size), (y, y + size)) for owner, x, y in product(range(2), starts, starts)
    ]


@pytest.mark.parametrize("other", [1, 3, 6, 12])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_tiles_of_any_size_are_told_from_tiles_with_one_lost_doubled_or_moved(
    size: int, other: int
) -> None:
    # Few large tiles have fewer corners than parts, many small ones fewer parts.
    whole = pieces(tiles(other))
    assert differs(pieces(tiles(size)), whole, 2) is None
    for index, (owner, (a, b), (c, d)) in enumerate(tiles(size)):
        rest = [tile for place, tile in enumerate(tiles(size)) if place != index]
        same = next(tile for tile in rest if tile[0] == owner)
        shifted = (owner, (a + 1, b + 1), (c, d))
        swapped = (1 - owner, (a, b), (c, d))
        for wrong in (rest, [*tiles(size), same], [*rest, same], [*rest, shifted]):
            assert differs(pieces(wrong), whole, 2) == owner
            assert differs(whole, pieces(wrong), 2) == owner
        assert differs(pieces([*rest, swapped]), whole, 2) == 0


@pytest.mark.parametrize("size", [1, 12])
def test_what_is_compared_stays_as_it_is(size: int) -> None:
    mine, other = pieces(tiles(size)), pieces(tiles(12))
    turned = Pieces(mine.owner[::-1].copy(), mine.low[::-1].copy(), mine.high[::-1].copy())
    before = turned.owner.copy(), turned.low.copy(), turned.high.copy()
    assert differs(turned, other, 2) is None
    for array, old in zip((turned.owner, turned.low, turned.high), before, strict=True):
        assert (array == old).all()


def test_empty_boxes_among_others_hold_nothing() -> None:
    empty = [(0, (1, 1), (0, 12)), (1, (2, 9), (5, 5)), (1, (0, 0), (0, 0))]
    whole = pieces(tiles(12))
    assert differs(pieces([*tiles(3), *empty]), whole, 2) is None
    assert differs(pieces([*tiles(12), *empty]), pieces(tiles(1)), 2) is None
    assert differs(pieces([*tiles(12)[:1], *empty]), whole, 2) == 1
    # As many parts as pieces, of other pieces.
    assert differs(pieces([(0, (0, 0), (0, 2)), (0, (1, 3), (0, 2))]), pieces([]), 1) == 0
    two = pieces([(0, (0, 0), (4, 5)), (0, (1, 3), (0, 1))])
    assert differs(two, pieces([(0, (1, 2), (0, 1)), (0, (2, 3), (0, 1))]), 1) is None


@pytest.mark.parametrize("box", [((-1, 12), (0, 12)), ((12, 0), (0, 12)), ((0, 12), (12, 12))])
def test_what_is_no_box_of_the_grid_is_told_from_all_of_it(
    box: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    whole = (0, (0, 12), (0, 12))
    assert differs(pieces([(0, *box)]), pieces([whole]), 1) is not None

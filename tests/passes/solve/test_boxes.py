"""Boxes: their cells, and the products of intervals that they are."""

from hypothesis import given
from hypothesis import strategies as st

from colocc.passes.solve.boxes import length, overlap, pieces, volume

intervals = st.lists(st.integers(0, 40), max_size=8, unique=True).map(
    lambda ends: tuple(zip(*[iter(sorted(ends)[: len(ends) // 2 * 2])] * 2, strict=True))
)


@given(intervals, intervals)
def test_length_and_overlap_count_units(
    left: tuple[tuple[int, int], ...], right: tuple[tuple[int, int], ...]
) -> None:
    a = {unit for start, stop in left for unit in range(start, stop)}
    b = {unit for start, stop in right for unit in range(start, stop)}
    assert length(left) == len(a)
    assert overlap(left, right) == overlap(right, left) == len(a & b)


def test_the_pieces_of_a_box_are_products_of_its_intervals() -> None:
    box = (((0, 1), (2, 3)), ((4, 6),))
    assert list(pieces(box)) == [((0, 4), (1, 6)), ((2, 4), (3, 6))]
    assert volume(box) == 4
    assert list(pieces(())) == []
    assert volume(()) == 0

"""Covers colocc/sequence.py."""

import itertools

import numpy as np
import pytest

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.sequence import axes_of, check_length, cuts, form, part_of, same_sequence


def expand(intervals: tuple[tuple[int, int], ...]) -> list[int]:
    return [chunk for start, stop in intervals for chunk in range(start, stop)]


def by_definition(layout: Layout, chunks: int) -> list[list[int]]:
    """The chunks of every part, cut as Megatron cuts: over cp, in zigzag or not, then over tp."""
    parts = []
    for cp in range(layout.cp):
        if layout.zigzag and layout.cp > 1:
            halves = np.arange(chunks).reshape(2 * layout.cp, -1)
            local = np.concatenate([halves[cp], halves[2 * layout.cp - 1 - cp]])
        else:
            local = np.arange(chunks).reshape(layout.cp, -1)[cp]
        lanes = layout.tp if layout.sp else 1
        parts += [lane.tolist() for lane in local.reshape(lanes, -1)]
    return parts


ALL = [
    Layout(tp=tp, cp=cp, sp=sp, zigzag=zigzag)
    for tp, cp, sp, zigzag in itertools.product((1, 2, 3, 4), (1, 2, 3, 4), (0, 1), (0, 1))
    for sp, zigzag in [(bool(sp), bool(zigzag))]
]


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_parts_are_what_the_definition_cuts(layout: Layout) -> None:
    chunks, parts = cuts(layout)
    assert [expand(part) for part in parts] == by_definition(layout, chunks)
    assert all(a[1] < b[0] for part in parts for a, b in itertools.pairwise(part))
    assert sorted(chunk for part in parts for chunk in expand(part)) == list(range(chunks))


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_a_rank_s_part_is_that_of_its_coordinates(layout: Layout) -> None:
    numbers = part_of(layout)
    for rank in range(layout.size):
        cp, tp = (int(layout.coordinates(axis)[rank]) for axis in ("cp", "tp"))
        assert numbers[rank] == (cp * layout.tp + tp if layout.sp else cp)
    assert bool(axes_of(layout)) == (len(cuts(layout)[1]) > 1)


def test_flags_that_cut_nothing_change_nothing() -> None:
    assert axes_of(Layout(dp=4, sp=True, zigzag=True)) == ()
    assert same_sequence(Layout(dp=4), Layout(dp=4, sp=True, zigzag=True))
    assert not same_sequence(Layout(cp=2), Layout(cp=2, zigzag=True))


def test_lengths() -> None:
    layout = Layout(tp=2, cp=2, sp=True, zigzag=True)
    check_length("it", 8, layout)
    with pytest.raises(LayoutError, match=r"6 % 4 = 2. Make it a multiple of 4"):
        check_length("it", 6, layout)


def test_forms_read_like_arithmetic() -> None:
    assert form(Layout(tp=2, dp=4)) == ""
    assert form(Layout(tp=2, cp=2, sp=True)) == "chunk r%2 + 2*(r//2) of 4"
    assert form(Layout(cp=4, dp=2, zigzag=True)) == "chunks c and 7-c of 8, c = r%4"
    text = form(Layout(tp=2, cp=2, sp=True, zigzag=True))
    assert text == "part r%2 of 2 of chunks c and 3-c of 4, c = r//2"

"""Covers runtime/fragments.py: where pieces lie in what a rank holds."""

import itertools

import pytest
import torch

from colocc.layout import Layout
from colocc.passes.solve.boxes import Box
from colocc.passes.solve.solver import solve
from colocc.runtime.fragments import Cut, box_of, held, join, locate, merged, runs_of, shape_of

ZIGZAG: Box = (((0, 2), (6, 8)), ((0, 1), (3, 4)))


def test_a_piece_is_a_slice_of_each_dim() -> None:
    piece: Box = (((7, 8),), ((3, 4),))
    cut = locate(piece, [(((0, 8),), ((0, 2),)), ZIGZAG])
    assert cut == Cut(1, (3, 1), (1, 1))
    fragment = torch.arange(4 * 2 * 2 * 3).reshape(8, 6)
    assert torch.equal(cut.of([fragment[:0], fragment], (2, 3)), fragment[6:8, 3:6])


def test_a_piece_across_two_intervals_is_no_slice() -> None:
    with pytest.raises(ValueError, match="is in none of"):
        locate((((1, 7),), ((0, 1),)), [ZIGZAG])


def test_the_pieces_of_a_box_are_in_the_order_of_its_elements() -> None:
    pieces = list(runs_of(ZIGZAG))
    assert [locate(piece, [ZIGZAG]).starts for piece in pieces] == [(0, 0), (0, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("boxes", "joined"),
    [
        ([(((0, 1),),), (((1, 2),),)], (((0, 2),),)),
        ([(((0, 1),),), (((3, 4),),)], (((0, 1), (3, 4)),)),
        ([(((3, 4),),), (((0, 1),),)], None),
        ([(((0, 1),), ((0, 2),)), (((1, 2),), ((0, 2),))], (((0, 2),), ((0, 2),))),
        ([(((0, 1),), ((0, 2),)), (((1, 2),), ((2, 4),))], None),
        ([(((0, 1),), ((0, 2),)), (((0, 1),), ((2, 4),))], None),
        ([], None),
    ],
)
def test_boxes_that_lie_in_memory_as_one(boxes: list[Box], joined: Box | None) -> None:
    assert join(boxes) == joined


def test_a_later_stage_has_no_samples_of_its_part() -> None:
    src, dst = Layout(tp=2, dp=4), Layout(cp=2, pp=2, dp=2)
    plan = solve(("images", src), ("language", dst), dims=("sample", "sequence"))
    assert [box_of(plan.dst, rank)[0] for rank in range(4, 8)] == [()] * 4
    assert box_of(plan.dst, 5)[1] == ((1, 2),)
    assert shape_of(box_of(plan.dst, 5), (3, 4), (5,)) == (0, 4, 5)


def test_what_ranks_hold_is_known_step_by_step() -> None:
    src, dst = Layout(tp=4, dp=2), Layout(tp=8)
    plan = solve(("images", src), ("language", dst), ranks_per_node=4)
    assert len(plan.forward) == 2
    for rank in range(8):
        fetched, whole = (cells(held(plan.forward[:n], plan.src, rank)) for n in (1, 2))
        assert fetched < whole
        assert whole == set(itertools.product(range(plan.grid[0]), range(plan.grid[1])))


def cells(boxes: list[Box]) -> set[tuple[int, ...]]:
    """The cells of ``boxes``, each of them once."""
    runs = [[range(a, b) for ((a, b),) in piece] for box in boxes for piece in runs_of(box)]
    found = [cell for piece in runs for cell in itertools.product(*piece)]
    assert len(found) == len(set(found))
    return set(found)


def test_intervals_that_touch_are_one() -> None:
    assert merged(((0, 1), (1, 3), (4, 5))) == ((0, 3), (4, 5))
    assert merged(()) == ()

"""Covers runtime/pairing.py: placeholders and items of one step, counted on the host."""

from __future__ import annotations

import numpy as np
import pytest

from colocc.errors import LayoutError
from colocc.runtime.pairing import rows_each


def each(counts: list[list[int]], numbers: list[int], known: int | None = None) -> int:
    return rows_each("images", [np.array(count) for count in counts], numbers, known, "pixels")


def test_what_matches() -> None:
    assert each([[0, 3, 6], [3, 0, 0]], [3, 1]) == 3
    assert each([[0, 3, 6], [3, 0, 0]], [3, 1], known=3) == 3
    assert each([[0, 0]], [0]) == 0
    assert each([[0, 0]], [0], known=3) == 0
    # Of nothing is known yet, so six may be two of three or one of six.
    assert each([[6, 0]], [1]) == 6


@pytest.mark.parametrize(
    ("counts", "numbers", "known", "message"),
    [
        (
            [[3, 3], [3, 2]],
            [2, 2],
            None,
            "11 / 4 is not whole: most samples with any have 3, but sample 1 of microbatch 1 has 2",
        ),
        ([[2, 4]], [2], None, "items, 3 each, but sample 0 of microbatch 0 has 2"),
        (
            [[3, 3], [3, 3]],
            [3, 1],
            None,
            "3 each, but microbatch 0 has 6 placeholders for 3 items: one is without the other",
        ),
        (
            [[6, 0]],
            [1],
            3,
            "an item of this shape makes 3 rows, but microbatch 0 has 6 placeholders for 1 items",
        ),
        ([[2, 2]], [2], 3, "makes 3 rows, but sample 0 of microbatch 0 has 2"),
        ([[0, 0], [0, 5]], [0, 0], None, "sample 1 of microbatch 1 has 5 placeholders"),
        ([[0, 0], [0, 0]], [0, 2], None, "2 items and no placeholder in input_ids"),
    ],
)
def test_what_does_not(
    counts: list[list[int]], numbers: list[int], known: int | None, message: str
) -> None:
    with pytest.raises(LayoutError) as info:
        each(counts, numbers, known)
    assert message in str(info.value)

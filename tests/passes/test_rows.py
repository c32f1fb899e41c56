"""Covers passes/rows.py: which dim holds samples, and how many rows each has."""

import pytest

from colocc.errors import LayoutError
from colocc.passes.rows import BatchDim, Rows, dim_of, has_rows, rows_per_sample


@pytest.mark.parametrize(
    ("said", "dim", "rows"), [(0, 0, False), (2, 2, False), (None, None, False), (Rows(1), 1, True)]
)
def test_what_is_said_of_an_input(said: BatchDim, dim: int | None, rows: bool) -> None:
    dims = {"x": said}
    assert (dim_of(dims, "x"), has_rows(dims, "x")) == (dim, rows)
    assert (dim_of(dims, "other"), has_rows(dims, "other")) == (0, False)


def test_rows_that_do_not_divide() -> None:
    assert rows_per_sample("pixels", 12, 4) == 3
    with pytest.raises(LayoutError, match=r"pixels has 13 rows for 4 samples: 13 % 4 = 1\."):
        rows_per_sample("pixels", 13, 4)

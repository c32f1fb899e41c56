"""Covers runtime/finite.py: which sample an entry belongs to; test_intake.py has it on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colocc import passes
from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Graph
from colocc.runtime.data import Batches
from colocc.runtime.finite import check_finite
from tests.plain import LAYOUTS, Model, batch


def graph() -> Graph:
    return passes.run(
        Model().double(),
        LAYOUTS,
        reductions=dict.fromkeys(LAYOUTS, "mean"),
        example_inputs=batch(),
    )


def said(found: Graph, given: dict[str, Any], rank: int) -> str | None:
    try:
        check_finite(Batches(found, [given], rank, {}), found.placeholders())
    except LayoutError as error:
        return str(error)
    return None


def test_only_the_ranks_that_read_a_sample_see_it() -> None:
    """vision is tp2 dp4, so that ranks 4 and 5 hold the samples 8 to 11."""
    assert LAYOUTS["vision"] == Layout(tp=2, dp=4)
    found, given = graph(), batch()
    assert all(said(found, given, rank) is None for rank in range(8))
    given["images"][11, 0, 0, 0] = float("inf")
    given["images"][10, 2, 1, 0] = float("nan")
    texts = [said(found, given, rank) for rank in range(8)]
    assert [rank for rank, text in enumerate(texts) if text] == [4, 5]
    assert texts[4] == (
        "images of microbatch 0 has 1 NaN and 1 inf, the first in sample 10. Skip this batch, or "
        "mend what makes it."
    )


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_every_input_of_floating_point_is_looked_at(value: float) -> None:
    found, given = graph(), batch()
    given["clips"][3] = torch.full_like(given["clips"][3], value)
    # audio is tp8: every rank reads all samples.
    for rank in range(8):
        text = said(found, given, rank)
        assert text is not None and "clips of microbatch 0" in text and "sample 3" in text

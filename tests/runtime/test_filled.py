"""Covers runtime/filled.py, pipeline.py and channels.py: against the oracle, and what is refused."""

from functools import partial
from typing import Any

import pytest

import colocc
from colocc import Layout, LayoutError
from colocc.runtime import cpu
from tests import mimo
from tests.harness import ProcessPool
from tests.runtime.test_schedule import (
    ORDERS,
    TUPLES,
    Oracle,
    batches,
    check,
    layouts_of,
    reference,  # noqa: F401 - a fixture
)


def legal(encoder: tuple[int, int], language: tuple[int, int, int], order: str) -> bool:
    """Whether the tp groups of the encoder lie inside stages; counted here rank by rank."""
    layouts = layouts_of(encoder, language, order)
    stage = layouts["language"].coordinates("pp").tolist()
    groups = layouts["images"].groups("tp")
    return language[1] > 1 and all(len({stage[r] for r in group}) == 1 for group in groups)


CASES = [
    (encoder, language, order)
    for encoder, language in TUPLES
    for order in ORDERS
    if language[1] > 1
]
LEGAL = [case for case in CASES if legal(*case)]
REFUSED = [case for case in CASES if not legal(*case)]
TWO = ((1, 2), (1, 2, 1), ORDERS[0])


@pytest.mark.parametrize(("encoder", "language", "order"), LEGAL)
def test_filled_equals_the_oracle(
    processes: ProcessPool,
    reference: Oracle,  # noqa: F811
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
) -> None:
    pp = language[1]
    counts = tuple(sorted({1, pp, pp + 1, 6}))
    check(processes, reference, layouts_of(encoder, language, order), counts, schedule="filled")


@pytest.mark.parametrize("portions", [1, 2, 3, 8])
@pytest.mark.parametrize(("encoder", "language", "order"), [TWO, ((1, 4), (1, 4, 1), ORDERS[0])])
def test_any_number_of_portions(
    processes: ProcessPool,
    reference: Oracle,  # noqa: F811
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
    portions: int,
) -> None:
    layouts = layouts_of(encoder, language, order)
    check(processes, reference, layouts, (1, 5), schedule=f"filled={portions}")


@pytest.mark.parametrize("overlap", [False, True])
def test_reductions_that_overlap_backward(
    processes: ProcessPool,
    reference: Oracle,  # noqa: F811
    overlap: bool,
) -> None:
    check(processes, reference, layouts_of(*TWO), (4, 3, 4), schedule="filled", overlap=overlap)

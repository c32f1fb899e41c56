"""Covers runtime/agreement.py: what one rank brings, all of them hear."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from colocc.errors import LayoutError
from colocc.runtime.agreement import Agreement, parse_check
from colocc.runtime.groups import DEFAULT_TIMEOUT
from tests.harness import run_threads


def heard(agreement: Agreement, text: str, error: Exception | None) -> str:
    try:
        agreement.settle("the batch", text, error)
    except (LayoutError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return "agreed"


def test_every_rank_hears_the_same() -> None:
    def main(rank: int) -> list[str]:
        agreement = Agreement(DEFAULT_TIMEOUT)
        failed = RuntimeError("too big")
        found = [
            heard(agreement, "a", None),
            heard(agreement, "a", failed if rank == 2 else None),
            heard(agreement, "b" if rank in (1, 3) else "a", None),
            heard(agreement, "", failed),
            heard(agreement, "c", None),
        ]
        agreement.close()
        return found

    (texts,) = {tuple(found) for found in run_threads(4, main)}
    assert texts == (
        "agreed",
        "LayoutError: rank 2: too big",
        "LayoutError: the ranks do not agree on the batch: rank 0 has a; rank 1 has b; rank 3 has "
        "b. ranks 1, 3 must be given what rank 0 is given.",
        "RuntimeError: too big",
        "agreed",
    )


def test_one_yes_is_heard_by_all() -> None:
    def main(rank: int) -> list[bool]:
        agreement = Agreement(DEFAULT_TIMEOUT)
        found = [agreement.any(rank == 2), agreement.any(False)]
        agreement.close()
        return [*found, agreement.any(rank == 1)]

    assert run_threads(3, main) == [
        [True, False, False],
        [True, False, True],
        [True, False, False],
    ]


def test_a_closed_one_asks_nobody() -> None:
    def main(rank: int) -> str:
        agreement = Agreement(DEFAULT_TIMEOUT)
        agreement.close()
        found = heard(agreement, "", RuntimeError("mine")) if rank else "asked nobody"
        dist.barrier()
        return found

    assert run_threads(2, main) == ["asked nobody", "RuntimeError: mine"]


def test_checks_by_name() -> None:
    assert [parse_check(name) for name in ("first", "every", "finite")] == [
        "first",
        "every",
        "finite",
    ]
    with pytest.raises(LayoutError, match="check 'nan' is not known: write check='every'"):
        parse_check("nan")

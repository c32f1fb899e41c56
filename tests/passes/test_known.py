"""Covers passes/known.py: what is computed from known integers is known, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from colocc.passes import known
from colocc.passes.known import KnownIntegers


@contextmanager
def grids() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A fake grid whose numbers are known, and another whose are not."""
    real, mode = torch.tensor([[1, 4, 4], [1, 2, 6]]), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        stands, unknown = torch.empty_like(real), torch.empty_like(real)
        integers = KnownIntegers(mode)
        integers.keep(stands, real)
        with integers:
            yield stands, unknown


def test_a_loop_over_known_numbers() -> None:
    with grids() as (grid, _):
        areas = grid[:, 1] * grid[:, 2]
        assert areas.tolist() == [16, 12]
        assert int(torch.arange(5)[areas.argmin()]) == 1


def test_what_meets_an_unknown_is_unknown() -> None:
    with grids() as (grid, unknown):
        for value in (grid + unknown, grid + torch.rand(2, 3), torch.randint(3, (2,))):
            with pytest.raises(DataDependentOutputException):
                value.max().item()


def test_what_is_changed_in_place_is_forgotten() -> None:
    with grids() as (grid, unknown):
        grid.add_(unknown)
        with pytest.raises(DataDependentOutputException):
            grid.max().item()


def test_large_values_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "MOST", 3)
    with grids() as (grid, _), pytest.raises(DataDependentOutputException):
        grid.max().item()

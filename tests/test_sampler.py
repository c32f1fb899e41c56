"""Covers colocc/sampler.py: what ranks load through a real DataLoader, and where they go on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import colocc
from colocc import Layout, LayoutError, Loader, Sampler, Wanted
from colocc.testing import relative_l2
from tests import plain
from tests.harness import run_threads

SIZE, STEP = 40, 16
ONE = {name: Layout() for name in plain.MODULES}


class Samples(torch.utils.data.Dataset[Any]):
    """The samples of tests/plain.py; one of an input that is not wanted is not there."""

    def __init__(self) -> None:
        self.whole = plain.batch(seed=3, size=SIZE)
        self.loaded: list[Wanted] = []

    def __getitem__(self, wanted: Wanted) -> dict[str, Tensor]:
        self.loaded.append(wanted)
        return {name: self.whole[name][wanted.index] for name in wanted.inputs}


def collate(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for sample in found for name in sample}
    return {n: torch.stack([sample[n] for sample in found if n in sample]) for n in names}


def on_rank[R](
    work: Callable[[colocc.Program], R], layouts: dict[str, Layout] = plain.LAYOUTS
) -> Callable[[int], R]:
    def main(_: int) -> R:
        with colocc.compile(
            plain.model(), layouts, example_inputs=plain.batch(), batches="local"
        ) as program:
            return work(program)

    return main


def sampler(program: colocc.Program, **options: Any) -> Sampler:
    return Sampler(program, SIZE, **({"num_microbatches": 1, "batch_size": STEP} | options))


def trained(program: colocc.Program, **batch: Tensor) -> list[Tensor]:
    """The output of a rank, and its gradients before anything reduces them."""
    program.model.zero_grad(set_to_none=True)
    output = program(**batch)
    output.square().sum().backward()
    return [
        output.detach(),
        *(p.grad.clone() for p in program.model.parameters() if p.grad is not None),
    ]


def test_ranks_load_what_they_read_and_train_as_from_global_batches() -> None:
    def work(program: colocc.Program) -> list[list[Wanted]]:
        dataset = Samples()
        steps = sampler(program)
        order = steps.order(0)
        loads = []
        with colocc.compile(program.model, plain.LAYOUTS, example_inputs=plain.batch()) as whole:
            for step, batch in enumerate(Loader(dataset, steps, collate_fn=collate)):
                loads.append(dataset.loaded)
                dataset.loaded = []
                chosen = torch.from_numpy(order[step, 0])
                rows = {name: value[chosen] for name, value in dataset.whole.items()}
                for mine, wanted in zip(
                    trained(program, **batch), trained(whole, **rows), strict=True
                ):
                    # BLAS rounds by where a tensor starts in memory: a view, or one of its own.
                    assert relative_l2(mine, wanted) <= 1e-12
        assert len(loads) == len(steps) == 2
        return loads

    ranks = run_threads(8, on_rank(work))
    modules = {"images": "vision", "clips": "audio", "mask": "decoder"}
    for place, (name, module) in itertools.product(range(2), modules.items()):
        slots: dict[int, set[int]] = {}
        dp = plain.LAYOUTS[module].coordinates("dp").tolist()
        for rank, slot in enumerate(dp):
            mine = {w.index for w in ranks[rank][place] if name in w.inputs}
            assert slots.setdefault(slot, mine) == mine
        # Each sample is in one slot, and no slot has more than its part.
        everything = sorted(index for held in slots.values() for index in held)
        assert len(set(everything)) == len(everything) == STEP
        assert {len(held) for held in slots.values()} == {STEP // len(slots)}
    assert all(wanted.inputs for loads in ranks for load in loads for wanted in load)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    def work(program: colocc.Program) -> None:
        first, other = sampler(program, batch_size=8), sampler(program, batch_size=8, seed=1)
        assert sorted(first.order(0).ravel()) == list(range(SIZE))
        assert np.array_equal(first.order(1), sampler(program, batch_size=8).order(1))
        orders = [first.order(0), first.order(1), other.order(0), other.order(1)]
        for left, right in itertools.combinations(orders, 2):
            assert not np.array_equal(left, right)
        plain_order = sampler(program, shuffle=False, num_microbatches=2, batch_size=8)
        assert plain_order.order(5)[1].tolist() == [[*range(16, 24)], [*range(24, 32)]]

    run_threads(1, on_rank(work, ONE))


def test_the_rest_of_an_epoch() -> None:
    def work(program: colocc.Program) -> None:
        dropped, filled = sampler(program), sampler(program, drop_last=False)
        assert (len(dropped), len(filled)) == (2, 3)
        whole = filled.order(0).ravel()
        assert sorted(whole[:SIZE]) == list(range(SIZE))
        assert np.array_equal(whole[SIZE:], whole[: 3 * STEP - SIZE])
        assert np.array_equal(dropped.order(0).ravel(), whole[: 2 * STEP])

    run_threads(1, on_rank(work, ONE))


class Numbers(torch.utils.data.Dataset[Any]):
    """The index of each sample; workers need no more."""

    def __getitem__(self, wanted: Wanted) -> int:
        return wanted.index


def numbers(found: list[int]) -> list[int]:
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_its_state_was_taken(workers: int) -> None:
    """Workers have fetched steps ahead, which the state does not count."""

    def loader(program: colocc.Program, **options: Any) -> Loader:
        steps = sampler(program, **({"batch_size": 4} | options))
        ahead: dict[str, Any] = {"prefetch_factor": 2} if workers else {}
        return Loader(Numbers(), steps, collate_fn=numbers, num_workers=workers, **ahead)

    def work(program: colocc.Program) -> None:
        whole = loader(program)
        epochs = [list(whole), list(whole)]
        assert [sorted(i for step in epoch for i in step) for epoch in epochs] == [
            [*range(SIZE)]
        ] * 2
        assert epochs[0] != epochs[1]
        cut = loader(program)
        seen = list(itertools.islice(iter(cut), 3))
        state = cut.state_dict()
        assert (state["epoch"], state["position"]) == (0, 12)
        again = loader(program)
        again.load_state_dict(state)
        assert seen + list(again) == epochs[0]
        assert list(again) == epochs[1]
        # With a step that divides the position, the samples go on alike.
        halves = loader(program, num_microbatches=2, batch_size=2)
        halves.load_state_dict(state)
        assert [sorted(step) for step in halves] == [sorted(step) for step in epochs[0][3:]]

    run_threads(1, on_rank(work, ONE))


def test_an_iterator_has_the_state_of_what_it_gave() -> None:
    """As StatefulDataLoader takes it, which counts what was consumed by itself."""

    def work(program: colocc.Program) -> None:
        steps = sampler(program, batch_size=8)
        first = iter(steps)
        next(first), next(first)
        other = iter(steps)
        other.load_state_dict(first.state_dict())
        assert list(first) == list(other)
        assert len(list(steps)) == 5
        steps.set_epoch(4)
        assert [w.index for w in next(iter(steps)) if "mask" in w.inputs] != [
            w.index for w in next(iter(sampler(program, batch_size=8))) if "mask" in w.inputs
        ]

    run_threads(1, on_rank(work, ONE))


def test_what_a_sampler_refuses() -> None:
    def work(program: colocc.Program) -> None:
        for options, message in {
            (("batch_size", 0),): "batch_size is 0: give an integer",
            (("batch_size", 64),): "40 samples make no step of 1 microbatches of 64 = 64",
        }.items():
            with pytest.raises(LayoutError, match=message):
                sampler(program, **dict(options))
        with pytest.raises(LayoutError, match=r"rows of vision has shape \[3\]: .* 40 samples"):
            sampler(program, rows={"vision": [1, 2, 3]})
        steps = sampler(program)
        with pytest.raises(LayoutError, match=r"the state is of a sampler with .*'seed': 7"):
            steps.load_state_dict(sampler(program, seed=7).state_dict())
        with pytest.raises(LayoutError, match="inside a step of 16: 8 % 16 = 8"):
            steps.load_state_dict(steps.state_dict() | {"position": 8})

    run_threads(1, on_rank(work, ONE))

"""200 random ragged batches through one program on 8 ranks, each against the float64 oracle.

Rank r runs the oracle of every eighth batch on a model of its own, and gives it to the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import colocc
from colocc import Layout
from colocc.runtime import cpu
from colocc.testing import Run, float64, oracle
from colocc.testing.names import global_names, gradient_of
from tests import flight, mimo, ragged
from tests.harness import ProcessPool

BATCHES, RANKS, LAYERS = 200, 8, 2
LAYOUTS = {"images": Layout(dp=8), "language": Layout(pp=2, dp=4)}
ALONE = {"images": Layout(dp=8), "language": Layout(dp=8)}


def stream() -> Iterator[list[list[int]]]:
    """Of each batch, by microbatch, the images of each sample. Text-only replicas, microbatches and
    batches are among them."""
    rng = np.random.default_rng(11)
    for _ in range(BATCHES):
        microbatches, size = int(rng.choice((1, 1, 2, 3))), 4 * int(rng.integers(1, 3))
        images = rng.choice(4, p=(0.5, 0.3, 0.1, 0.1), size=(microbatches, 4, size // 4))
        images[rng.random(microbatches) < 0.2] = 0
        images[:, rng.random(4) < 0.2] = 0
        images *= int(rng.random() > 0.05)
        yield [counts.ravel().tolist() for counts in images]


def batches(index: int, images: Sequence[list[int]]) -> list[dict[str, Any]]:
    return [ragged.batch(counts, seed=10 * index + i) for i, counts in enumerate(images)]


def references(rank: int) -> dict[int, Run]:
    """What the oracle says of this rank's batches."""
    with float64(), colocc.process_groups(ALONE) as groups:
        model = mimo.build(groups, ALONE, wrap=False, layers=LAYERS)
        return {
            index: oracle(model, batches(index, images), mimo.loss_func, replicas=1)
            for index, images in enumerate(stream())
            if index % RANKS == rank
        }


class Oracle:
    """The oracle's losses and gradients of all batches, each given by the rank that has them."""

    def __init__(self, rank: int) -> None:
        self.mine = references(rank)
        # A text-only batch has no gradient of the encoder, so the order is one of each rank.
        shapes = {name: g.shape for run in self.mine.values() for name, g in run.gradients.items()}
        self.shapes = dict(sorted(shapes.items()))

    def get(self, index: int) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and flat gradients of one batch; collective."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        flat = torch.zeros(sum(sizes) + 1, dtype=torch.float64)
        if (run := self.mine.get(index)) is not None:
            assert run.loss is not None
            # Without images the oracle's encoder is not called: its gradients are zeros.
            zeros = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
            parts = [(zeros | run.gradients)[name].double().ravel() for name in self.shapes]
            flat = torch.cat([torch.tensor([run.loss]).double(), *parts])
        dist.broadcast(flat, index % RANKS)
        loss, *found = np.split(flat.numpy(), np.cumsum([1, *sizes])[:-1])
        return float(loss[0]), dict(zip(self.shapes, found, strict=True))


def gradients_of(weights: dict[str, torch.nn.Parameter]) -> np.ndarray:
    """Of all weights, one after the other; each is here whole, since the layouts have tp1."""
    found = [gradient_of(weight) for weight in weights.values()]
    return torch.cat([g.ravel() for g in found if g is not None]).double().numpy()


def check(index: int, found: np.ndarray, wanted: dict[str, np.ndarray]) -> None:
    """As ``compare``, for all tensors at once: relative L2, absolute where it is noise."""
    sizes = np.array([len(part) for part in wanted.values()])
    starts, whole = np.cumsum(sizes) - sizes, np.concatenate(list(wanted.values()))
    assert len(found) == len(whole)
    error, norm = (
        np.sqrt(np.add.reduceat(np.square(value), starts)) for value in (found - whole, whole)
    )
    limit = np.where(norm > 1e-9 * np.sqrt(sizes), 1e-5 * norm, 1e-5)
    bad = [name for name, ok in zip(wanted, error <= limit, strict=True) if not ok]
    assert not bad, f"batch {index}: {len(bad)} gradients are off, {bad[:3]} among them"


def steps_on_rank(rank: int) -> tuple[list[float], list[float], set[str]]:
    """The sums of losses of this rank, the oracle's losses, and the gradients that only others
    have."""
    sums, wanted_losses = [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        reference = Oracle(rank)
        groups = stack.enter_context(colocc.process_groups(LAYOUTS))
        model = mimo.build(groups, LAYOUTS, layers=LAYERS)
        program = stack.enter_context(colocc.compile(model, LAYOUTS, groups=groups))
        weights = {
            f"{owner}.{name}": weight
            for owner, module in program.trainable().items()
            for name, weight in global_names(module)
        }
        for index, images in enumerate(stream()):
            if index % 8 == 0:
                flight.RECORDER.hold()
            model.zero_grad_buffer()
            given = batches(index, images)
            logs = program.forward_backward(
                given, num_microbatches=len(given), loss_func=mimo.loss_func, force_all_reduce=True
            )
            loss, gradients = reference.get(index)
            check(index, gradients_of(weights), {name: gradients[name] for name in weights})
            sums.append(sum(log["loss"][0] for log in logs))
            wanted_losses.append(loss)
    return sums, wanted_losses, reference.shapes.keys() - weights.keys()


def test_the_stream_has_every_kind_of_batch() -> None:
    found = list(stream())
    text = [[not any(counts) for counts in images] for images in found]
    assert sum(all(batch) for batch in text) > 5
    assert sum(any(batch) and not all(batch) for batch in text) > 20
    first = [any(any(counts[: len(counts) // 4]) for counts in images) for images in found]
    assert 20 < sum(first) < BATCHES - 20
    assert {len(images) for images in found} == {1, 2, 3}


def test_every_batch_of_a_ragged_stream_equals_the_oracle(processes: ProcessPool) -> None:
    ranks = processes.run(RANKS, steps_on_rank, timeout=400)
    first = ranks[0][1]
    assert not set.intersection(*(absent for _, _, absent in ranks))
    dp, pp = (LAYOUTS["language"].coordinates(axis) for axis in ("dp", "pp"))
    last = {int(d): rank[0] for d, p, rank in zip(dp, pp, ranks, strict=True) if p == 1}
    for index, images in enumerate(stream()):
        tokens = sum(int(batch["loss_mask"].sum()) for batch in batches(index, images))
        total = sum(sums[index] for sums in last.values())
        assert total / tokens == pytest.approx(first[index], rel=1e-5), index

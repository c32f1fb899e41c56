"""Covers runtime/megatron/mimo.py: what a MimoModel's batch may have beside text and images (masks,
mRoPE positions, packed sequences)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout
from colocc.runtime import cpu
from colocc.testing import Run, compare, float64, observed, oracle
from tests import mimo, packed, ragged
from tests.harness import ProcessPool

IMAGES = [[0, 1, 2, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 2, 1, 0]]
ONE = {"images": Layout(), "language": Layout()}
LAYOUTS = {
    "fan_in pp2": {"images": Layout(dp=8), "language": Layout(tp=2, pp=2, dp=2)},
    "fan_out sp": {"images": Layout(tp=4, dp=2), "language": Layout(tp=2, dp=4, sp=True)},
}
CP = {
    "images": Layout(dp=8),
    "language": Layout(tp=2, cp=2, dp=2, sp=True, zigzag=True),
}
# Kinds of steps, by the positions of the model that runs them.
KINDS = {
    "learned_absolute": [
        "a mask for each",
        "a mask for all",
        "a mask by head",
        "packed",
        "packed, padded",
    ],
    "rope": ["packed", "packed, padded"],
    "mrope": ["mrope", "packed"],
}
Step = list[dict[str, Any]]


def step_of(kind: str, positions: str) -> Step:
    """Two global microbatches of 8 samples."""
    if kind.startswith("packed"):
        return [packed.batch(rows) for rows in rows_of(kind, positions)]
    step = [ragged.batch(images, seed=index) for index, images in enumerate(IMAGES)]
    generator = torch.Generator().manual_seed(3)
    for batch in step:
        if kind == "mrope":
            steps = torch.randint(0, 3, (3, 8, mimo.LENGTH), generator=generator)
            batch["position_ids"] = steps.cumsum(2)
        else:
            heads = mimo.HEADS if kind == "a mask by head" else 1
            shape = (1 if kind == "a mask for all" else 8, heads, mimo.LENGTH, mimo.LENGTH)
            hidden = torch.randint(0, 5, shape, generator=generator) > 2
            batch["attention_mask"] = hidden & ~torch.eye(mimo.LENGTH, dtype=torch.bool)
    return step


def rows_of(kind: str, positions: str) -> list[Any]:
    return [packed.sequences("padded" in kind, positions, seed=seed) for seed in (5, 6)]


def alone(kind: str, positions: str) -> Step:
    """What the oracle runs: packed sequences each as a microbatch of its own."""
    if not kind.startswith("packed"):
        return step_of(kind, positions)
    rows = [row for found in rows_of(kind, positions) for row in found]
    return [one for row in rows for one, _ in row]


@contextlib.contextmanager
def heeding_masks(model: Any) -> Iterator[None]:
    """Inside, the model hands on its attention_mask, which MimoModel does not."""
    forward, given = model.forward, {}

    def noting(attention_mask: torch.Tensor | None = None, **batch: Any) -> Any:
        given["attention_mask"] = attention_mask
        return forward(**batch)

    def hand(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, **given}

    hook = model.language_model.register_forward_pre_hook(hand, with_kwargs=True)
    model.forward = noting
    try:
        yield
    finally:
        hook.remove()
        del model.forward


def reference_on_rank(_: int) -> dict[tuple[str, str], Run]:
    found = {}
    with cpu.ranks(), float64(), colocc.process_groups(ONE) as groups:
        for positions, kinds in KINDS.items():
            model = mimo.build(groups, ONE, wrap=False, positions=positions)
            with heeding_masks(model):
                for kind in kinds:
                    found[positions, kind] = oracle(
                        model, alone(kind, positions), mimo.loss_func, replicas=1
                    )
    return found


def steps_on_rank(
    _: int, layouts: Mapping[str, Layout], kinds: Mapping[str, list[str]]
) -> dict[tuple[str, str], Run]:
    found = {}
    sp = layouts["language"].sp
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        for positions, names in kinds.items():
            model = mimo.build(groups, layouts, sequence_parallel=sp, positions=positions)
            with colocc.compile(model, layouts, groups=groups) as program:
                for kind in names:
                    model.zero_grad_buffer()
                    logs = program.forward_backward(
                        step_of(kind, positions),
                        num_microbatches=2,
                        loss_func=mimo.loss_func,
                        force_all_reduce=True,
                    )
                    losses = [log["loss"] for log in logs]
                    found[positions, kind] = observed(program, losses, microbatches=2)
    return found


@pytest.fixture(scope="module")
def reference(processes: ProcessPool) -> dict[tuple[str, str], Run]:
    return processes.run(1, reference_on_rank)[0]


def check(
    ranks: list[dict[tuple[str, str], Run]],
    reference: dict[tuple[str, str], Run],
    language: Layout,
) -> None:
    places = list(zip(*(language.coordinates(a).tolist() for a in ("dp", "cp")), strict=True))
    for (positions, kind), first in ranks[0].items():
        assert first.gradients
        wanted, seen = reference[positions, kind], [rank[positions, kind] for rank in ranks]
        try:
            compare(
                [Run(gradients=run.gradients) for run in seen],
                Run(gradients=wanted.gradients),
                noise=1e-9,
            )
        except AssertionError as error:
            error.add_note(f"positions {positions}, {kind}")
            raise
        leaders = {
            place: run.loss for place, run in zip(places, seen, strict=True) if run.loss is not None
        }
        tokens = sum(int(batch["loss_mask"].sum()) for batch in step_of(kind, positions))
        assert len(leaders) == language.dp * language.cp
        assert sum(leaders.values()) / tokens == pytest.approx(wanted.loss, rel=1e-5)


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=list(LAYOUTS))
def test_masks_positions_and_packing_equal_the_oracle(
    processes: ProcessPool,
    reference: dict[tuple[str, str], Run],
    layouts: dict[str, Layout],
) -> None:
    ranks = processes.run(8, partial(steps_on_rank, layouts=layouts, kinds=KINDS))
    assert set(ranks[0]) == set(reference)
    check(ranks, reference, layouts["language"])


def test_mrope_under_context_parallelism(
    processes: ProcessPool, reference: dict[tuple[str, str], Run]
) -> None:
    work = partial(steps_on_rank, layouts=CP, kinds={"mrope": ["mrope"]})
    ranks = processes.run(8, work, detail=True)
    check(ranks, reference, CP["language"])


def test_masks_are_heeded(reference: dict[tuple[str, str], Run]) -> None:
    """Two masks give two losses, so that one that nothing reads would be seen."""
    one, other = (reference["learned_absolute", f"a mask for {who}"] for who in ("each", "all"))
    assert one.loss is not None and other.loss is not None
    assert abs(one.loss - other.loss) > 1e-4

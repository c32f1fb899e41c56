"""Covers runtime/ragged.py, and ragged batches through a MimoModel against the float64 oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout, LayoutError
from colocc.passes.graph import token_places
from colocc.runtime import cpu
from colocc.runtime.items import Learned
from colocc.runtime.ragged import Ragged
from colocc.testing import Run, compare, float64, observed, oracle, relative_l2, watch_input
from tests import mimo, ragged
from tests.harness import ProcessPool

PLACES = token_places({"images": ragged.TOKEN})
PATH = ("modality_inputs", "images")

WHOLE = ((0, 1),)

# By microbatch, the images of each sample.
STREAMS = {
    "text only": [[0] * 8, [0] * 8],
    "ragged": [[0, 1, 2, 0, 3, 1, 0, 1], [1, 1, 0, 0, 0, 0, 2, 0], [2, 0, 1, 1, 0, 0, 0, 0]],
    "a text-only microbatch": [[0] * 8, [1, 0, 2, 0, 0, 0, 0, 1]],
    "text-only replicas": [[0, 0, 0, 0, 1, 3, 0, 2], [0] * 8],
    "uniform": [[1] * 8, [1] * 8],
    "text only again": [[0] * 8],
}
LAYOUTS = {
    "fan_in": {"images": Layout(tp=2, dp=4), "language": Layout(tp=4, dp=2)},
    "fan_out": {"images": Layout(tp=8), "language": Layout(tp=2, dp=4)},
    "pp2": {"images": Layout(dp=8), "language": Layout(tp=2, pp=2, dp=2)},
    "equal": {"images": Layout(tp=4, dp=2), "language": Layout(tp=4, dp=2)},
    "sp": {"images": Layout(tp=2, dp=4), "language": Layout(tp=2, dp=4, sp=True)},
    "sp pp2": {"images": Layout(dp=8), "language": Layout(tp=2, pp=2, dp=2, sp=True)},
    "cp2": {"images": Layout(tp=2, dp=4), "language": Layout(cp=2, dp=4, zigzag=True)},
    "cp2 tp2 sp": {
        "images": Layout(dp=8),
        "language": Layout(tp=2, cp=2, dp=2, sp=True, zigzag=True),
    },
    "cp2 tp2 sp pp2": {
        "images": Layout(tp=2, dp=4),
        "language": Layout(tp=2, cp=2, pp=2, sp=True, zigzag=True),
    },
    "encoder cp2": {"images": Layout(cp=2, dp=4), "language": Layout(tp=4, dp=2)},
}


# ---------------------------------------------------------------- against the oracle


def batches(stream: list[list[int]]) -> list[dict[str, Any]]:
    return [ragged.batch(images, seed=seed) for seed, images in enumerate(stream)]


def reference_on_rank(_: int) -> dict[str, Run]:
    layouts = {"images": Layout(), "language": Layout()}
    with cpu.ranks(), float64(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False)
        return {
            name: oracle(model, batches(stream), mimo.loss_func, replicas=1)
            for name, stream in STREAMS.items()
        }


def steps_on_rank(_: int, layouts: Mapping[str, Layout], schedule: str) -> dict[str, Run]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts, sequence_parallel=layouts["language"].sp)
        program = stack.enter_context(
            colocc.compile(model, layouts, groups=groups, schedule=schedule)
        )
        runs = {}
        for name, stream in STREAMS.items():
            seen: list[torch.Tensor] = []
            model.zero_grad_buffer()
            with watch_input(model.language_model, seen):
                logs = program.forward_backward(
                    batches(stream),
                    num_microbatches=len(stream),
                    loss_func=mimo.loss_func,
                    force_all_reduce=True,
                )
            losses = [log["loss"] for log in logs]
            runs[name] = observed(program, losses, seen, microbatches=len(stream))
        return runs


@pytest.fixture(scope="module")
def reference(processes: ProcessPool) -> dict[str, Run]:
    return processes.run(1, reference_on_rank)[0]


@pytest.mark.parametrize(
    ("layouts", "schedule"),
    [(name, "three_phase") for name in LAYOUTS]
    + [("fan_in", "lookahead=1"), ("fan_out", "lookahead=2"), ("cp2 tp2 sp", "lookahead=1")],
)
def test_ragged_batches_equal_the_oracle(
    processes: ProcessPool, reference: dict[str, Run], layouts: str, schedule: str
) -> None:
    language = LAYOUTS[layouts]["language"]
    work = partial(steps_on_rank, layouts=LAYOUTS[layouts], schedule=schedule)
    ranks = processes.run(8, work, detail=language.pp > 1)
    for name, stream in STREAMS.items():
        wanted, seen = reference[name], [rank[name] for rank in ranks]
        gradients = [Run(gradients=run.gradients) for run in seen]
        # The oracle's encoder is not called without images: its gradients are zeros.
        zeros = {n: torch.zeros_like(g) for n, g in reference["ragged"].gradients.items()}
        compare(gradients, Run(gradients=zeros | wanted.gradients), noise=1e-9)
        check_inputs(seen, wanted, language)
        check_loss(seen, wanted, language, stream)


def check_inputs(seen: list[Run], wanted: Run, language: Layout) -> None:
    """The ranks of the first stage hold together what the oracle's language module reads."""
    for rank, run in enumerate(seen):
        first = int(language.coordinates("pp")[rank]) == 0
        assert len(run.inputs) == (len(wanted.inputs) if first else 0)
        for (microbatch, _), value in run.inputs.items():
            whole = wanted.inputs[microbatch, 0]
            part = whole.chunk(language.dp, dim=1)[int(language.coordinates("dp")[rank])]
            assert value.shape == part.shape
            assert relative_l2(value, part) < 1e-5, (rank, microbatch)


def check_loss(seen: list[Run], wanted: Run, language: Layout, stream: list[list[int]]) -> None:
    """The sums of the losses of all replicas and cp ranks over the tokens are the oracle's loss."""
    places = zip(*(language.coordinates(axis).tolist() for axis in ("dp", "cp")), strict=True)
    leaders = {
        place: run.loss for place, run in zip(places, seen, strict=True) if run.loss is not None
    }
    assert len(leaders) == language.dp * language.cp
    tokens = sum(int(batch["loss_mask"].sum()) for batch in batches(stream))
    total = sum(leaders.values())
    assert total / tokens == pytest.approx(wanted.loss, rel=1e-5)


# ---------------------------------------------------------------- items and placeholders


def placed(*counts: list[int]) -> list[dict[str, Any]]:
    """Microbatches of samples with so many placeholders, and no inputs."""
    found = []
    for sizes in counts:
        ids = torch.zeros(len(sizes), mimo.LENGTH, dtype=torch.int64)
        for sample, count in enumerate(sizes):
            ids[sample, mimo.LENGTH - count :] = ragged.TOKEN
        found.append({"input_ids": ids, "modality_inputs": {}})
    return found


def with_items(batch: dict[str, Any], items: list[int], **more: torch.Tensor) -> dict[str, Any]:
    """``batch`` with an encoder input whose entry i is items[i]."""
    x = torch.tensor(items).reshape(-1, 1)
    return {**batch, "modality_inputs": {"images": {"vit": {"x": x, **more}}}}


def encoded(found: Ragged, units: tuple[tuple[int, int], ...], count: int) -> list[int]:
    given = found.encoder_input("images", units, count, PATH)
    values: list[int] = given["vit"]["x"].ravel().tolist()
    return values


def test_rows_are_in_the_order_of_replicas_then_microbatches() -> None:
    one, two = placed([0, 3, 6, 0], [3, 0, 0, 3])
    step = [with_items(one, [10, 11, 12]), with_items(two, [20, 21])]
    found = Ragged(step, PLACES, replicas=2)
    rows = found.rows["images"]
    assert rows.counts.tolist() == [0, 3, 3, 0, 6, 0, 0, 3]
    assert rows.items.tolist() == [3] * 5
    assert rows.position[:3].tolist() == [9, 10, 11]
    # Two units in each replica: each has the samples of one microbatch.
    assert [encoded(found, ((u, u + 1),), 4) for u in range(4)] == [[10], [20], [11, 12], [21]]
    assert encoded(found, ((1, 3),), 4) == [20, 11, 12]


def test_a_slot_without_items_gets_one_of_the_step_or_of_one_before() -> None:
    one, two = placed([0, 0], [3, 3])
    learned = Learned()
    given: Any = {"replicas": 1, "learned": learned}
    text = [{**one, "modality_inputs": None}]
    assert Ragged(text, PLACES, **given).encoder_input("images", WHOLE, 1, PATH) is None
    mixed = Ragged([one, with_items(two, [20, 21])], PLACES, **given)
    assert encoded(mixed, ((0, 1),), 2) == [20]
    assert encoded(mixed, ((1, 2),), 2) == [20, 21]
    assert encoded(Ragged(text, PLACES, **given), WHOLE, 1) == [20]


def test_items_of_different_sizes_are_stated() -> None:
    """Entries of a tensor are one for each item, or equally many for each row."""
    (batch,) = placed([5, 0, 4])
    sizes, patches = torch.tensor([2, 3, 4]), torch.arange(18)
    batch = with_items(batch, [10, 11, 12], sizes=sizes, patches=patches)

    def rows(inputs: Any) -> torch.Tensor:
        found: torch.Tensor = inputs["vit"]["sizes"]
        return found

    found = Ragged([batch], PLACES, replicas=1, rows_per_item={"images": rows})
    assert found.rows["images"].items.tolist() == [2, 3, 4]
    first, last = (
        found.encoder_input("images", units, 2, PATH)["vit"] for units in (((0, 1),), ((1, 2),))
    )
    assert first["x"].ravel().tolist() == [10, 11]
    assert first["patches"].tolist() == list(range(10))
    assert last["x"].ravel().tolist() == [12]
    assert last["patches"].tolist() == list(range(10, 18))


def refused(step: list[dict[str, Any]], **options: Any) -> str:
    with pytest.raises(LayoutError) as info:
        Ragged(step, PLACES, replicas=1, **options)
    return str(info.value)


def test_placeholders_that_no_item_fills_are_refused() -> None:
    one, two = placed([3, 3], [3, 4])
    assert "sample 0 of microbatch 0 has 3 placeholders" in refused([one])
    assert "the step has 2 items and no placeholder" in refused(
        [with_items(placed([0, 0])[0], [1, 2])]
    )
    assert "7 placeholders in input_ids for 2 items, 7 / 2 is not whole" in refused(
        [with_items(two, [1, 2])]
    )
    text = refused([with_items(placed([2, 4])[0], [1, 2])])
    assert "6 placeholders" in text and "3 each, but sample 0 of microbatch 0 has 2" in text
    text = refused([with_items(one, [1, 2, 3]), with_items(one, [1])])
    assert "3 each, but microbatch 0 has 6 placeholders for 3 items" in text
    assert "rows={'images'" in text


def test_stated_rows_that_miss_a_sample_s_border_name_it() -> None:
    (batch,) = placed([4, 5])
    batch = with_items(batch, [1, 2, 3])
    text = refused([batch], rows_per_item={"images": lambda _: [2, 3, 4]})
    assert "sample 0 of microbatch 0 has 4 placeholders" in text
    assert "its next items make 2 + 3 rows" in text
    text = refused([batch], rows_per_item={"images": lambda _: [4, 5, 1]})
    assert "9 placeholders and 3 items of 10 rows" in text
    odd = with_items(placed([4, 5])[0], [1, 2], odd=torch.zeros(7))
    text = refused([odd], rows_per_item={"images": lambda _: [4, 5]})
    assert "modality_inputs.images.vit.odd of microbatch 0 has 7 entries" in text


def test_tensors_that_disagree_on_the_number_of_items() -> None:
    (batch,) = placed([3, 3])
    text = refused([with_items(batch, [1, 2], sizes=torch.zeros(3))])
    assert (
        "2 items in modality_inputs.images.vit.x and 3 in modality_inputs.images.vit.sizes" in text
    )

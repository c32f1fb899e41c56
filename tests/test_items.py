"""Covers passes/items.py and docs/models.md: recorded models whose samples have any number of
images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

import colocc
from colocc import Items, Layout, LayoutError
from colocc.runtime.items import ModuleItems
from tests.gallery import (
    DIMS,
    LAYOUTS,
    STRIP_DIMS,
    Gallery,
    Merge,
    Strips,
    batch_of,
    scatter,
    sizes_of,
    strips_of,
)
from tests.harness import run_threads
from tests.hf import (
    llava,
    qwen_vl,
    ragged_llava_batch,
    ragged_qwen_vl_batch,
    two_eyes,
)
from tests.test_models import LLAVA, TEXT, WIDE, Batch, check_trained

TOWER = Items("model.vision_tower")
VISUAL = Items("model.visual")
# By step, the images of each sample.
STREAM = [[1, 0, 2, 0, 0, 1, 2, 1], [0] * 8, [0, 0, 0, 0, 2, 1, 0, 0]]


@pytest.mark.parametrize(("vision", "projector"), [("clip", WIDE), ("siglip", TEXT)])
def test_llava(vision: str, projector: Layout) -> None:
    page = check_trained(
        llava(vision),
        {**LLAVA, "model.multi_modal_projector": projector},
        [ragged_llava_batch(seed, images) for seed, images in enumerate(STREAM)],
        batch_dims={"pixel_values": TOWER},
        idle=("model.vision_tower", "model.multi_modal_projector"),
        single=vision == "siglip",
    )
    assert page.count("\n+ %") == 1


# By step, the grids of each sample's images, in patches.
GRIDS: list[list[list[tuple[int, int]]]] = [
    [[(2, 4)], [], [(4, 4), (2, 2)], [], [(6, 4)], [(2, 4), (2, 4), (4, 2)], [], [(4, 4)]],
    [[]] * 8,
    [[], [], [], [], [], [(4, 8)], [(2, 2)], []],
]


def tokens_of(inputs: Any) -> torch.Tensor:
    grid: torch.Tensor = inputs["image_grid_thw"]
    return grid.prod(-1) // 4


def test_qwen_vl_whose_images_differ_in_size() -> None:
    check_trained(
        qwen_vl(),
        {"model.visual": WIDE, "model.language_model": TEXT, "lm_head": TEXT},
        [ragged_qwen_vl_batch(seed, grids) for seed, grids in enumerate(GRIDS)],
        batch_dims={"position_ids": 1, "pixel_values": VISUAL, "image_grid_thw": VISUAL},
        rows={"model.visual": tokens_of},
        idle=("model.visual",),
    )


def test_two_encoders_of_the_same_images() -> None:
    batches = [ragged_llava_batch(seed, images) for seed, images in enumerate(STREAM[::2])]
    for batch in batches:
        batch["pixels"] = batch.pop("pixel_values")
    check_trained(
        two_eyes(),
        {
            "near": WIDE,
            "far": Layout(tp=4, dp=2),
            "projector": TEXT,
            "language": TEXT,
            "head": TEXT,
        },
        batches,
        batch_dims={"pixels": Items("far")},
    )


# ---------------------------------------------------------------- a small model


def step(model: Gallery, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output and all gradients, in one process."""
    whole = copy.deepcopy(model)
    out = whole(**batch)
    out.square().mean().backward()
    zeros = {name: torch.zeros_like(weight) for name, weight in whole.named_parameters()}
    grads = {n: w.grad for n, w in whole.named_parameters() if w.grad is not None}
    return out.detach(), zeros | grads


def check(
    model: Gallery,
    layouts: Mapping[str, Layout],
    stream: Sequence[Batch],
    *,
    local: Any = None,
    **options: Any,
) -> None:
    """Run each batch on 4 ranks, and compare with one process; ``local`` cuts what a rank gives."""

    def main(rank: int) -> None:
        mine = copy.deepcopy(model)
        with colocc.compile(mine, layouts, **options) as program:
            for batch in stream:
                mine.zero_grad()
                given = batch if local is None else local(program, batch)
                out = program(**given)
                out.square().mean().backward()
                wanted, gradients = step(model, batch)
                replica = layouts["language"].coordinates("dp")[rank]
                size = len(wanted) // layouts["language"].dp
                right = wanted[replica * size : (replica + 1) * size]
                torch.testing.assert_close(out.detach(), right, rtol=1e-10, atol=1e-12)
                for name, weight in mine.named_parameters():
                    assert weight.grad is not None, name
                    dist.all_reduce(weight.grad)
                    torch.testing.assert_close(
                        weight.grad / 4, gradients[name], rtol=1e-10, atol=1e-12
                    )

    run_threads(4, main, timeout=60)


def same_size(model: Gallery, text: Any, ids: Any, pixels: Any, rows: Any) -> torch.Tensor:
    """A size of the images, read where the language model runs."""
    found: torch.Tensor = rows.reshape(pixels.shape[0] * 2, 8)
    return scatter(model, text, ids, pixels, found)


IMAGES = [[0, 0, 0, 0], [1, 0, 2, 1], [0, 0, 0, 3], [3, 0, 0, 0], [1, 1, 1, 1]]
STRIPS: list[list[list[int]]] = [
    [[]] * 4,
    [[1, 3], [], [2], [4]],
    [[], [], [], [1, 1, 1]],
    [[5], [], [], []],
]
SHAPES = [
    {"vision": Layout(dp=4), "language": Layout(tp=2, dp=2)},
    {"vision": Layout(tp=2, dp=2), "language": Layout(dp=4)},
    {"vision": Layout(tp=2, dp=2), "language": Layout(tp=2, dp=2)},
]


@pytest.mark.parametrize("layouts", SHAPES)
@pytest.mark.parametrize("merge", [scatter, same_size])
def test_images_of_one_size(layouts: Mapping[str, Layout], merge: Merge) -> None:
    batches = [batch_of(images, seed) for seed, images in enumerate(IMAGES)]
    model = Gallery(merge).double()
    check(model, layouts, batches, example_inputs=batch_of([2, 1, 0, 0]), batch_dims=DIMS)


@pytest.mark.parametrize("layouts", SHAPES)
def test_images_of_any_size(layouts: Mapping[str, Layout]) -> None:
    check(
        Strips().double(),
        layouts,
        [strips_of(sizes, seed) for seed, sizes in enumerate(STRIPS)],
        example_inputs=strips_of([[2], [3], [], []]),
        batch_dims=STRIP_DIMS,
        rows={"vision": sizes_of},
    )


def own_part(program: colocc.Program, batch: Batch, sizes: list[list[int]]) -> Batch:
    """What this rank gives of a batch whose samples have items of these sizes, in rows."""
    rows = {"vision": [[sum(items) for items in sizes]]} if program.balance else None
    read = program.samples(num_microbatches=1, batch_size=4, rows=rows)
    mine = {sample for _, sample in read["vision"]}
    keep = [sample in mine for sample, items in enumerate(sizes) for _ in items]
    if not any(keep):
        return {"ids": batch["ids"]}
    kept = torch.tensor(keep)
    if "pixels" in batch:
        return {"ids": batch["ids"], "pixels": batch["pixels"][kept]}
    patches = batch["patches"][kept.repeat_interleave(batch["sizes"])]
    return {"ids": batch["ids"], "patches": patches, "sizes": batch["sizes"][kept]}


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("alike", [True, False])
def test_each_rank_loads_its_own_images(alike: bool, balance: bool) -> None:
    sizes = [[[2] * n for n in images] for images in IMAGES] if alike else STRIPS
    if alike:
        stream = [batch_of(images, seed) for seed, images in enumerate(IMAGES)]
        options: Any = {"batch_dims": DIMS, "example_inputs": stream[1]}
    else:
        stream = [strips_of(strips, seed) for seed, strips in enumerate(STRIPS)]
        options = {"batch_dims": STRIP_DIMS, "rows": {"vision": sizes_of}}
        options["example_inputs"] = strips_of([[2], [3], [], []])
    check(
        (Gallery() if alike else Strips()).double(),
        LAYOUTS,
        stream,
        local=lambda program, batch: own_part(
            program, batch, next(s for s, b in zip(sizes, stream, strict=True) if b is batch)
        ),
        batches="local",
        balance=balance,
        **options,
    )


def test_a_sampler_wants_what_rows_reads_alone() -> None:
    """The forward of Strips takes the sizes for a list: no node of the graph reads them."""

    def main(_: int) -> set[frozenset[str]]:
        with colocc.compile(
            Strips().double(),
            LAYOUTS,
            example_inputs=strips_of([[2], [3], [], []]),
            batch_dims=STRIP_DIMS,
            rows={"vision": sizes_of},
            batches="local",
        ) as program:
            sampler = colocc.Sampler(
                program, 4, num_microbatches=1, batch_size=4, rows={"vision": [4, 0, 2, 4]}
            )
            return {wanted.inputs for wanted in next(iter(sampler))}

    whole, text = frozenset({"ids", "patches", "sizes"}), frozenset({"ids"})
    assert set().union(*run_threads(4, main, timeout=60)) == {whole, text}


def test_images_that_go_to_other_samples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairing by position, as the slots of an encoder hold them, is the error of others."""
    cut = ModuleItems.cut
    monkeypatch.setattr(
        ModuleItems, "cut", lambda self, samples, path: cut(self, samples[::-1].copy(), path)
    )
    with pytest.raises(AssertionError, match="not close"):
        check(
            Gallery().double(),
            SHAPES[1],
            [batch_of([1, 1, 1, 1])],
            example_inputs=batch_of([2, 1, 0, 0]),
            batch_dims=DIMS,
        )


# ---------------------------------------------------------------- what does not match


def wrong(batch: Batch, **changed: Any) -> Batch:
    return {name: value for name, value in (batch | changed).items() if value is not None}


GOOD = strips_of([[1, 3], [], [2], [2]])
MISMATCHES = [
    (
        wrong(GOOD, ids=strips_of([[1, 3], [], [2, 1], [2]])["ids"]),
        "vision: sample 2 of microbatch 0 has 3 placeholders in input_ids, its next items make 2 + "
        "2 rows",
    ),
    (wrong(GOOD, patches=None), "microbatch 0 has sizes and lacks patches"),
    (
        wrong(GOOD, patches=None, sizes=None),
        "has 4 placeholders in input_ids, its next items make ",
    ),
    (wrong(GOOD, ids=strips_of([[]] * 4)["ids"]), "the microbatch has 0 placeholders and 4 items"),
    (wrong(GOOD, patches=GOOD["patches"][:-1]), "patches of microbatch 0 has 7 entries in dim 0"),
]
NOT_THE_THIRD = torch.arange(4)[:, None] != 2
ALIKE = [
    (wrong(batch_of([2, 0, 1, 1]), ids=strips_of([[4], [], [3], [2]])["ids"]), "sample 2 of"),
    (wrong(batch_of([2, 0, 1, 1]), pixels=None), "Give pixels, or leave the placeholders out."),
    (wrong(batch_of([2, 0, 1, 1]), pixels=batch_of([3])["pixels"]), "8 placeholders for 3 items"),
    (
        wrong(
            batch_of([2, 0, 1, 1]), pixels=batch_of([4])["pixels"].where(NOT_THE_THIRD, torch.nan)
        ),
        "pixels of microbatch 0 has 4 NaN and 0 inf, the first in sample 2",
    ),
]


@pytest.mark.parametrize("alike", [False, True])
def test_placeholders_that_are_not_the_rows_of_a_sample(alike: bool) -> None:
    cases = ALIKE if alike else MISMATCHES
    good = batch_of([2, 0, 1, 1]) if alike else GOOD
    model = (Gallery() if alike else Strips()).double()
    options: Any = {"batch_dims": DIMS if alike else STRIP_DIMS, "example_inputs": good}
    options["check"] = "finite"
    if not alike:
        options["rows"] = {"vision": sizes_of}

    def main(rank: int) -> list[str]:
        found = []
        with colocc.compile(copy.deepcopy(model), LAYOUTS, **options) as program:
            for batch, _ in cases:
                with pytest.raises(LayoutError) as info:
                    program(**batch)
                found.append(str(info.value))
            program(**good)
        return found

    results = run_threads(4, main, timeout=60)
    assert all(found == results[0] for found in results)
    for text, (_, problem) in zip(results[0], cases, strict=True):
        assert problem in text


def test_a_first_batch_of_text_alone_needs_an_example_with_data() -> None:
    meta = {name: value.to("meta") for name, value in batch_of([2, 1, 0, 0]).items()}

    def main(rank: int) -> str:
        with (
            colocc.compile(
                Gallery().double(), LAYOUTS, example_inputs=meta, batch_dims=DIMS
            ) as program,
            pytest.raises(LayoutError) as info,
        ):
            program(**batch_of([0, 0, 0, 0]))
        return str(info.value)

    (text,) = set(run_threads(4, main, timeout=60))
    assert "vision has seen no item" in text

"""Covers passes/items.py: what holds items, and where they meet samples."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import colocc
from colocc import CaptureError, Items, Layout, LayoutError
from colocc.passes.items import entries_of_items, one_item_each, rows_stated
from tests.gallery import (
    DIMS,
    LAYOUTS,
    STRIP_DIMS,
    TOKEN,
    Gallery,
    Merge,
    Strips,
    batch_of,
    scatter,
    sizes_of,
    strips_of,
)

EXAMPLE = batch_of([1, 0, 2, 1])


def program_of(merge: Merge = scatter, **options: Any) -> colocc.Program:
    given = {"layouts": LAYOUTS, "example_inputs": EXAMPLE, "batch_dims": DIMS} | options
    return colocc.compile(Gallery(merge).double(), **given)


def test_the_page_says_where_items_go() -> None:
    page = str(program_of())
    assert "f64[4@dp,4]" in page and "redistribute(%unflatten)" in page
    assert re.search(
        r"note    a sample has any number of items of vision \(pixels\); unsqueeze is true 2 times "
        r"for each, .*gallery\.py:\d+ return text\.masked_scatter",
        page,
    )


def test_the_example_has_one_item_for_each_sample() -> None:
    found, streams = one_item_each(EXAMPLE, DIMS, {}, 4)
    assert found["pixels"].equal(EXAMPLE["pixels"][:1].repeat(4, 1))
    assert streams["vision"].template["pixels"].equal(EXAMPLE["pixels"][:1])
    strips = strips_of([[1], [], [3, 2], [1]])
    found, streams = one_item_each(strips, STRIP_DIMS, {"vision": sizes_of}, 4)
    assert found["sizes"].tolist() == [3] * 4
    assert found["patches"].equal(strips["patches"][1:4].repeat(4, 1))
    meta = {name: value.to("meta") for name, value in EXAMPLE.items()}
    assert one_item_each(meta, DIMS, {}, 4)[1]["vision"].template is None


def test_where_items_stand() -> None:
    rows = torch.tensor([1, 3, 2]).numpy()
    assert entries_of_items(3, rows, 1, 3) == (1, 3)
    assert entries_of_items(6, rows, 1, 3) == (1, 6)
    assert entries_of_items(24, rows, 1, 2) == (4, 16)


# ---------------------------------------------------------------- what keeps items apart


def an_index(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    text = text.clone()
    text[ids == TOKEN] = rows.flatten(0, 1)
    return text


def a_list(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return scatter(model, text, ids, pixels, torch.cat(list(rows), dim=0))


def a_size(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return scatter(model, text, ids, pixels, rows.reshape(pixels.shape[0] * 2, 8))


@pytest.mark.parametrize("merge", [an_index, a_list, a_size])
def test_glue_that_keeps_items_apart(merge: Merge) -> None:
    assert "is true 2 times for each" in str(program_of(merge))


def added(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return text + rows.sum(1, keepdim=True)


def joined(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("bsh,ijh->bsh", text, rows)


def summed(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return scatter(model, text, ids, pixels, rows - rows.mean(0))


def counted(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return scatter(model, text, ids, pixels, rows * float(len(pixels)))


def averaged(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return scatter(model, text, ids, pixels, rows / rows.shape[0])


def placed(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    place = torch.arange(pixels.shape[0])[:, None, None]
    return scatter(model, text, ids, pixels, rows + place)


def branching(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return scatter(model, text, ids, pixels, rows if pixels.shape[0] > 3 else -rows)


def nowhere(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return text


def twice(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    text = scatter(model, text, ids, pixels, rows)
    return text.masked_scatter((ids == 0).unsqueeze(-1), rows)


@pytest.mark.parametrize(
    ("merge", "problem"),
    [
        (added, "add fixes the number of"),
        (joined, "einsum mixes samples with items of vision"),
        (summed, "mean on a tensor that is split by sample may mix samples"),
        (counted, "the number of items of vision, 4 in the example, is used as a plain number"),
        (averaged, "div takes the number of items of vision for a plain number"),
        (placed, "arange takes the number of items of vision for a plain number"),
        (branching, "a branch asks whether items of vision > 3"),
        (nowhere, "Gallery never puts the rows that vision makes of its items into samples"),
        (twice, "are put at other places than at"),
    ],
)
def test_glue_that_may_not(merge: Merge, problem: str) -> None:
    with pytest.raises(CaptureError) as info:
        program_of(merge)
    assert problem in str(info.value)
    assert merge is nowhere or "test_items.py:" in str(info.value)


def per_item(out: Tensor, pixels: Tensor) -> Tensor:
    return out / pixels.shape[0]


def mean_of_items(out: Tensor, pixels: Tensor) -> Tensor:
    return out + pixels.mean()


def mean_of_samples(out: Tensor, pixels: Tensor) -> Tensor:
    return out.sum() / out.shape[0]


class Loss(Gallery):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        out: Tensor = self.loss(super().forward(ids, pixels), pixels)
        return out


@pytest.mark.parametrize("loss", [per_item, mean_of_items])
def test_a_loss_over_items_is_refused(loss: Any) -> None:
    """Replicas have any number of them: the mean of their means is not that of one process."""
    with pytest.raises(CaptureError, match=r"items of vision for a plain number|mean on a tensor"):
        colocc.compile(Loss(loss).double(), LAYOUTS, example_inputs=EXAMPLE, batch_dims=DIMS)


def test_a_loss_may_be_a_mean_of_samples() -> None:
    model = Loss(mean_of_samples).double()
    colocc.compile(model, LAYOUTS, example_inputs=EXAMPLE, batch_dims=DIMS)


def test_a_branch_that_any_number_of_items_takes_alike() -> None:
    def merge(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
        return scatter(model, text, ids, pixels, rows) if pixels.shape[0] > 0 else text

    assert "guard   items" not in str(program_of(merge))


class Convolved(Gallery):
    """An image of h by w makes h * w / 4 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = torch.nn.Conv2d(3, 8, 2, 2)  # type: ignore[assignment]

    def forward(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        text = self.language.embed(ids)
        rows = self.vision(pixels).flatten(2).transpose(1, 2)
        assert pixels is not None
        out: Tensor = self.language(scatter(self, text, ids, pixels, rows))
        return out


def test_a_size_that_an_operation_fixes_is_a_guard() -> None:
    """A height of one row is broadcast: with two rows the shapes were others."""
    example = EXAMPLE | {"pixels": torch.zeros(4, 3, 2, 4, dtype=torch.float64)}
    model = Convolved().double()
    page = str(colocc.compile(model, LAYOUTS, example_inputs=example, batch_dims=DIMS))
    assert "pixels.shape[2] == 2 " in page
    assert "pixels.shape[3] ==" not in page


# ---------------------------------------------------------------- what is said wrong


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch_dims": {"pixels": Items("eyes")}}, "the module of the layouts (vision, language)"),
        ({"batch_dims": {"pixels": Items("language")}}, "no module that encodes these inputs"),
        ({"example_inputs": batch_of([0, 0])}, "example_inputs has no item of vision"),
        ({"example_inputs": None}, "items are told from an example"),
        ({"sequence_dims": {"pixels": 1}}, "its items are encoded whole"),
        ({"rows": {"language": len}}, "rows has 'language'"),
        ({"rows": {"vision": lambda given: [2] * 4}}, "must have equally many for each row"),
        (
            {"layouts": {"vision": Layout(dp=4), "language": Layout(tp=2, dp=2, sp=True)}},
            "Leave cp and sp out of language",
        ),
        (
            {"layouts": {"vision": Layout(tp=2, dp=2, sp=True), "language": Layout(dp=4)}},
            "Leave cp and sp out of vision",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises((CaptureError, LayoutError)) as info:
        program_of(**options)
    assert problem in str(info.value)


def projected(model: Gallery, text: Tensor, ids: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    return scatter(model, text, ids, pixels, model.get_submodule("middle")(rows))


@pytest.mark.parametrize(
    ("layout", "moves"), [(LAYOUTS["vision"], 1), (LAYOUTS["language"], 1), (Layout(tp=4), 0)]
)
def test_a_projector_runs_beside_the_encoder_or_the_reader(layout: Layout, moves: int) -> None:
    model = Gallery(projected)
    model.add_module("middle", torch.nn.Linear(8, 8))
    given: Any = {"example_inputs": {"ids": EXAMPLE["ids"], "pixels": EXAMPLE["pixels"].float()}}
    layouts = {**LAYOUTS, "middle": layout}
    if moves:
        page = str(colocc.compile(model, layouts, batch_dims=DIMS, **given))
        assert page.count("\n+ %") == moves
    else:
        with pytest.raises(LayoutError, match="Give middle the layout of vision, or that of lang"):
            colocc.compile(model, layouts, batch_dims=DIMS, **given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "example_inputs has 7 items in patches and 4 in sizes"),
        (
            {"rows": {"vision": lambda given: given["sizes"] + 1}},
            "patches of example_inputs has 7 entries in dim 0: neither",
        ),
    ],
)
def test_items_that_cannot_be_told_apart(options: dict[str, Any], problem: str) -> None:
    example = strips_of([[1], [], [3, 2], [1]])
    with pytest.raises((CaptureError, LayoutError)) as info:
        colocc.compile(Strips(), LAYOUTS, example_inputs=example, batch_dims=STRIP_DIMS, **options)
    assert problem in str(info.value)


@pytest.mark.parametrize("said", [[2, 1], torch.tensor([[2.0], [1.0]], requires_grad=True)])
def test_rows_are_whole_numbers(said: Any) -> None:
    assert rows_stated("images", {}, lambda given: said).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (None, "returned a NoneType: give a list or a tensor of the rows"),
        (iter([1]), "returned a list_iterator: give"),
        (torch.ones(2, device="meta"), "returned a tensor on meta: give a list"),
        ([2.5, 1.0], r"returned float32 \[2.5, 1.0\]: give the rows of each item, which are int"),
        ([float("nan")], "returned float32 .nan.: give the rows"),
        ([True], r"returned bool \[1.0\]: give the rows"),
    ],
)
def test_rows_that_are_none(said: Any, problem: str) -> None:
    with pytest.raises(LayoutError, match=f"rows of images {problem}"):
        rows_stated("images", {}, lambda given: said)

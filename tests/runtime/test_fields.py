"""Covers runtime/fields.py: what a field of a batch may be, without any rank."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import fx

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Graph, token_places
from colocc.runtime.fields import check_by_token, check_kinds, check_masks, check_tokens, plain

IDS = torch.zeros(4, 6, dtype=torch.int64)
PIXELS = torch.zeros(3, 2)


def graph(language: Layout | None = None) -> Graph:
    """A graph that reads the fields of a MimoModel."""
    found = fx.Graph()
    for path in [("input_ids",), ("labels",), ("attention_mask",), ("modality_inputs", "images")]:
        node = found.placeholder("_".join(path))
        node.meta = {"path": path, "module": "images" if path[1:] else "language"}
    layouts = {"images": Layout(dp=4), "language": language or Layout(tp=2, dp=2)}
    return Graph(
        found,
        "MimoModel",
        layouts,
        {},
        sink="language",
        rows=token_places({"images": 9}),
        masks=frozenset(["attention_mask"]),
        packing="packing_kwargs",
    )


def batch(**fields: Any) -> dict[str, Any]:
    inputs = {"images": {"vit": {"x": PIXELS, **fields.pop("options", {})}}}
    return {"input_ids": IDS, "labels": IDS, "modality_inputs": inputs} | fields


def test_tensors_and_options_that_are_one_for_the_step() -> None:
    step = [batch(options={"pool": 2, "kind": "mean"}), batch(options={"pool": 2})]
    check_kinds(graph(), step)
    check_tokens(graph(), step)
    check_kinds(graph(), [batch(labels=None), {"input_ids": IDS}])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ([batch(labels=[1, 2])], "labels of microbatch 0 is a list: only a tensor is cut"),
        ([batch(), batch(labels=3)], "labels of microbatch 1 is a int: only a tensor is cut"),
        ([batch(labels={1, 2})], "labels of microbatch 0 is a set"),
        ([batch(labels=IDS.numpy())], r"labels of microbatch 0 is a numpy\.ndarray"),
        (
            [batch(options={"y": [PIXELS, PIXELS]})],
            r"images\.vit\.y of microbatch 0 is a list of 2 tensors: .* Join them in dim 0",
        ),
        (
            [batch(options={"pool": 2}), batch(options={"pool": 3})],
            r"vit\.pool is 2 in one microbatch and 3 in microbatch 1: what is no tensor is one",
        ),
        (
            [batch(labels=IDS.to("meta"))],
            "labels of microbatch 0 is on the meta device: it has no data",
        ),
        (
            [batch(options={"y": PIXELS.to_sparse()})],
            r"images\.vit\.y of microbatch 0 is sparse_coo: only a dense tensor is cut by sample",
        ),
    ],
)
def test_kinds_that_are_refused(step: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_kinds(graph(), step)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (IDS[0], r"int64 \[6\]"),
        (IDS.float(), r"float32 \[4, 6\]"),
        (IDS.short(), r"int16 \[4, 6\]"),
        (IDS > 0, r"bool \[4, 6\]"),
        ([1], "a list"),
        (None, "a NoneType"),
    ],
)
def test_tokens_that_are_none(ids: Any, found: str) -> None:
    with pytest.raises(LayoutError, match=f"input_ids of microbatch 0 is {found}: give a tensor"):
        check_tokens(graph(), [batch(input_ids=ids)])


@pytest.mark.parametrize("ids", [IDS[:0], IDS[:, :0]])
def test_a_microbatch_without_a_token(ids: torch.Tensor) -> None:
    with pytest.raises(LayoutError, match="give at least one sample of one token"):
        check_tokens(graph(), [batch(), batch(input_ids=ids)])


@pytest.mark.parametrize("shape", [(4, 1, 6, 6), (1, 1, 6, 6), (4, 8, 6, 6), (4, 1, 1, 6)])
def test_masks(shape: tuple[int, ...]) -> None:
    check_masks(graph(), [batch(attention_mask=torch.zeros(shape) > 0), batch()])


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 6, 5), (4, 1, 5, 6)])
def test_masks_of_other_shapes(shape: tuple[int, ...]) -> None:
    message = (
        r"attention_mask of microbatch 0 is .* give bool .samples or 1, heads or 1, 6 or 1, 6."
    )
    with pytest.raises(LayoutError, match=message):
        check_masks(graph(), [batch(attention_mask=torch.zeros(shape) > 0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_masks_of_other_dtypes(dtype: torch.dtype) -> None:
    mask = torch.zeros(4, 1, 6, 6, dtype=dtype)
    with pytest.raises(LayoutError, match=r"attention_mask of microbatch 0 is (float32|int64) "):
        check_masks(graph(), [batch(attention_mask=mask)])


def test_fields_with_an_entry_for_each_token() -> None:
    good = batch(loss_mask=IDS > 0, position_ids=IDS)
    check_by_token(graph(), [good, good])
    check_by_token(graph(), [batch(position_ids=torch.zeros(3, 4, 6)), batch(position_ids=IDS)])
    check_by_token(graph(), [batch(labels=None), batch(labels=None)])
    check_by_token(graph(), [batch(labels=IDS.int(), position_ids=IDS.int())])


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ([batch(), batch(labels=None)], "microbatch 1 has no labels, others of the step have"),
        ([batch(labels=IDS[:, :5])], r"labels of microbatch 0 is int64 \[4, 5\]: give int64 or"),
        ([batch(labels=IDS.float())], r"labels of microbatch 0 is float32 \[4, 6\]: give int64 or"),
        ([batch(labels=IDS.to(torch.uint8))], r"labels of microbatch 0 is uint8 \[4, 6\]: give"),
        ([batch(position_ids=IDS.short())], r"position_ids of microbatch 0 is int16 \[4, 6\]"),
        (
            [batch(loss_mask=IDS[..., None])],
            r"loss_mask of microbatch 0 is int64 \[4, 6, 1\]: give",
        ),
        ([batch(position_ids=IDS[0])], r"position_ids of microbatch 0 is int64 \[6\]: give"),
    ],
)
def test_fields_that_have_other_tokens(step: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        check_by_token(graph(), step)


def test_masks_that_nothing_can_read() -> None:
    mask = torch.zeros(1, 1, 6, 6) > 0
    with pytest.raises(LayoutError, match=r"cuts the sequence over cp2, a mask is of the whole"):
        check_masks(graph(Layout(cp=2, dp=2)), [batch(attention_mask=mask)])
    with pytest.raises(LayoutError, match="has packing_kwargs, too, whose borders are the mask"):
        check_masks(graph(), [batch(attention_mask=mask, packing_kwargs={})])


def test_mappings_of_other_kinds_are_dicts() -> None:
    inputs = UserDict({"images": UserDict(x=PIXELS)})
    found = plain(UserDict({"input_ids": IDS, "modality_inputs": inputs}))
    assert type(found) is type(found["modality_inputs"]["images"]) is dict
    assert found["modality_inputs"]["images"]["x"] is PIXELS
    assert plain([1]) == [1]

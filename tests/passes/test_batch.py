"""Glue between modules sees only some of the batch: what keeps samples apart passes, the rest is
refused."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from colocc.errors import CaptureError
from colocc.passes.capture import leaf
from tests.passes.kit import (
    PAIR_LAYOUTS,
    TRIO_BATCH,
    TRIO_LAYOUTS,
    Pair,
    Trio,
    graph_of,
    pair_graph,
)

Glue = Callable[[torch.Tensor, torch.Tensor], Any]
T = torch.Tensor


KEPT: dict[str, Glue] = {
    "arithmetic": lambda x, mask: (x * 2 + 1) / 3 - x,
    "where": lambda x, mask: torch.where(mask, x, x * 0),
    "masked_fill": lambda x, mask: x.masked_fill(~mask, 0.0),
    "gelu": lambda x, mask: F.gelu(x),
    "mean of the features": lambda x, mask: x - x.mean(-1, keepdim=True),
    "mean over the tokens": lambda x, mask: x + x.mean(dim=1, keepdim=True),
    "softmax of the features": lambda x, mask: x.softmax(-1),
    "cumsum over the tokens": lambda x, mask: torch.cumsum(x, dim=1),
    "cat of tokens": lambda x, mask: torch.cat([x, x], dim=1),
    "slice of tokens": lambda x, mask: x[:, 1:],
    "slice from the end": lambda x, mask: x[..., 1:, :],
    "slice of features": lambda x, mask: x[:, :, :4].repeat_interleave(2, -1),
    "there and back": lambda x, mask: x.transpose(0, 1).transpose(0, 1),
    "flatten of the tokens": lambda x, mask: x.flatten(1).reshape(-1, 5, 8),
    "unsqueeze": lambda x, mask: x.unsqueeze(1).squeeze(1),
    "layer_norm": lambda x, mask: F.layer_norm(x, (8,)),
    "matmul per sample": lambda x, mask: (x @ x.transpose(1, 2)) @ x,
    "split of features": lambda x, mask: torch.cat(torch.split(x, 4, -1), -1),
    "squeeze": lambda x, mask: (x[:, :1].squeeze()[:, None] + x).squeeze(0),
    "stack on a new dim": lambda x, mask: torch.stack([x, x], 1).sum(1),
}


@pytest.mark.parametrize("name", KEPT)
def test_glue_that_keeps_samples_apart_passes(name: str) -> None:
    graph = pair_graph(KEPT[name])
    language = next(n for n in graph.fx.nodes if graph.module_of(n) == "language")
    (source,) = (str(n.meta["types"]) for n in language.all_input_nodes)
    assert source.startswith("f32[8@dp")
    assert len(graph.plans) == 1
    assert graph.plans[next(iter(graph.plans))].scale == Fraction(2)


# torch takes the name that numpy gives a dim.
AXIS: Any = {"axis": 0}
REFUSED: dict[str, tuple[str, Glue]] = {
    "mean over the batch": ("mean", lambda x, mask: x - x.mean(0, keepdim=True)),
    "mean of everything": ("mean", lambda x, mask: x - x.mean()),
    "mean from the front": ("mean", lambda x, mask: x - x.mean(-3, keepdim=True)),
    "sum of everything": ("sum", lambda x, mask: x / x.sum()),
    "softmax over the batch": ("softmax", lambda x, mask: x.softmax(0)),
    "log_softmax over the batch": ("log_softmax", lambda x, mask: torch.log_softmax(x, dim=0)),
    "a permutation of samples": ("getitem", lambda x, mask: x[torch.arange(8)]),
    "one half of the samples": ("getitem", lambda x, mask: x[:4]),
    "the first sample": ("getitem", lambda x, mask: x[0] + x),
    "cumsum over the batch": ("cumsum", lambda x, mask: x.cumsum(0)),
    "flip of the batch": ("flip", lambda x, mask: x.flip(0)),
    "roll": ("roll", lambda x, mask: x.roll(1, 0)),
    "cat of samples": ("cat", lambda x, mask: torch.cat([x, x])),
    "reshape that moves the batch": ("reshape", lambda x, mask: x.transpose(0, 1).reshape(-1, 8)),
    "batch norm": (
        "batch_norm",
        lambda x, mask: F.batch_norm(x, None, None, training=True),
    ),
    "outer product of samples": ("matmul", lambda x, mask: x.flatten(1) @ x.flatten(1).t()),
    "sort of samples": ("sort", lambda x, mask: x.sort(dim=0)[0]),
    "sort along an axis": ("sort", lambda x, mask: torch.sort(x, **AXIS)[0]),
    "samples looked up": (
        "embedding",
        lambda x, mask: F.embedding(mask.sum((1, 2)), x.flatten(1)).unflatten(1, (5, 8)),
    ),
    "pairs of samples": ("sub", lambda x, mask: x[:, None] - x[None]),
    "einsum": ("einsum", lambda x, mask: torch.einsum("bth,cth->bth", x, x)),
    "normalize over the batch": ("normalize", lambda x, mask: F.normalize(x, dim=0)),
    "layer_norm over the batch": (
        "layer_norm fixes the number of samples",
        lambda x, mask: F.layer_norm(x, (8, 5, 8)),
    ),
    "layer_norm of everything": (
        "layer_norm",
        lambda x, mask: F.layer_norm(x, x.shape),
    ),
    "any": ("any", lambda x, mask: x * mask.any()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_glue_that_mixes_samples_is_refused(name: str) -> None:
    operation, glue = REFUSED[name]
    with pytest.raises(CaptureError) as info:
        pair_graph(glue)
    message = str(info.value)
    assert "tests/" not in message
    assert "passes/test_batch.py:" in message
    if "fixes" in operation:
        assert operation in message
    elif "one dim must grow" not in message:
        assert f": {operation} on a tensor that is split by sample may mix samples" in message
        assert "@colocc.leaf" in message


NUMBERS: dict[str, tuple[str, Glue]] = {
    "a mean by hand": ("div", lambda x, mask: x.cumsum(1) / x.shape[0]),
    "its root": ("div", lambda x, mask: x / x.shape[0] ** 0.5),
    "all elements": ("div", lambda x, mask: x / x.numel()),
    "in place": ("mul_", lambda x, mask: x.clone().mul_(x.shape[0])),
    "a position": ("arange", lambda x, mask: x + torch.arange(x.shape[0])[:, None, None]),
    "one hot": ("eye", lambda x, mask: x + torch.eye(x.shape[0], 8)[:, None]),
    "a fill": ("full", lambda x, mask: x + torch.full((x.shape[0], 1, 1), x.shape[0])),
    "alpha": ("add", lambda x, mask: torch.add(x, x, alpha=x.shape[0])),
    "where": ("where", lambda x, mask: torch.where(x > 0, x, x.shape[0])),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_of_samples_as_a_value_is_refused(name: str) -> None:
    operation, glue = NUMBERS[name]
    with pytest.raises(CaptureError) as info:
        pair_graph(glue)
    message = str(info.value)
    assert "passes/test_batch.py:" in message
    assert f": {operation.strip('_')} takes the number of samples for a plain number" in message
    assert "@colocc.leaf" in message


SHAPES: dict[str, Glue] = {
    "view": lambda x, mask: x.view(x.shape[0], -1).view(x.shape[0], 5, 8),
    "zeros": lambda x, mask: x + torch.zeros(x.shape[0], 5, 1),
    "full": lambda x, mask: x + torch.full((x.shape[0], 1, 1), 2.0),
    "expand": lambda x, mask: torch.cat([x, torch.ones(1, 1, 8).expand(x.shape[0], 1, 8)], 1),
    "repeat": lambda x, mask: torch.cat([x, torch.ones(1, 1, 8).repeat(x.shape[0], 1, 1)], 1),
    "another size": lambda x, mask: x / x.shape[1],
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_number_of_samples_may_be_a_size(name: str) -> None:
    assert len(pair_graph(SHAPES[name]).plans) == 1


def test_the_whole_message() -> None:
    with pytest.raises(CaptureError) as info:
        pair_graph(center)
    where, _, rest = str(info.value).partition(": ")
    assert where.endswith("return x - x.mean(0, keepdim=True)")
    assert_expected_inline(
        textwrap.fill(rest, 90),
        """\
mean on a tensor that is split by sample may mix samples: each rank sees only some of them
(f32[8@dp,5,8] -> f32[1,5,8]). Keep samples apart, or, if it does, move it into a function
marked @colocc.leaf or a module that the layouts name.""",
    )


def center(x: T, mask: T) -> T:
    return x - x.mean(0, keepdim=True)


def test_a_leaf_is_the_users_promise() -> None:
    graph = pair_graph(leaf(center))
    assert len(graph.plans) == 1


class Norm(Pair):
    """Batch norm between the modules, where nothing covers it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, images: T, mask: T) -> T:
        out: T = self.language(self.norm(self.vision(images)) * mask)
        return out


def test_a_batch_norm_module_between_modules() -> None:
    batch = {"images": torch.zeros(8, 5, 16), "mask": torch.ones(8, 5, 1)}
    with pytest.raises(CaptureError, match="batchnorm1d on a tensor that is split by sample"):
        graph_of(Norm(), PAIR_LAYOUTS, batch)


class After(Pair):
    def forward(self, images: T, mask: T) -> T:
        out: T = self.language(self.vision(images))
        return out.mean()


def test_after_the_language_model_a_mean_over_the_microbatch_is_the_users_own() -> None:
    graph = graph_of(After(), PAIR_LAYOUTS, {"images": torch.zeros(8, 5, 16)})
    assert [n.name for n in graph.fx.nodes][-2:] == ["mean", "output"]


class Sized(Trio):
    """The batch size of what vision's ranks hold, used on what audio's ranks hold."""

    def forward(self, images: T, clips: T, mask: T) -> T:
        heard = self.audio(clips)
        out: T = self.language(heard.view(self.vision(images).shape[0], 5, 8) * mask)
        return out


def test_the_batch_size_of_one_layout_used_on_another_is_its_own_there() -> None:
    batch = {**TRIO_BATCH, "mask": torch.ones(8, 5, 1)}
    graph = graph_of(Sized(), TRIO_LAYOUTS, batch)
    size = next(n for n in graph.fx.nodes if n.name == "size")
    (view,) = size.users
    assert size.meta["module"] == view.meta["module"] == "audio"
    assert size.target(torch.zeros(3, 2)) == 3

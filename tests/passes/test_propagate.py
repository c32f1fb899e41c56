"""Propagate: the layout of every value, and the module that all others feed."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from colocc.errors import CaptureError
from colocc.layout import Layout
from colocc.passes.capture import capture
from colocc.passes.propagate import find_sink, propagate
from tests.passes.kit import (
    PAIR_LAYOUTS,
    TRIO_BATCH,
    TRIO_LAYOUTS,
    Pair,
    Trio,
    graph_of,
    refusal,
)


def placed(model: nn.Module, layouts: dict[str, Layout], batch: dict[str, torch.Tensor]) -> str:
    graph = capture(model, layouts, example_inputs=batch)
    graph = propagate(graph)
    return "\n".join(f"{n.name}: {n.meta['module']}" for n in graph.fx.nodes)


def test_glue_runs_where_its_arguments_are_or_where_it_is_read() -> None:
    assert_expected_inline(
        placed(Trio(), TRIO_LAYOUTS, TRIO_BATCH),
        """\
images: vision
clips: audio
mask: language
vision: vision
audio: audio
unsqueeze: language
where: language
language: language
output: language""",
    )


class Masked(nn.Linear):
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, on: torch.Tensor, raw: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(x) * on * raw


class Shared(nn.Module):
    """An input, and glue made of it, that both modules read."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = Masked(8, 8), Masked(8, 8)

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        on = ~mask
        out: torch.Tensor = self.language(self.vision(images, on, mask), on, mask)
        return out


def test_an_input_is_copied_for_each_layout_that_reads_it() -> None:
    batch = {"images": torch.zeros(8, 8), "mask": torch.ones(8, 1, dtype=torch.bool)}
    assert_expected_inline(
        placed(Shared(), PAIR_LAYOUTS, batch),
        """\
images: vision
mask: language
mask_vision: vision
invert: language
invert_vision: vision
vision: vision
language: language
output: language""",
    )
    graph = graph_of(Shared(), PAIR_LAYOUTS, batch)
    assert list(graph.plans) == ["vision_language"]


def test_the_sink_is_what_no_other_module_reads() -> None:
    assert find_sink(capture(Trio(), TRIO_LAYOUTS), {}) == "language"
    assert find_sink(capture(Pair(), dict(reversed(PAIR_LAYOUTS.items()))), {}) == "language"


class Idle(Pair):
    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.vision(images)
        return out


def test_a_module_that_is_never_called() -> None:
    call = lambda: graph_of(Idle(), PAIR_LAYOUTS, None)  # noqa: E731
    assert_expected_inline(
        refusal(CaptureError, call),
        """\
layouts names 'language' (language), but Idle.forward never calls it. Remove it from layouts, or
    call it.""",
    )


class Circle(Pair):
    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.vision(self.language(self.vision(images)))
        return out


def test_modules_that_read_one_another() -> None:
    call = lambda: graph_of(Circle(), PAIR_LAYOUTS, None)  # noqa: E731
    assert_expected_inline(
        refusal(CaptureError, call),
        """Circle.forward calls its modules in a circle: ['language', 'vision']""",
    )


def test_glue_needs_an_example() -> None:
    model = Pair(lambda x, mask: x * 2)
    with pytest.raises(CaptureError) as info:
        graph_of(model, PAIR_LAYOUTS, None)
    message = str(info.value)
    assert message.startswith("Pair computes mul between its modules (passes/test_propagate.py:")
    assert message.endswith(
        "whether that keeps samples apart depends on shapes. Give compile() one batch as "
        "example_inputs=."
    )


def test_without_glue_no_example_is_needed() -> None:
    graph = graph_of(Pair(), PAIR_LAYOUTS, None)
    assert [str(n.meta["types"]) for n in graph.fx.nodes if graph.module_of(n)] == [
        "?[B@dp,...]",
        "?[B@dp,...]",
    ]

"""Covers passes/watch.py: calls are seen while one traces, and everything is as it was after."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colocc.errors import CaptureError
from colocc.passes.graph import Glue, Method, Traits
from colocc.passes.watch import checks_of_data, every_call, reads_of_training, unchanged, watched
from tests.passes.kit import Pair


class Notes:
    """A watcher that notes what it is told, and lets it run."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def sees(self, args: Any, kwargs: Any) -> bool:
        return True

    def call(self, module: nn.Module, run: Any, args: Any, kwargs: Any) -> Any:
        self.seen.append(type(module).__name__)
        return run(*args, **kwargs)

    def method(self, method: Method, label: str, arguments: dict[str, Any]) -> Any:
        self.seen.append(f"{label} {sorted(arguments)}")
        return None


class Model(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Any] = {"kept": [1]}
        self.links = {"a": 1}

    def merge(self, x: Tensor, *, places: Any = None) -> Any:
        raise AssertionError("the watcher runs instead")


def test_direct_forwards_and_glue_methods() -> None:
    model, notes = Model(), Notes()
    traits = Traits(glue=(Glue("merge", "merged", "language"),), disabled=("links",))
    with watched(model, {"vision": "vision"}, traits, notes):
        model.vision.forward(torch.zeros(1, 16))
        model.language.forward(torch.zeros(1, 8))
        model.merge(torch.zeros(1), places=2)
        assert model.links == {}
    assert notes.seen == ["Linear", "merged ['places', 'x']"]
    assert model.links == {"a": 1}
    assert "forward" not in model.vision.__dict__ and "merge" not in model.__dict__


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


def doubled(x: Tensor) -> Any:
    return Doubled.apply(x)  # type: ignore[no-untyped-call]


def test_a_custom_backward_is_refused_inside_and_runs_outside() -> None:
    with (
        watched(Model(), {}, Traits(), Notes()),
        pytest.raises(CaptureError, match=r"Doubled\.apply\(\) has a backward of its own") as info,
    ):
        doubled(torch.ones(1))
    assert "passes/test_watch.py:" in str(info.value) and "@colocc.leaf" in str(info.value)
    assert doubled(torch.ones(1)) == 2


def test_calls_of_other_threads_pass_through() -> None:
    notes, layer = Notes(), nn.Identity()
    with every_call(notes):
        thread = threading.Thread(target=layer, args=(torch.zeros(1),))
        thread.start()
        thread.join()
        assert notes.seen == []
        nn.Sequential(layer)(torch.zeros(1))
    layer(torch.zeros(1))
    assert notes.seen == ["Sequential", "Identity"]


def test_reads_of_training_are_told_and_it_can_be_set() -> None:
    seen: list[bool] = []
    layer = nn.Dropout()
    with reads_of_training(lambda module, training: seen.append(training)):
        assert layer.training
        layer.eval()
        assert not layer.training
    assert layer.training is False and "training" not in vars(nn.Module)
    assert seen[0] is True and seen[-1] is False


def test_a_check_that_is_left_out_is_not_made() -> None:
    asked: list[Any] = []

    def left_out(condition: Any) -> bool:
        asked.append(condition)
        return condition is None

    with checks_of_data(left_out):
        torch._check_with(RuntimeError, None, lambda: "not made")  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="made"):
            torch._check_with(RuntimeError, False, lambda: "made")
    assert asked == [None, False]


def test_what_a_forward_leaves_behind_is_taken_back() -> None:
    model = Model()
    kept = model.cache

    def forward() -> None:
        model.cache["more"] = 1
        model.cache = {}
        model.vision.left = torch.zeros(1)
        del model.links
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"), unchanged(model):
        forward()
    assert model.cache is kept and kept == {"kept": [1]}
    assert not hasattr(model.vision, "left") and model.links == {"a": 1}

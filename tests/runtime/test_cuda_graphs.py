"""Covers runtime/cuda_graphs.py: pairs and their leases with recorded operations in place of CUDA's
graphs, and every reason to run without. On real graphs: tests/gpus."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from colocc import Layout
from colocc.runtime import cpu, cuda_graphs, megatron
from colocc.runtime.cuda_graphs import KINDS
from tests.runtime.recorded import (
    Held,
    captured,
    close,
    gradients,
    plain,
    recorded_graphs,
    wanted,
    xs,
)


def test_as_many_pairs_as_are_under_way() -> None:
    module = Held(plain())
    call, inputs = captured(module), xs(6)
    with cpu.ranks(), recorded_graphs():
        for first in (0, 3):
            made = [call(x) for x in inputs[first : first + 3]]
            assert call.captured() == 3
            for x, out in zip(inputs[first:], made, strict=False):
                torch.testing.assert_close(out, module.module(x))
            for out in reversed(made):
                out.square().sum().backward()
        assert call.captured() == 3
        close(gradients(module), wanted(module.module, inputs))


def test_inputs_get_their_gradients() -> None:
    module = Held(plain())
    call, (x,) = captured(module), xs(1)
    x.requires_grad_()
    with cpu.ranks(), recorded_graphs():
        for _ in range(2):
            x.grad = None
            call(x).square().sum().backward()
            found, x.grad = x.grad, None
            module.module(x).square().sum().backward()
            assert x.grad is not None
            torch.testing.assert_close(found, x.grad)


def test_a_backward_that_never_comes_frees_its_pair() -> None:
    call = captured(Held(plain()))
    with cpu.ranks(), recorded_graphs():
        for x in xs(3):
            call(x)
        assert call.captured() == 1


def test_a_second_backward_is_refused() -> None:
    call = captured(Held(plain()))
    with cpu.ranks(), recorded_graphs():
        loss = call(xs(1)[0]).square().sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"a second time.*cuda_graphs=False"):
            loss.backward()


def test_without_gradients_the_module_runs() -> None:
    module = Held(plain())
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs(), torch.no_grad():
        torch.testing.assert_close(call(x), module.module(x))
        assert call.captured() == 0


def test_a_frozen_module_needs_one_pair_and_keeps_its_outputs_apart() -> None:
    module = Held(plain()).requires_grad_(False)
    call, inputs = captured(module), xs(3)
    with cpu.ranks(), recorded_graphs():
        made = [call(x) for x in inputs]
        assert call.captured() == 1
        for x, out in zip(inputs, made, strict=True):
            torch.testing.assert_close(out, module.module(x))
            assert not out.requires_grad


CHANGES = ["moved", "gradient moved", "replaced", "part replaced", "frozen", "mode", "shape"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_was_captured_with_changes(change: str) -> None:
    module = Held(plain())
    call, (x, y) = captured(module), xs(2)
    weight = module.module[0].weight  # type: ignore[index]
    with cpu.ranks(), recorded_graphs():
        call(x).square().sum().backward()
        state = call.state()
        if change == "moved":
            weight.data = weight.data * 2
        elif change == "gradient moved":
            weight.main_grad = torch.zeros_like(weight)
        elif change == "replaced":
            new = nn.Linear(4, 8).double()
            module.module[0].weight = Held(new).module.weight  # type: ignore[index]
        elif change == "part replaced":
            module.module[0] = Held(nn.Linear(4, 8).double()).module  # type: ignore[operator]
        elif change == "frozen":
            weight.requires_grad_(False)
        elif change == "mode":
            module.eval()
        else:
            x, y = x[:3], y[:3]
        for other in module.parameters():
            other.main_grad.zero_()  # type: ignore[attr-defined]
        # Steps whose messages must not meet a capture are told so in advance.
        assert state is not None
        assert (call.state() == state) == (change == "shape")
        made = call(y)
        torch.testing.assert_close(made, module.module(y))
        made.square().sum().backward()
        assert call.captured() == 2
        found = gradients(module)
        if change == "frozen":
            assert not found.pop("module.0.weight").any()
            found["module.0.weight"] = torch.zeros(0)
            expected = wanted_but(module.module, y, "module.0.weight")
        else:
            expected = wanted(module.module, [y])
        close(found, expected)


def test_weights_are_looked_at_once_while_they_are_steady() -> None:
    module = Held(plain())
    call, inputs, looks = captured(module), xs(4), []
    state = cuda_graphs._Weights.state

    def counted(self: Any) -> tuple[Any, ...]:
        looks.append(self)
        return state(self)

    with cpu.ranks(), recorded_graphs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs._Weights, "state", counted)
        with call.steady():
            assert call.state() is not None
            for x in inputs[:3]:
                call(x).square().sum().backward()
        assert (len(looks), call.captured()) == (1, 1)
        weight = module.module[0].weight  # type: ignore[index]
        weight.data = weight.data * 2
        for other in module.parameters():
            other.main_grad.zero_()  # type: ignore[attr-defined]
        with call.steady():
            call(inputs[3]).square().sum().backward()
        assert (len(looks), call.captured()) == (2, 2)
    close(gradients(module), wanted(module.module, inputs[3:]))


def wanted_but(module: nn.Module, x: torch.Tensor, frozen: str) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module(x).square().sum().backward()
    return {
        f"module.{name}": torch.zeros(0) if weight.grad is None else weight.grad
        for name, weight in module.named_parameters()
        if weight.grad is not None or f"module.{name}" == frozen
    }


def test_more_kinds_than_a_few_run_without() -> None:
    module = Held(plain())
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for rows in range(1, 6):
            torch.testing.assert_close(call(x[:rows]), module.module(x[:rows]))
        assert call.reason == f"its inputs or weights are of more than {KINDS} kinds"
    assert any("cuda_graphs: images runs without" in str(one.message) for one in seen)


def test_a_forward_that_cannot_be_captured_runs_without() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = plain(), 0

        def forward(self, x: torch.Tensor) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return self.inner(x)

    module = Held(Fails())
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        with pytest.warns(UserWarning, match="when it was captured: operation not permitted"):
            out = call(x)
    torch.testing.assert_close(out, module.module.inner(x))  # type: ignore[operator]
    assert call.reason is not None


class Recomputes(nn.Linear):
    config = type("Config", (), {"recompute_granularity": "full"})


class Scales(nn.Linear):
    config = type("Config", (), {"fp8": "hybrid"})


class Drops(nn.Linear):
    config = type("Config", (), {"hidden_dropout": 0.1, "attention_dropout": 0.0})


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (plain(), "its gradients are not held by Megatron's DDP"),
        (Held(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))), "it drops out at random"),
        (Held(Drops(2, 2)), "it drops out at random"),
        (Held(Recomputes(2, 2)), "it recomputes activations"),
        (Held(Scales(2, 2)), "it scales to fp8"),
        (Held(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))).eval(), None),
        (plain().requires_grad_(False), None),
    ],
)
def test_what_cannot_be_captured(module: nn.Module, reason: str | None) -> None:
    found = megatron.uncapturable(module)
    assert found is None if reason is None else (found is not None and found.startswith(reason))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2), Layout(dp=2, ep=2)], ids=str)
def test_an_encoder_with_collectives_inside_runs_without(layout: Layout) -> None:
    module = Held(plain())
    call, (x,) = captured(module, layout), xs(1)
    with cpu.ranks(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.warns(UserWarning, match="has collectives inside the encoder"):
            out = call(x)
    torch.testing.assert_close(out, module.module(x))
    assert call.captured() == 0


def test_a_setting_that_is_replaced_is_seen() -> None:
    module = Held(nn.Sequential(Drops(2, 2)))
    part: Any = module.module[0]  # type: ignore[index]
    part.config = type("Config", (), {"hidden_dropout": 0.0})
    assert megatron.uncapturable(module) is None
    part.config = type("Config", (), {"hidden_dropout": 0.5})
    assert megatron.uncapturable(module) == "it drops out at random"

"""Covers runtime/cuda_graphs.py: pairs and their leases with recorded operations in place of CUDA's
graphs, and every reason to run without. On real graphs: tests/gpus."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import colocc
from colocc import Layout
from colocc.runtime import cpu, cuda_graphs, marks, megatron
from colocc.runtime.cuda_graphs import KINDS, CapturedModule
from tests import mimo
from tests.harness import ProcessPool
from tests.runtime.megatron.test_engine import train_on_rank

SMALL = {"images": Layout(dp=2), "language": Layout(tp=2)}


class Recorded(TorchDispatchMode):
    """Operations on fixed tensors, run again by ``replay``: what a CUDA graph is."""

    current: "Recorded"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def __enter__(self) -> "Recorded":
        Recorded.current = self
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                if isinstance(func, Mark):
                    func.reached()
                    continue
                olds = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
                inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                places = {tensor.untyped_storage().data_ptr() for tensor in inputs}
                news = tree_leaves(func(*args, **kwargs))
                news = [leaf for leaf in news if isinstance(leaf, torch.Tensor)]
                for old, new in zip(olds, news, strict=True):
                    # A view, or a tensor changed in place, is where it was.
                    if old.numel() and old.untyped_storage().data_ptr() not in places:
                        old.copy_(new)


class Mark:
    """An event inside a graph: ``watch`` is called when a replay is there."""

    watch: Callable[["Mark"], None] = staticmethod(lambda mark: None)

    def __init__(self, *, external: bool = False) -> None:
        assert external

    def record(self) -> None:
        Recorded.current.calls.append((self, None, None, None))

    def reached(self) -> None:
        Mark.watch(self)


@contextlib.contextmanager
def recorded_graphs() -> Iterator[None]:
    """Inside, graphs are recorded operations, and the CPU is as good as a GPU."""

    def look(self: CapturedModule, module: nn.Module, leaves: list[Any]) -> None:
        reason = megatron.uncapturable(module)
        if reason is not None:
            self._give_up(reason)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Recorded)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(torch.cuda, "Event", Mark)
        patch.setattr(marks, "sees_marks", lambda device: True)
        patch.setattr(marks, "_beside", lambda device: torch.cuda.Stream())
        patch.setattr(cuda_graphs, "_capturing", lambda graph, pool, stream: graph)
        patch.setattr(cuda_graphs, "_stream", lambda device: torch.cuda.Stream())
        patch.setattr(CapturedModule, "_look", look)
        yield


class Held(nn.Module):
    """A stand-in for a module in Megatron's DDP: gradients are added to main_grad."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        for weight in module.parameters():
            weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
            weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def finish_grad_sync(self) -> None:
        raise AssertionError("nothing is reduced here")

    scale_gradients = finish_grad_sync
    ddp_config: Any = type(
        "Config", (), {"overlap_param_gather": False, "overlap_grad_reduce": False}
    )


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).double()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: megatron.main_gradient(weight).clone() for name, weight in module.named_parameters()
    }


def wanted(module: nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sum of the gradients of every input's own squared outputs, without graphs."""
    module.zero_grad()
    for x in inputs:
        module(x).square().sum().backward()
    found = {f"module.{name}": weight.grad.clone() for name, weight in module.named_parameters()}  # type: ignore[union-attr]
    module.zero_grad()
    return found


def close(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert found.keys() == other.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-12)


def captured(module: nn.Module) -> CapturedModule:
    return CapturedModule("images", Layout(), lambda: module)


def xs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


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


def test_a_setting_that_is_replaced_is_seen() -> None:
    module = Held(nn.Sequential(Drops(2, 2)))
    part: Any = module.module[0]  # type: ignore[index]
    part.config = type("Config", (), {"hidden_dropout": 0.0})
    assert megatron.uncapturable(module) is None
    part.config = type("Config", (), {"hidden_dropout": 0.5})
    assert megatron.uncapturable(module) == "it drops out at random"


# ---------------------------------------------------------------- the whole step


def steps_on_rank(
    _: int, layouts: dict[str, Layout], schedule: str, graphs: str, overlap: bool
) -> tuple[list[Any], dict[str, torch.Tensor], int]:
    """Two steps of three microbatches: logs, gradients, how many pairs were captured."""
    early = []
    start = marks.Marks.start

    def noted(self: marks.Marks, groups: list[Any], reduce: Callable[[Any], None]) -> None:
        def counted(group: Any) -> None:
            early.append(group)
            reduce(group)

        start(self, groups, counted)

    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts, overlap=overlap, bucket_size=100 if overlap else None)
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(marks.Marks, "start", noted)
        program = stack.enter_context(
            colocc.compile(
                model, layouts, groups=groups, schedule=schedule, cuda_graphs=graphs != "off"
            )
        )
        if graphs == "recorded":
            stack.enter_context(recorded_graphs())
        logs = []
        for step in range(2):
            model.zero_grad_buffer()
            with warnings.catch_warnings():
                if graphs == "refused":
                    warnings.simplefilter("ignore", UserWarning)
                logs += program.forward_backward(
                    [mimo.batch(8, seed=3 * step + index) for index in range(3)],
                    num_microbatches=3,
                    loss_func=mimo.loss_func,
                    force_all_reduce=True,
                )
        found = {
            f"{owner}.{name}": megatron.main_gradient(weight).clone()
            for owner, module in program.trainable().items()
            for name, weight in module.named_parameters()
        }
        encoder: Any = model.modality_submodules["images"]
        buckets = len(encoder.bucket_groups)
        assert buckets > 2 or not overlap
        assert len(early) == (2 * buckets if overlap and graphs == "recorded" else 0)
        if graphs == "refused":
            assert [call.reason for call in program.captured.values()] == ["there is no GPU"]
        return logs, found, sum(call.captured() for call in program.captured.values())


@pytest.mark.parametrize(
    ("layouts", "schedule", "pairs", "overlap"),
    [
        (SMALL, "three_phase", 1, False),
        (SMALL, "lookahead=1", 1, False),
        (SMALL, "lookahead=2", 2, True),
        (SMALL, "three_phase", 1, True),
        ({"images": Layout(dp=2), "language": Layout(pp=2)}, "filled=1", None, False),
        ({"images": Layout(dp=2), "language": Layout(pp=2)}, "filled=2", None, True),
    ],
)
def test_a_step_with_graphs_is_a_step_without(
    processes: ProcessPool,
    layouts: dict[str, Layout],
    schedule: str,
    pairs: int | None,
    overlap: bool,
) -> None:
    work = partial(steps_on_rank, layouts=layouts, schedule=schedule, overlap=overlap)
    without, graphs, refused = (
        processes.run(2, partial(work, graphs=how)) for how in ("off", "recorded", "refused")
    )
    for one, other, third in zip(without, graphs, refused, strict=True):
        assert one[0] == other[0] == third[0]
        assert one[1].keys() == other[1].keys() == third[1].keys()
        for name, gradient in one[1].items():
            torch.testing.assert_close(other[1][name], gradient, rtol=1e-6, atol=1e-6)
            assert torch.equal(third[1][name], gradient), name
        assert one[2] == third[2] == 0
        assert other[2] == pairs if pairs is not None else other[2] >= 1


def trained_on_rank(rank: int, layouts: dict[str, Layout], schedule: str) -> list[Any]:
    with recorded_graphs():
        return train_on_rank(
            rank, layouts, distributed=True, schedule=schedule, overlap=True, cuda_graphs=True
        )


@pytest.mark.parametrize(
    ("language", "schedule"),
    [(Layout(pp=2), "three_phase"), (Layout(pp=2), "filled=1"), (Layout(tp=2), "lookahead=1")],
)
def test_graphs_train_on_weights_that_are_gathered_behind_the_step_before(
    processes: ProcessPool, language: Layout, schedule: str
) -> None:
    layouts = {"images": Layout(dp=2), "language": language}
    work = partial(train_on_rank, layouts=layouts, distributed=True, schedule=schedule)
    replayed = partial(trained_on_rank, layouts=layouts, schedule=schedule)
    for one, other in zip(processes.run(2, work), processes.run(2, replayed), strict=True):
        for (norm, logs), (wanted_norm, wanted) in zip(other, one, strict=True):
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
            assert logs == [pytest.approx(log, rel=1e-5) for log in wanted]

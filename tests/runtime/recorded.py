"""Recorded operations in place of CUDA's graphs, and stand-ins for what is captured."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colocc import Layout
from colocc.runtime import cuda_graphs, marks, megatron
from colocc.runtime.cuda_graphs import CapturedModule


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


def captured(module: nn.Module, layout: Layout = Layout()) -> CapturedModule:  # noqa: B008
    return CapturedModule("images", layout, lambda: module)


def xs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


@contextlib.contextmanager
def started_early() -> Iterator[list[Any]]:
    """The groups of buckets whose reductions marks start inside."""
    early: list[Any] = []
    start = marks.Marks.start

    def noted(self: marks.Marks, groups: list[Any], reduce: Callable[[Any], None]) -> None:
        def counted(group: Any) -> None:
            early.append(group)
            reduce(group)

        start(self, groups, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks.Marks, "start", noted)
        yield early

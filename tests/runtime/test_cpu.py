import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from colocc.errors import LayoutError
from colocc.runtime import cpu
from tests.harness import run_threads

CPU = torch.device("cpu")


def streams() -> bool:
    event, later = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    with torch.cuda.stream(torch.cuda.Stream(device="cuda", priority=-1)):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        event.record()
        later.record(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_event(event)
    torch.cuda.current_stream().synchronize()
    return bool(event.query() and event.elapsed_time(later) >= 0.0)


def random_states() -> bool:
    torch.cuda.manual_seed(3)
    state, first = torch.cuda.get_rng_state(), torch.rand(2)
    torch.cuda.set_rng_state(state)
    again = torch.rand(2)
    torch.cuda.random.set_rng_state(torch.cuda.random.get_rng_state("cuda"))
    torch.cuda.manual_seed_all(3)
    return torch.equal(first, again) and torch.equal(first, torch.rand(2))


# What fails without a GPU, and what it answers on CPU ranks.
CALLS: dict[str, tuple[Callable[[], Any], Any]] = {
    "current_device": (lambda: torch.cuda.current_device(), CPU),
    "synchronize": (lambda: torch.cuda.synchronize(), None),
    "set_device": (lambda: torch.cuda.set_device(0), None),
    "streams": (streams, True),
    "random_states": (random_states, True),
    "kwarg": (lambda: torch.zeros(1, device="cuda").device, CPU),
    "indexed": (lambda: torch.zeros(1, device=torch.device("cuda", 3)).device, CPU),
    "number": (lambda: torch.zeros(1, device=0).device, CPU),
    "like": (lambda: torch.ones_like(torch.zeros(1), device="cuda").device, CPU),
    "cuda": (lambda: torch.zeros(1).cuda().device, CPU),
    "to": (lambda: torch.zeros(1).to("cuda", torch.float64).dtype, torch.float64),
    "to_kwarg": (lambda: torch.zeros(1).to(device="cuda:1").device, CPU),
    "module": (lambda: torch.nn.Linear(1, 1).cuda().to("cuda").weight.device, CPU),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_call_means_the_cpu_inside_and_fails_outside(name: str) -> None:
    call, expected = CALLS[name]
    with cpu.ranks():
        assert call() == expected
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        call()


def test_types_are_named_as_cuda_s() -> None:
    value = torch.zeros(1)
    with cpu.ranks():
        assert value.type() == "torch.cuda.FloatTensor"
        assert value.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert value.type(torch.float64).dtype == torch.float64
    assert value.type() == "torch.FloatTensor"


def test_no_gpu_is_claimed() -> None:
    with cpu.ranks():
        assert not torch.cuda.is_available()
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0
        assert not torch.cuda.is_current_stream_capturing()
        torch.cuda.empty_cache()
        assert torch.cuda.nvtx.range_push("a range") is None
        assert torch.cuda.nvtx.range_pop() is None


def originals() -> list[Any]:
    return [vars(owner)[name] for owner, name, _ in cpu._replacements()]


def test_off_restores_every_original() -> None:
    before = originals()
    cpu.enable()
    assert not any(a is b for a, b in zip(originals(), before, strict=True))
    cpu.disable()
    assert all(a is b for a, b in zip(originals(), before, strict=True))
    assert _get_current_function_mode() is None
    assert not cpu._rng_log.filters


def test_on_and_off_twice_change_nothing() -> None:
    before = originals()
    cpu.disable()
    cpu.enable()
    cpu.enable()
    assert torch.zeros(1, device="cuda").device == CPU
    cpu.disable()
    cpu.disable()
    assert all(a is b for a, b in zip(originals(), before, strict=True))


def test_blocks_nest_and_end_on_errors() -> None:
    with cpu.ranks():
        with pytest.raises(KeyError), cpu.ranks():
            raise KeyError
        assert torch.zeros(1, device="cuda").device == CPU
    assert _get_current_function_mode() is None


def test_off_refuses_inside_another_mode() -> None:
    class Other(TorchFunctionMode):
        pass

    with cpu.ranks():
        with Other(), pytest.raises(RuntimeError, match="entered after"):
            cpu.disable()
        assert torch.zeros(1, device="cuda").device == CPU


def test_threads_switch_for_themselves_and_the_last_restores() -> None:
    before = torch.cuda.current_device
    inside, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def other() -> None:
        seen.append(_get_current_function_mode() is None)
        with cpu.ranks():
            inside.set()
            leave.wait(10)
            seen.append(torch.zeros(1, device="cuda").device == CPU)

    thread = threading.Thread(target=other)
    with cpu.ranks():
        thread.start()
        assert inside.wait(10)
    assert torch.cuda.current_device is not before, "the other thread still uses it"
    leave.set()
    thread.join()
    assert seen == [True, True]
    assert torch.cuda.current_device is before


class OnCuda(torch.autograd.Function):
    """Doubles, in a backward that allocates as Megatron's do."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value + torch.zeros(1, device="cuda")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * torch.full((1,), 2.0, device="cuda")


@pytest.mark.parametrize("way", ["tensor", "backward", "grad"])
def test_backward_passes_see_the_mode(way: str) -> None:
    value = torch.ones(1, requires_grad=True)
    with cpu.ranks():
        out = OnCuda.apply(value)  # type: ignore[no-untyped-call]
        if way == "tensor":
            out.backward()
        elif way == "backward":
            torch.autograd.backward([out])
        else:
            (value.grad,) = torch.autograd.grad([out], [value])
    assert value.grad is not None
    assert value.grad.item() == 2.0


def test_megatron_s_random_states_are_the_cpu_s(caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with cpu.ranks(), caplog.at_level(logging.WARNING):
        tracker = CudaRNGStatesTracker()
        torch.manual_seed(1)
        tracker.add("a", 5)
        with tracker.fork("a"):
            first = torch.rand(2)
        outside = torch.rand(2)
        with tracker.fork("a"):
            second = torch.rand(2)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(first, torch.rand(2, generator=generator))
    assert torch.equal(second, torch.rand(2, generator=generator))
    assert torch.equal(outside, torch.rand(2, generator=generator.manual_seed(1)))
    assert not caplog.records


def open_groups(rank: int) -> list[str]:
    with cpu.ranks():
        groups = [
            dist.new_group([0, 1], backend="nccl"),
            dist.new_group([0, 1], None, "nccl"),
            dist.new_subgroups_by_enumeration([[0, 1]], backend="nccl")[0],
        ]
    return [dist.get_backend(group) for group in groups if group is not None]


def test_nccl_means_gloo() -> None:
    assert run_threads(2, open_groups) == [["gloo"] * 3] * 2


def coalesced(rank: int) -> tuple[list[float], list[float]]:
    halves = [torch.empty(1), torch.empty(1)]
    wholes = [torch.empty(2), torch.empty(2)]
    with cpu.ranks():
        with dist.distributed_c10d._coalescing_manager(async_ops=True) as pending:
            for half, whole in zip(halves, ([1.0, 2.0], [3.0, 4.0]), strict=True):
                dist.reduce_scatter_tensor(half, torch.tensor(whole) * (rank + 1), async_op=True)
        pending.wait()
        with dist.distributed_c10d._coalescing_manager():
            for whole_out, half in zip(wholes, halves, strict=True):
                dist.all_gather_into_tensor(whole_out, half)
    return torch.cat(halves).tolist(), torch.cat(wholes).tolist()


def test_the_distributed_optimizer_s_collectives() -> None:
    everything = [3.0, 6.0, 9.0, 12.0]
    assert run_threads(2, coalesced) == [([3.0, 9.0], everything), ([6.0, 12.0], everything)]


def test_the_default_group_too() -> None:
    with cpu.ranks():
        dist.init_process_group(
            "nccl", store=HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0)
        )
        backend = dist.get_backend()
        dist.destroy_process_group()
    assert backend == "gloo"


def test_a_visible_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = originals()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(LayoutError, match="CUDA_VISIBLE_DEVICES"):
        cpu.enable()
    assert all(a is b for a, b in zip(originals(), before, strict=True))

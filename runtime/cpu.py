"""Run unmodified megatron-core on gloo CPU ranks: switched on by an explicit call, and off again.

    from colocc.runtime import cpu
    with cpu.ranks():           # or cpu.enable() ... cpu.disable()
        train()

Megatron names the device literally (``device="cuda"``, ``.cuda()``), asks torch.cuda for streams
and random states, and compares ``Tensor.type()`` with "torch.cuda.FloatTensor". Inside, these mean
the CPU, and backend "nccl" means gloo. ``torch.cuda.is_available()`` stays false. Models need
``use_cpu_initialization=True``, ``gradient_accumulation_fusion=False`` and a core attention that
runs on the CPU (attention.py).

The replacements hold for the process and are counted; the mode that redirects ``device="cuda"``
holds for the thread that enabled it, in its backward passes too. Each thread disables what it
enabled. Threads share torch's CPU random generator, and with it Megatron's random states: dropout
on several ranks wants a process per rank.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from colocc.errors import LayoutError

_CPU = torch.device("cpu")
_lock = threading.Lock()
_users = 0
_replaced: list[tuple[Any, str, Any]] = []
_mine = threading.local()
_rng_log = logging.getLogger("megatron.core.tensor_parallel.random")


class _CudaMeansCpu(TorchFunctionMode):
    """Creates on the CPU, unpinned, what is asked for on cuda, and names CPU tensors as cuda
    ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return re.sub(r"^torch\.(?!cuda\.)", "torch.cuda.", result)
        return result


def _is_cuda(device: Any) -> bool:
    """Whether a device argument asks for a GPU; a bare number does."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _Stream(torch.cpu.Stream):
    """The one stream that a CPU has, under cuda's signature."""

    def __init__(self, device: Any = None, priority: int = 0, **unused: Any) -> None:
        super().__init__(priority)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""


class _Event(torch.cpu.Event):
    """A moment on the clock, under cuda's signature."""

    def __init__(self, *flags: Any, **named_flags: Any) -> None:
        self.moment = 0.0

    def record(self, stream: Any = None) -> None:
        self.moment = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this moment to the end's."""
        return 1e3 * (end.moment - self.moment)


def enable() -> None:
    """Let this thread run megatron-core on CPU ranks; a second call in one thread changes nothing.

    Raises: LayoutError on a machine with GPUs, where CPU ranks would be taken for them.
    """
    global _users
    if getattr(_mine, "mode", None) is not None:
        return
    if torch.cuda.is_available():
        raise LayoutError("torch sees a GPU: run on it, or hide it with CUDA_VISIBLE_DEVICES=''")
    with _lock:
        if _users == 0:
            for owner, name, replacement in _replacements():
                # getattr would bind, and restore something else.
                _replaced.append((owner, name, vars(owner)[name]))
                setattr(owner, name, replacement)
            _rng_log.addFilter(_one_generator)
        _users += 1
    _mine.mode = _CudaMeansCpu()
    _mine.mode.__enter__()


def disable() -> None:
    """Undo this thread's ``enable``; the last thread to do so restores every original.

    Raises: RuntimeError inside another torch function mode that was entered after ``enable``.
    """
    global _users
    mode = getattr(_mine, "mode", None)
    if mode is None:
        return
    if _get_current_function_mode() is not mode:
        raise RuntimeError("leave the torch function modes entered after cpu.enable() first")
    mode.__exit__(None, None, None)
    _mine.mode = None
    with _lock:
        _users -= 1
        if _users == 0:
            _rng_log.removeFilter(_one_generator)
            while _replaced:
                owner, name, original = _replaced.pop()
                setattr(owner, name, original)


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """``enable()`` inside, ``disable()`` after, however the block ends; blocks may nest."""
    outermost = getattr(_mine, "mode", None) is None
    enable()
    try:
        yield
    finally:
        if outermost:
            disable()


def _one_generator(record: logging.LogRecord) -> bool:
    """False for Megatron's warning that the CPU generator moved in a fork of cuda's: it is one."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _answers(value: Any) -> Callable[..., Any]:
    """A function that returns ``value``; a new one each time, since torch._dynamo keys on it."""
    return lambda *args, **kwargs: value


def _seed(seed: int) -> None:
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    torch.default_generator.manual_seed(int(seed))


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, what it is on CPU ranks)."""
    import megatron.core.tensor_parallel.random as megatron_random

    cuda = torch.cuda
    stream = _Stream()
    found: list[tuple[Any, str, Any]] = [
        (cuda, "current_device", _answers(_CPU)),
        (cuda, "current_stream", _answers(stream)),
        (cuda, "default_stream", _answers(stream)),
        (cuda, "stream", torch.cpu.stream),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Event),
        (cuda, "is_current_stream_capturing", _answers(False)),
        (cuda, "manual_seed", _seed),
        (cuda, "manual_seed_all", _seed),
        (cuda, "get_rng_state", _get_state),
        (cuda, "set_rng_state", _set_state),
        (cuda.random, "get_rng_state", _get_state),
        (cuda.random, "set_rng_state", _set_state),
        (megatron_random, "_get_cuda_rng_state", _get_state),
        (megatron_random, "_set_cuda_rng_state", _set_state),
        (dist.ProcessGroup, "reduce_scatter_tensor_coalesced", _reduce_scatter_each),
        (dist.ProcessGroup, "allgather_into_tensor_coalesced", _all_gather_each),
        (torch.autograd, "_engine_run_backward", _in_mode(_engine_run_backward)),
    ]
    found += [(cuda, name, _answers(None)) for name in ("synchronize", "empty_cache", "set_device")]
    found += [(cuda.nvtx, name, _answers(None)) for name in ("range_push", "range_pop")]
    found += [(cuda, name, _answers(0)) for name in ("memory_allocated", "max_memory_allocated")]
    found += [
        (dist, name, _on_gloo(getattr(dist, name)))
        for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration")
    ]
    return found


class _Works:
    """Several pending collectives, awaited as one."""

    def __init__(self, works: list[Any]) -> None:
        self.works = works

    def wait(self) -> bool:
        done = [bool(work.wait()) for work in self.works]
        return all(done)


# The distributed optimizer's collectives, which gloo lacks under TORCH_DISTRIBUTED_DEBUG=DETAIL.
def _reduce_scatter_each(
    group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], options: Any = None
) -> _Works:
    options = options or ReduceScatterOptions()
    pairs = zip(outputs, inputs, strict=True)
    return _Works([group._reduce_scatter_base(out, given, options) for out, given in pairs])


def _all_gather_each(
    group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], options: Any = None
) -> _Works:
    options = options or AllgatherOptions()
    pairs = zip(outputs, inputs, strict=True)
    return _Works([group._allgather_base(out, given, options) for out, given in pairs])


def _in_mode(engine: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd engine with the thread's mode on: torch lifts a mode while it handles a call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        mode = getattr(_mine, "mode", None)
        with contextlib.nullcontext() if mode is None else mode:
            return engine(*args, **kwargs)

    return run


def _on_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    def is_nccl(value: Any) -> bool:
        return isinstance(value, str) and "nccl" in value

    @functools.wraps(original)
    def opened(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if is_nccl(value) else value for value in args)
        if is_nccl(kwargs.get("backend")):
            kwargs["backend"] = "gloo"
        if _is_cuda(kwargs.get("device_id")):
            del kwargs["device_id"]
        return original(*args, **kwargs)

    return opened

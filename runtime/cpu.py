"""Run unmodified megatron-core on gloo CPU ranks: switched on by an explicit call, and off again.

    from colocc.runtime import cpu
    with cpu.ranks():           # or cpu.enable() ... cpu.disable()
        train()

Megatron names the device literally (``device="cuda"``, ``.cuda()``), asks torch.cuda for streams and
random states, and compares ``Tensor.type()`` with "torch.cuda.FloatTensor". Inside, these mean the CPU.
``torch.cuda.is_available()`` stays false. Models need ``use_cpu_initialization=True``,
``gradient_accumulation_fusion=False`` and a core attention that runs on the CPU (attention.py).

The replacements in torch.cuda hold for the process and are counted; the mode that redirects
``device="cuda"`` holds for the thread that enabled it. Threads share torch's CPU random generator.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from colocc.errors import LayoutError

_CPU = torch.device("cpu")
_lock = threading.Lock()
_users = 0
_replaced: list[tuple[Any, str, Any]] = []
_mine = threading.local()


class _CudaMeansCpu(TorchFunctionMode):
    """Creates on the CPU what is asked for on cuda, and names CPU tensors as cuda ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


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
                _replaced.append((owner, name, getattr(owner, name)))
                setattr(owner, name, replacement)
        _users += 1
    _mine.mode = _CudaMeansCpu()
    _mine.mode.__enter__()


def disable() -> None:
    """Undo this thread's ``enable``; the last thread to do so restores torch.cuda."""
    global _users
    mode = getattr(_mine, "mode", None)
    if mode is None:
        return
    mode.__exit__(None, None, None)
    _mine.mode = None
    with _lock:
        _users -= 1
        if _users == 0:
            while _replaced:
                owner, name, original = _replaced.pop()
                setattr(owner, name, original)


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """``enable()`` inside, ``disable()`` after, however the block ends."""
    enable()
    try:
        yield
    finally:
        disable()


def _answers(value: Any) -> Callable[..., Any]:
    """A function that returns ``value``; a new one each time, as torch._dynamo wants one per name."""
    return lambda *args, **kwargs: value


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, what it is on CPU ranks)."""
    import megatron.core.tensor_parallel.random as megatron_random

    cuda = torch.cuda
    found: list[tuple[Any, str, Any]] = [
        (cuda, "current_device", lambda: _CPU),
        (cuda, "current_stream", torch.cpu.current_stream),
        (cuda, "default_stream", torch.cpu.current_stream),
        (cuda, "stream", torch.cpu.stream),
        (cuda, "Stream", torch.cpu.Stream),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "manual_seed", torch.manual_seed),
        (cuda, "manual_seed_all", torch.manual_seed),
        (cuda.random, "get_rng_state", lambda *a, **k: torch.get_rng_state()),
        (cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state()),
        (cuda, "set_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),
        (megatron_random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),
    ]
    found += [(cuda, name, _answers(None)) for name in ("synchronize", "empty_cache", "set_device")]
    found += [(cuda.nvtx, name, _answers(None)) for name in ("range_push", "range_pop")]
    found += [(cuda, name, _answers(0)) for name in ("memory_allocated", "max_memory_allocated")]
    found += [
        (dist, name, _on_gloo(getattr(dist, name)))
        for name in ("new_group", "new_subgroups_by_enumeration")
    ]
    return found


def _on_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    def opened(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return original(*args, **kwargs)

    return opened

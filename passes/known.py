"""Integers that are known while the rest is fake: what a module computes from an example's ints.

Vision towers that take images of any size read their grids as numbers and loop over them. Their
integer inputs are small, and known from the example; so is all that is computed from them alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

MOST = 1 << 16
"""Values with more elements than this are not kept."""


class KnownIntegers(TorchDispatchMode):
    """Computes an operation for real where all its tensors are known, besides on fake tensors."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self._real: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """``fake`` stands for ``real`` from now on."""
        if real.numel() <= MOST:
            self._real[id(fake)] = (fake, real)
        return fake

    def _known(self, value: torch.Tensor) -> torch.Tensor | None:
        if id(value) in self._real:
            return self._real[id(value)][1]
        # A constant of the module's code; parameters and buffers of floats are as good as unknown.
        plain = not isinstance(value, FakeTensor) and not value.is_floating_point()
        return value if plain and value.device.type != "meta" else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [self._known(tensor) for tensor in tensors]
        random = torch.Tag.nondeterministic_seeded in func.tags
        large = not tensors and not _is_small(args)
        if random or large or any(real is None for real in known):
            if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
                self._real.pop(id(args[0]), None)
            return func(*args, **kwargs)
        return self._both(func, args, kwargs)

    def _both(self, func: Any, args: Any, kwargs: Any) -> Any:
        def real_of(value: Any) -> Any:
            return self._known(value) if isinstance(value, torch.Tensor) else value

        real_args, real_kwargs = pytree.tree_map(real_of, (args, kwargs))
        with _disable_current_modes():
            real = func(*real_args, **real_kwargs)
        if func._schema.is_mutable:
            return func(*args, **kwargs)

        def stand_in(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            with self.mode:
                fake = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
            return self.keep(fake, value)

        return pytree.tree_map(stand_in, real)


def _is_small(args: Any) -> bool:
    """Whether what a factory makes is small: the product of the numbers it is given."""
    size = 1
    for length in pytree.tree_leaves(args):
        if isinstance(length, int) and not isinstance(length, bool):
            size *= max(1, abs(length))
    return size <= MOST

"""The shapes that an opaque call makes, found by running it on fake tensors at several sizes.

A module of the layouts may do anything inside, so it runs on plain numbers: once at the example's
sizes, once with twice the samples, and once for each other size that its arguments have, doubled.
What doubles with a size is proportional to it, what stays does not depend on it, and a size at
which the module fails, or which changes shapes in another way, is fixed to the example's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from colocc.passes.known import KnownIntegers
from colocc.passes.sizes import Sizes, evaluated
from colocc.passes.structure import children, rebuilt, tensors_in

Values = dict[sympy.Symbol, int]


@dataclass
class Probe:
    """What a call returns at the example's sizes, with symbolic shapes instead of its tensors'."""

    value: Any
    shapes: list[tuple[sympy.Expr, ...]] = field(default_factory=list)
    fixed: list[sympy.Symbol] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)


def probe(
    sizes: Sizes,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    known: Callable[[torch.Tensor], torch.Tensor | None],
) -> Probe:
    """Run ``call`` at several sizes.

    ``known`` gives the example's own tensor where an argument is an integer input: a module may
    look at its values.
    """

    def at(values: Values) -> list[torch.Tensor]:
        return list(tensors_in(_run(sizes, call, args, kwargs, values, known)))

    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    whole = _run(sizes, call, args, kwargs, sizes.hints, known, made)
    found = Probe(whole)
    base = list(tensors_in(whole))
    given = {_memory(fake): argument for argument, fake in made.values()}
    found.memory = [given.get(_memory(tensor), _memory(tensor)) for tensor in base]
    doubled = at(sizes.hints | {sizes.batch: 2 * sizes.hints[sizes.batch]})
    grown: dict[sympy.Symbol, list[torch.Tensor]] = {}
    for symbol in _symbols(sizes, (args, kwargs)):
        try:
            with _quiet():
                grown[symbol] = at(sizes.hints | {symbol: 2 * sizes.hints[symbol]})
        except Exception:  # noqa: BLE001 - whatever the module says of another size: it is fixed
            found.fixed.append(symbol)
    for index, tensor in enumerate(base):
        shape = []
        for dim, length in enumerate(tensor.shape):
            factors = {s: made[index].shape[dim] for s, made in grown.items()}
            expr = _fit(sizes, int(length), doubled[index].shape[dim], factors, found.fixed)
            shape.append(expr)
        found.shapes.append(tuple(shape))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch does not log operations that fail on fake tensors: that is what is tried."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fit(
    sizes: Sizes,
    length: int,
    doubled: int,
    grown: dict[sympy.Symbol, int],
    fixed: list[sympy.Symbol],
) -> sympy.Expr:
    """``length`` as an expression: proportional to the batch if it doubles with it, to a size if it
    doubles with that, linear in the one other size that changes it."""
    count = sizes.hints[sizes.batch]
    expr: sympy.Expr = sympy.Integer(length)
    if doubled != length:
        steps = sympy.Rational(doubled - length, count)
        expr = sympy.Integer(length) + steps * (sizes.batch - count)
    moved = {symbol: made for symbol, made in grown.items() if made != length}
    for symbol, made in moved.items():
        hint = sizes.hints[symbol]
        if made == 2 * length:
            share = sympy.Rational(1, hint) * symbol
            expr = expr * share
        elif len(moved) == 1 and doubled == length and (made - length) % hint == 0:
            expr = expr + (made - length) // hint * (symbol - hint)
        elif symbol not in fixed:
            fixed.append(symbol)
    return sympy.expand(expr)


def _symbols(sizes: Sizes, arguments: Any) -> list[sympy.Symbol]:
    found: dict[sympy.Symbol, None] = {}
    for tensor in tensors_in(arguments):
        for length in tensor.shape:
            for symbol in sorted(sizes.expr(length).free_symbols, key=str):
                if symbol != sizes.batch and symbol in sizes.hints:
                    found[symbol] = None
    return list(found)


def _run(
    sizes: Sizes,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    values: Values,
    known: Callable[[torch.Tensor], torch.Tensor | None],
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Any:
    """What ``call`` returns; ``made`` gets each argument and the tensor in its place, by id."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    integers = KnownIntegers(mode)
    made = {} if made is None else made

    def number(value: Any) -> Any:
        return evaluated(sizes.expr(value), values)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made:
            shape = [number(length) for length in tensor.shape]
            new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            real = _resized(known(tensor), shape)
            made[id(tensor)] = tensor, new if real is None else integers.keep(new, real)
        return made[id(tensor)][1]

    def concrete(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return fake(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return number(value)
        if isinstance(value, slice):
            return slice(concrete(value.start), concrete(value.stop), concrete(value.step))
        return value if children(value) is None else rebuilt(value, concrete)

    with mode, torch.no_grad():
        args, kwargs = concrete(args), concrete(kwargs)
        with integers:
            return call(*args, **kwargs)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _resized(real: torch.Tensor | None, shape: list[int]) -> torch.Tensor | None:
    """``real`` repeated to ``shape``, where only the number of samples differs."""
    if real is None or real.device.type == "meta" or real.dim() != len(shape):
        return None
    times = [
        new // old if old and new % old == 0 else 0
        for new, old in zip(shape, real.shape, strict=True)
    ]
    with _disable_current_modes():
        return real.repeat(times) if all(times) else None

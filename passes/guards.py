"""What a recorded graph takes for granted, and whether a batch keeps to it.

A branch on sizes, a constant of the example and a size that a module is known for become guards.
They are checked on the batch as a whole, which is the same on every rank, before anything is
computed; so a guard that fails is one error on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import sympy
import torch
from torch import fx

from colocc.passes.shapes import lookup
from colocc.passes.sizes import Origin, evaluated
from colocc.passes.structure import is_constant, same_constant

REMEDY = "Compile again with such a batch as example_inputs, or give batches like the example's."


@dataclass(frozen=True)
class SizeGuard:
    """``condition`` on sizes: the branch that the example took at ``line``."""

    condition: sympy.Basic
    text: str
    line: str


@dataclass(frozen=True)
class ValueGuard:
    """An input that is no tensor, or the dtype of one that is."""

    path: tuple[str, ...]
    what: str
    value: Any

    @property
    def text(self) -> str:
        name = ".".join(self.path)
        return (
            f"{name}.dtype is {self.value}" if self.what == "dtype" else f"{name} is {self.value!r}"
        )


@dataclass(frozen=True)
class LengthGuard:
    """The lengths of an input that the recording took for granted, by dim: a number, which stayed
    one (0 or 1), or the symbol of an equal length of another input. Others are None."""

    path: tuple[str, ...]
    lengths: tuple[sympy.Expr | None, ...]


@dataclass(frozen=True)
class ModeGuard:
    """``training`` of a module that the forward looked at; "" is the model itself."""

    module: str
    training: bool
    line: str

    @property
    def text(self) -> str:
        return f"{self.module or 'model'}.training is {self.training}"


@dataclass(frozen=True)
class ScatterGuard:
    """The scatter ``name`` writes as many rows of each sample as its mask has places for them.

    ``mask`` is made of inputs. One true element of it stands for ``per_place`` elements, and a
    sample has ``per_sample`` of them.
    """

    mask: fx.Node
    per_place: sympy.Expr
    per_sample: sympy.Expr
    name: str
    line: str

    @property
    def rows(self) -> sympy.Expr:
        """How many true places each sample must have."""
        return sympy.cancel(self.per_sample / self.per_place)


@dataclass
class Guards:
    """All guards of one graph. ``origins`` says where each size stands in a batch, ``hints`` what
    it is in the example; ``items`` are the numbers of items, by the name of their module."""

    batch: sympy.Symbol
    origins: Mapping[sympy.Symbol, Origin]
    hints: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    items: Mapping[str, sympy.Symbol] = field(default_factory=dict)
    sizes: list[SizeGuard] = field(default_factory=list)
    values: list[ValueGuard] = field(default_factory=list)
    lengths: list[LengthGuard] = field(default_factory=list)
    modes: list[ModeGuard] = field(default_factory=list)
    scatters: list[ScatterGuard] = field(default_factory=list)

    def lines(self) -> list[tuple[str, str]]:
        """(what must hold, the user's line) of every guard, for the dump."""
        found = [(guard.text, guard.line) for guard in self.sizes]
        found += [
            (guard.text, "as in the example") for guard in self.values if guard.what != "dtype"
        ]
        found += [(guard.text, guard.line) for guard in self.modes]
        found += [
            (f"{guard.mask.name} is true {self.shown(guard.rows)} times in each sample", guard.line)
            for guard in self.scatters
        ]
        return found

    def shown(self, expr: sympy.Basic) -> str:
        """``expr`` with the names that a user knows."""
        names = {symbol: sympy.Symbol(self.name_of(symbol)) for symbol in expr.free_symbols}
        return str(expr.xreplace(names))

    def name_of(self, symbol: sympy.Symbol) -> str:
        """What a user calls a size."""
        origin = self.origins[symbol]
        name = f"{'.'.join(origin.path)}.shape[{origin.dim}]"
        return "samples" if symbol == self.batch else name + " per sample" * origin.per_sample

    def failed(self, batch: Mapping[str, Any], total: int, counts: Iterable[int]) -> str | None:
        """What to tell the user of the first guard that ``batch`` breaks; None if it keeps all.

        ``total`` is the samples of ``batch``, ``counts`` how many of them a rank of each layout
        reads.
        """
        for guard in self.values:
            value = lookup(batch, guard.path)
            if guard.what == "dtype" and isinstance(value, torch.Tensor):
                value = str(value.dtype).removeprefix("torch.")
            elif guard.what == "dtype":
                continue
            if not is_constant(value) or not same_constant(value, guard.value):
                return (
                    f"this batch has {'.'.join(guard.path)} {value!r}, and the graph holds where "
                    f"{guard.text}. {REMEDY}"
                )
        known = self.known(batch, total)
        for lengths in self.lengths:
            problem = self._other_lengths(lengths, lookup(batch, lengths.path), known)
            if problem is not None:
                return f"this batch has {problem}. {REMEDY}"
        for size, count in product(self.sizes, counts):
            here = known | {self.batch: count}
            symbols = size.condition.free_symbols
            if symbols <= set(here) and not evaluated(size.condition, here):
                values = [f"{self.name_of(s)} = {here[s]}" for s in sorted(symbols, key=str)]
                return (
                    f"this batch has {', '.join(values)}, and the graph holds where {size.text} "
                    f"({size.line}). {REMEDY}"
                )
        return None

    def _other_lengths(
        self, guard: LengthGuard, value: Any, known: Mapping[sympy.Symbol, int]
    ) -> str | None:
        """What an input has, and what it has in the graph, if these are not alike."""
        name = ".".join(guard.path)
        if not isinstance(value, torch.Tensor):
            return None
        if value.dim() != len(guard.lengths):
            dims = len(guard.lengths)
            return f"{name} with {value.dim()} dims, and the graph holds where it has {dims}"
        for dim, (length, wanted) in enumerate(zip(value.shape, guard.lengths, strict=True)):
            if wanted is None or not wanted.free_symbols <= set(known):
                continue
            if length != (number := evaluated(wanted, known)):
                shown = self.shown(wanted)
                equals = f"{shown} = {number}" if wanted.free_symbols else shown
                return (
                    f"{name}.shape[{dim}] = {length}, and the graph holds where that is {equals}, "
                    "as in the example"
                )
        return None

    def known(self, batch: Mapping[str, Any], samples: int) -> dict[sympy.Symbol, int]:
        """The sizes that ``batch`` has."""
        known = {self.batch: samples}
        for symbol, origin in self.origins.items():
            value = lookup(batch, origin.path)
            if (
                symbol != self.batch
                and isinstance(value, torch.Tensor)
                and value.dim() > origin.dim
            ):
                length = value.shape[origin.dim]
                known[symbol] = length // samples if origin.per_sample else length
        return known

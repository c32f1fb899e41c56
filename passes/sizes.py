"""Sizes while a forward is recorded: the batch and every other length of an input is a symbol.

Arithmetic on sizes stays symbolic, so a number that the forward passes on is computed anew for the
batch at hand: for the samples that a rank holds, on the layout where it is read. A branch takes the
example's side, which is told to ``on_branch``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakMethod

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from colocc.types import Dim

OnBranch = Callable[[sympy.Basic, Any], None]


class _Environment(ShapeEnv):
    """torch's shape environment, which says what it was asked to decide."""

    def __init__(self, on_branch: OnBranch) -> None:
        super().__init__(specialize_zero_one=False, duck_shape=False)
        # torch's cache of fake tensors keeps environments for good: not the recorder, too, with its
        # model and the groups of that.
        bound = isinstance(on_branch, MethodType)
        self._on_branch = WeakMethod(on_branch) if bound else lambda: on_branch

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> Any:
        answer = super().evaluate_expr(orig_expr, *args, **kwargs)
        on_branch = self._on_branch()
        if on_branch is not None:
            on_branch(orig_expr, answer)
        return answer


@dataclass(frozen=True)
class Origin:
    """Where a symbol's value stands: dim ``dim`` of the input at ``path``, in ``per`` parts each of
    which is one sample's if ``per_sample``."""

    path: tuple[str, ...]
    dim: int
    per_sample: bool = False


class Sizes:
    """The symbols of one recording, and what the example says of them."""

    def __init__(self, batch_size: int, on_branch: OnBranch) -> None:
        self.environment = _Environment(on_branch)
        self.hints: dict[sympy.Symbol, int] = {}
        self.names: dict[sympy.Symbol, str] = {}
        self.origins: dict[sympy.Symbol, Origin] = {}
        self.items: dict[str, sympy.Symbol] = {}
        self._items: dict[str, Any] = {}
        self._shared: dict[int, Any] = {}
        self._fixed: dict[sympy.Symbol, sympy.Integer] = {}
        self.samples = self._symbol("samples", batch_size)
        self.batch: sympy.Symbol = self.samples.node.expr

    def _symbol(self, name: str, hint: int) -> Any:
        made = self.environment.create_symbol(
            hint,
            ConstantSource(name),
            dynamic_dim=DimDynamic.DYNAMIC,
            do_not_specialize_zero_one=True,
        )
        self.hints[made], self.names[made] = hint, name
        return self.environment.create_symintnode(made, hint=hint)

    def shape(
        self,
        path: tuple[str, ...],
        value: torch.Tensor,
        batch_dim: int | None,
        *,
        rows: bool,
        start: int = 0,
    ) -> list[Any]:
        """The symbolic shape of an input; lengths of 0 and 1 stay numbers.

        Lengths that are equal share a symbol among inputs by token: integers, and floats of at most
        two dims (a loss mask). ``rows`` is whether the batch dim holds several rows of each sample.
        ``value`` has its dims from ``start`` on.
        """
        by_token = not rows and (not value.is_floating_point() or value.dim() <= 2)
        dims: list[Any] = []
        for index, length in enumerate(value.shape, start):
            if index == batch_dim and rows:
                count = length // self.hints[self.batch]
                dims.append(self.samples * self._length(Origin(path, index, True), count))
            elif index == batch_dim:
                dims.append(self.samples)
                self.origins.setdefault(self.batch, Origin(path, index))
            elif length < 2:
                dims.append(length)
            else:
                dims.append(self._length(Origin(path, index), length, shared=by_token))
        return dims

    def shape_of_items(
        self, path: tuple[str, ...], value: torch.Tensor, module: str, count: int
    ) -> list[Any]:
        """The symbolic shape of an input that holds ``count`` items of ``module`` in dim 0."""
        if module not in self._items:
            self._items[module] = self._symbol(f"items of {module}", count)
            self.items[module] = self._items[module].node.expr
        if value.dim() == 0:
            return []
        number, each = self._items[module], value.shape[0] // count
        if each == 1 or self.items[module] not in self.origins:
            self.origins[self.items[module]] = Origin(path, 0)
        rest = self.shape(path, value[0], None, rows=True, start=1)
        return [number if each == 1 else number * each, *rest]

    def growing(self, expr: sympy.Basic) -> list[sympy.Symbol]:
        """The numbers of samples and of items in ``expr``."""
        counts = {self.batch, *self.items.values()}
        return sorted(expr.free_symbols & counts, key=str)

    def items_in(self, shape: Any) -> str | None:
        """The module whose items a tensor of this shape holds."""
        found = {s for length in shape for s in self.growing(self.expr(length))}
        return next((name for name, symbol in self.items.items() if symbol in found), None)

    def _length(self, origin: Origin, length: int, *, shared: bool = False) -> Any:
        if shared and length in self._shared:
            return self._shared[length]
        name = f"{'.'.join(origin.path)}.shape[{origin.dim}]" + " per sample" * origin.per_sample
        made = self._symbol(name, length)
        self.origins[made.node.expr] = origin
        if shared:
            self._shared[length] = made
        return made

    def expr(self, value: Any) -> sympy.Expr:
        """``value``, an int or a symbolic int, as an expression in the symbols."""
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.environment.simplify(value.node.expr).xreplace(self._fixed)
        return sympy.Float(value) if isinstance(value, float) else sympy.Integer(value)

    def at(self, value: Any, **changed: int) -> int:
        """``value`` at the example's sizes; ``changed`` maps names of symbols to others."""
        known = self.hints | {s: changed[n] for s, n in self.names.items() if n in changed}
        return int(evaluated(self.expr(value), known))

    def symbolic(self, expr: sympy.Expr) -> Any:
        """``expr`` as a symbolic int."""
        if expr.is_Integer:
            return int(expr)
        hint = int(evaluated(expr, self.hints))
        return self.environment.create_symintnode(expr, hint=hint)

    def twice(self) -> tuple[int, int]:
        """The example's number of samples, and twice that."""
        return self.hints[self.batch], 2 * self.hints[self.batch]

    def per_sample(self, shape: Any) -> list[sympy.Symbol]:
        """The numbers of rows per sample that a shape depends on."""
        found = {s for length in shape for s in self.expr(length).free_symbols}
        return [
            s for s in sorted(found, key=str) if s in self.origins and self.origins[s].per_sample
        ]

    def fix(self, symbol: sympy.Symbol) -> None:
        """From now on ``symbol`` is the example's number."""
        self._fixed[symbol] = sympy.Integer(self.hints[symbol])

    def specialised(self) -> sympy.Symbol | None:
        """The number of samples, or of items, that something fixed to the example's."""
        fixed = self.environment.replacements
        return next((s for s in (self.batch, *self.items.values()) if s in fixed), None)

    def shown(self, expr: sympy.Basic) -> str:
        """``expr`` with the names that a user knows."""
        return str(expr.xreplace({s: sympy.Symbol(n) for s, n in self.names.items()}))


def evaluated(expr: sympy.Basic, values: Mapping[sympy.Symbol, int]) -> Any:
    """``expr`` as a plain number or truth value."""
    return sympy_interp(PythonReferenceAnalysis, dict(values), expr)


def dims_of(sizes: Sizes, shape: Any) -> tuple[tuple[Dim, ...], int | None] | None:
    """The dims of a global shape, and which one holds the samples, or items; None if that is not
    one dim that grows with them."""
    dims: list[Dim] = []
    found: int | None = None
    for index, length in enumerate(shape):
        expr = sizes.expr(length)
        if not expr.free_symbols <= set(sizes.hints):
            dims.append(Dim(1, 0))  # as many as the data says
            continue
        growing = sizes.growing(expr)
        if not growing:
            dims.append(Dim(1, int(evaluated(expr, sizes.hints))))
            continue
        rows = sympy.cancel(expr / growing[0])
        if found is not None or sizes.growing(rows):
            return None
        found = index
        dims.append(Dim(sizes.hints[growing[0]], int(evaluated(rows, sizes.hints)), ("dp",)))
    return tuple(dims), found


class Number:
    """A size computed from inputs: the target of a node whose arguments are those inputs."""

    def __init__(
        self,
        text: str,
        expr: sympy.Expr,
        origins: Mapping[sympy.Symbol, tuple[int, Origin]],
        batch: sympy.Symbol,
    ) -> None:
        self.__name__ = "size"
        self.text, self.expr, self.origins, self.batch = text, expr, dict(origins), batch

    def __call__(self, *inputs: Any) -> Any:
        values: dict[sympy.Symbol, int] = {}
        # The batch comes first: lengths per sample are parts of it.
        for symbol, (place, origin) in sorted(
            self.origins.items(), key=lambda i: i[0] != self.batch
        ):
            length = inputs[place].shape[origin.dim]
            values[symbol] = length // values[self.batch] if origin.per_sample else length
        return evaluated(self.expr, values)

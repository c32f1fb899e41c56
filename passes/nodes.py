"""The nodes of a graph in the making, and which of them makes each value that the forward holds."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx, nn

from colocc.errors import CaptureError
from colocc.passes.graph import COMPUTING
from colocc.passes.parts import Pieces
from colocc.passes.sizes import Number, Origin, Sizes, dims_of
from colocc.passes.source import line_here
from colocc.passes.structure import Rebuilt, Slot, Step, children, is_plain, rebuilt, tensors_in

LEAF_REMEDY = (
    "Move that code into a function marked @colocc.leaf (it must treat every sample on its own), "
    "or into a module that the layouts name."
)
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.memory_format)


class Here:
    """The device of the program, in place of the example's."""

    def __repr__(self) -> str:
        return "device"


HERE = Here()


class Nodes:
    """A graph that grows, with the node behind every tensor and object that has been seen.

    What runs ``inside`` belongs to one node and makes none of its own.
    """

    def __init__(self, model: nn.Module, sizes: Sizes, device: torch.device) -> None:
        self.model, self.sizes, self.device = model, sizes, device
        self.graph = fx.Graph()
        self.pieces = Pieces()
        self.depth = 0
        # By id: the value, the node that makes it or holds it, and the step into that node's value.
        self._known: dict[int, tuple[Any, fx.Node, tuple[Step, ...]]] = {}
        self._stale: dict[int, str] = {}
        # By the storage of a tensor that a module made: that of the tensor whose memory it has.
        self._memory: dict[int, int] = {}
        self._numbers: dict[str, fx.Node] = {}
        self._inputs: dict[tuple[str, ...], fx.Node] = {}
        self._examples: dict[int, torch.Tensor] = {}
        self.held = _tensors_of(model)
        self._autocast = _autocast(device)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What runs here is part of one node."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def node(
        self, op: str, target: Any, args: Any, kwargs: Any, value: Any, name: str | None = None
    ) -> fx.Node:
        """Make a node and remember what it makes."""
        if op != "placeholder" and _autocast(self.device) != self._autocast:
            raise self.refused(
                "it changes torch.autocast, which the graph would lose. Put the context around "
                "program(**batch), or into the forward of a module of the layouts"
            )
        made = self.graph.create_node(op, target, args, kwargs, name)
        made.meta.update(line=line_here(), value=value)
        if op in COMPUTING and not torch.is_grad_enabled():
            made.meta["no_grad"] = True
        self._check_grows(made, value)
        self.know(value, made)
        if op == "placeholder":
            self._known[id(value)] = (value, made, ())
        return made

    def _check_grows(self, node: fx.Node, value: Any) -> None:
        """Raise CaptureError unless at most one dim of a tensor holds samples."""
        for tensor in tensors_in(value):
            with self.inside():
                if dims_of(self.sizes, tensor.shape) is not None:
                    continue
                for symbol in self.sizes.per_sample(tensor.shape):
                    self.fix(symbol, node.name)
                if dims_of(self.sizes, tensor.shape) is not None:
                    continue
                counts = self.sizes.twice()
                items = self.sizes.items_in(tensor.shape)
                if items is not None:
                    raise self.refused(
                        f"a result holds items of {items} in two dims, or beside samples: "
                        f"{[self.sizes.shown(self.sizes.expr(n)) for n in tensor.shape]}"
                    )
                small, large = ([self.sizes.at(n, samples=m) for n in tensor.shape] for m in counts)
            raise CaptureError(
                f"{node.meta['line'] or node.name}: the result is {small} for {counts[0]} samples "
                f"and {large} for {counts[1]}; one dim must grow with the samples. Keep samples "
                "apart, or move the code into a module that the layouts name."
            )

    def fix(self, symbol: sympy.Symbol, name: str) -> None:
        """``name`` is known for the example's value of ``symbol`` only."""
        raise NotImplementedError(f"{name} fixes {symbol}: a recorder makes that a guard")

    def know(self, value: Any, node: fx.Node, steps: tuple[Step, ...] = ()) -> None:
        """Every tensor and every object in ``value`` is read from ``node`` from now on. Containers
        are not: the forward may change them."""
        parts = children(value)
        if parts is None and not isinstance(value, (*CONSTANTS, torch.device, *SYMBOLIC)):
            self._known[id(value)] = (value, node, steps)
            self._stale.pop(id(value), None)
        for step, part in parts or []:
            self.know(part, node, (*steps, step))

    def placeholder(self, path: tuple[str, ...], value: Any, example: Any) -> None:
        node = self.node("placeholder", "_".join(path), (), {}, value)
        node.meta["path"] = path
        self._inputs[path] = node
        if isinstance(example, torch.Tensor) and not example.is_floating_point():
            self._examples[id(value)] = example

    def example_of(self, value: torch.Tensor) -> torch.Tensor | None:
        """The example's own tensor, if ``value`` is an integer input."""
        return self._examples.get(id(value))

    def operand(self, value: Any) -> Any:
        """``value`` as an argument of a node. Raises CaptureError for what no node has made."""
        if isinstance(value, CONSTANTS):
            return value
        if isinstance(value, torch.device):
            return HERE if value.type == self.device.type else value
        if isinstance(value, SYMBOLIC):
            return self._number(value)
        if id(value) in self._known:
            return self._read(value)
        if isinstance(value, slice):
            return slice(*(self.operand(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.Tensor):
            return self._held_tensor(value)
        if children(value) is not None:
            return self._container(value)
        if any(isinstance(part, torch.Tensor) for part in getattr(value, "__dict__", {}).values()):
            raise self.refused(
                f"a {type(value).__name__} that holds tensors passes between modules"
            )
        return value

    def _read(self, value: Any) -> fx.Node:
        if id(value) in self._stale:
            raise self.refused(
                f"a tensor is read that shares memory with one that was changed in place at "
                f"{self._stale[id(value)]}"
            )
        _, node, steps = self._known[id(value)]
        if node.meta.get("required"):
            raise self.refused(f"it reads {node.name}, which example_inputs lacks")
        for step in steps:
            kind, key = step
            target = operator.getitem if kind == "item" else getattr
            node = self._step(node, target, key)
        if steps:
            node.meta["value"] = value
            self._known[id(value)] = (value, node, ())
        return node

    def _step(self, node: fx.Node, target: Any, key: Any) -> fx.Node:
        for user in node.users:
            if user.target is target and user.args == (node, key):
                return user
        made = self.graph.create_node("call_function", target, (node, key), {})
        made.meta.update(line=line_here(), value=None)
        return made

    def _held_tensor(self, value: torch.Tensor) -> fx.Node:
        piece = self.pieces.of(value)
        if piece is not None:
            raise self.refused(
                f"it takes out one of the {piece.count} parts of a value that holds all samples, "
                "and each rank sees only some of them"
            )
        path = self.held.get(id(value))
        if path is None:
            raise self.refused("a tensor is read that is no input, parameter or buffer")
        node = self.node("get_attr", path, (), {}, None)
        node.meta["value"] = value
        self._known[id(value)] = (value, node, ())
        return node

    def _container(self, value: Any) -> Any:
        piece = self.pieces.whole_of(value)
        if piece is not None:
            whole = self.operand(piece.whole)
            made = self.node("call_method", "unbind", (whole, piece.dim), {}, None)
            made.meta["apart"] = True
            return made
        if is_plain(value):
            return rebuilt(value, self.operand)
        operands: list[Any] = []

        def slot(part: Any) -> Any:
            if (
                children(part) is not None
                and id(part) not in self._known
                and self.pieces.whole_of(part) is None
            ):
                return rebuilt(part, slot)
            found = self.operand(part)
            if not isinstance(found, fx.Node):
                return found
            operands.append(found)
            return Slot(len(operands) - 1)

        template = rebuilt(value, slot)
        return self.node("call_function", Rebuilt(template), tuple(operands), {}, value)

    def _number(self, value: Any) -> Any:
        expr = self.sizes.expr(value)
        if not expr.free_symbols:
            return _plain(expr)
        if str(expr) in self._numbers:
            return self._numbers[str(expr)]
        symbols = sorted(expr.free_symbols, key=str)
        if not set(symbols) <= set(self.sizes.origins):
            raise self.refused("a size depends on data")
        origins: dict[Any, tuple[int, Origin]] = {}
        inputs: list[fx.Node] = []
        if any(self.sizes.origins[s].per_sample for s in symbols):
            symbols.append(self.sizes.batch)
        for symbol in dict.fromkeys(symbols):
            origin = self.sizes.origins[symbol]
            node = self._inputs[origin.path]
            if node not in inputs:
                inputs.append(node)
            origins[symbol] = (inputs.index(node), origin)
        target = Number(self.sizes.shown(expr), expr, origins, self.sizes.batch)
        made = self.graph.create_node("call_function", target, tuple(inputs), {}, "size")
        made.meta.update(line=line_here(), value=None)
        self._numbers[str(expr)] = made
        return made

    def share(self, tensors: Iterable[torch.Tensor], memory: Iterable[Any]) -> None:
        """Tensors with the same entry of ``memory``, or with a tensor there, share what they are
        changed in."""
        first: dict[Any, torch.Tensor] = {}
        for tensor, key in zip(tensors, memory, strict=True):
            other = key if isinstance(key, torch.Tensor) else first.setdefault(key, tensor)
            self._memory[self._memory_of(tensor)] = self._memory_of(other)

    def _memory_of(self, tensor: torch.Tensor) -> int:
        with self.inside():
            storage = int(tensor.untyped_storage()._cdata)
        return self._memory.get(storage, storage)

    def outdate(self, subject: torch.Tensor) -> None:
        """What shares memory with ``subject``, which was changed, must not be read any more."""
        memory = self._memory_of(subject)
        for key, (value, _, _) in self._known.items():
            shares = isinstance(value, torch.Tensor) and value is not subject
            if shares and self._memory_of(value) == memory:
                self._stale[key] = line_here()

    def refused(self, problem: str, where: str | None = None) -> CaptureError:
        """The error for code that cannot be traced, at the line that runs now or ``where``."""
        return CaptureError(
            f"{type(self.model).__name__}.forward cannot be traced: {problem}.\n"
            f"  {where or f'at {line_here()}'}\n  {LEAF_REMEDY}"
        )


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _plain(expr: sympy.Basic) -> Any:
    """An expression without symbols as a plain number."""
    if expr in (sympy.true, sympy.false):
        return bool(expr)
    return int(expr) if expr.is_Integer else float(expr)


def _tensors_of(model: nn.Module) -> dict[int, str]:
    """The path of every parameter, buffer and plain tensor attribute."""
    held: dict[int, str] = {}
    for path, module in model.named_modules():
        named = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in named.items():
            if isinstance(value, torch.Tensor):
                held.setdefault(id(value), f"{path}.{name}" if path else name)
    return held

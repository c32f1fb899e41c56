"""Record a forward by running it on the fake tensors of an example.

The user's code runs as it is, on tensors without data: ``isinstance``, dataclasses, decorators and
reads of shape, dtype and device all behave. Every torch function that makes a tensor becomes a
node, and so does each module of the layouts, whole. Sizes are symbols (sizes.py); a branch on one
becomes a guard. What looks at data is refused.

Changes in place become changes of a copy: a rank sees the samples of its own layout, and other
layouts may read the value as it was. An alias of what was changed must not be read any more.
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError
from colocc.passes.graph import Method
from colocc.passes.guards import Guards, ModeGuard, SizeGuard
from colocc.passes.nodes import Nodes
from colocc.passes.parts import WHOLE
from colocc.passes.probe import Probe, probe
from colocc.passes.shapes import TORCH_DTYPES, is_shape
from colocc.passes.sizes import Sizes
from colocc.passes.source import line_here
from colocc.passes.structure import children, rebuilt, tensors_in

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
LOOKS = "its control flow or arithmetic looks at the value of a tensor"
OPERATORS = {
    f"__{name}__": function
    for name, function in {
        **{n: getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "floordiv", "mod")},
        **{n: getattr(operator, n) for n in ("pow", "matmul", "eq", "ne", "lt", "le", "gt", "ge")},
        **{n: getattr(operator, n) for n in ("neg", "invert", "getitem")},
        "and": operator.and_,
        "or": operator.or_,
        "xor": operator.xor,
    }.items()
}
HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
Rule = Callable[[Mapping[str, Any]], Any]
"""From arguments by name to (dtype, shape) for each tensor of the result; None if not known."""

_active = threading.local()


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, ``recorder`` is this thread's active one."""
    _active.recorder = recorder
    try:
        yield
    finally:
        _active.recorder = None


def active() -> Recorder | None:
    """The recorder of this thread, if one records."""
    return getattr(_active, "recorder", None)


def assigned(value: torch.Tensor, index: Any, new: Any) -> torch.Tensor:
    """A copy of ``value`` with ``value[index] = new``."""
    copy = value.clone()
    copy[index] = new
    return copy


class Recorder(Nodes, TorchFunctionMode):
    """Makes the nodes of a graph from what runs while it is active."""

    def __init__(
        self, model: nn.Module, targets: Mapping[str, str], batch_size: int, device: torch.device
    ) -> None:
        Nodes.__init__(self, model, Sizes(batch_size, self.branched), device)
        TorchFunctionMode.__init__(self)
        self.targets = targets
        self.guards = Guards(
            self.sizes.batch, self.sizes.origins, self.sizes.hints, self.sizes.items
        )
        self.rules: dict[Any, Rule] = {}
        self.notes: list[str] = []
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self.sizes.environment)
        self.paths = {id(module): path for path, module in model.named_modules()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.depth:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            raise self.refused("it enters torch.inference_mode: write torch.no_grad")
        if _name(func) in HOOKS:
            raise self.refused(f"{_name(func)} sees a gradient, which the graph would lose")
        if _name(func) in WHOLE:
            found = WHOLE[_name(func)](self, args, kwargs)
            if found is not NotImplemented:
                return found
        before = {id(t): (t, t._version) for t in tensors_in((args, kwargs))}
        value = self._run(func, args, kwargs)
        changed = [t for t, version in before.values() if t._version != version]
        if changed:
            return self._changed(func, args, kwargs, value, changed)
        if _makes_tensors(value):
            self._record(func, args, kwargs, value)
        return value

    def _run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            with self.inside():
                value = func(*args, **kwargs)
        except DATA as error:
            raise self.refused(LOOKS) from error
        fixed = self.sizes.specialised()
        if fixed is not None:
            count = self.sizes.hints[fixed]
            alone = ": with one, it cannot be told from a broadcast. Give an example of two"
            raise self.refused(
                f"{_name(func)} fixes the number of {self._things(fixed)} to the example's {count}"
                + alone * (count == 1)
            )
        for symbol, known in self.sizes.environment.replacements.items():
            # What torch asks of a size, to broadcast or to view, is no branch of the forward.
            if symbol in self.sizes.hints and known.is_Integer:
                self._guard_fixed(symbol, _name(func))
        return value

    def _record(self, func: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> fx.Node:
        operands = self.operand(tuple(args)), self.operand(kwargs)
        op, target = _target(func)
        return self.node(op, target, *operands, value)

    def _changed(
        self, func: Callable[..., Any], args: Any, kwargs: Any, value: Any, changed: Sequence[Any]
    ) -> Any:
        name = _name(func)
        subject = changed[0]
        if id(subject) in self.held:
            raise self.refused(f"{name} changes {self.held[id(subject)]} of the model in place")
        if len(changed) > 1 or not args or args[0] is not subject:
            raise self.refused(f"{name} changes an argument other than its first in place")
        if subject.requires_grad and not torch.is_grad_enabled():
            raise self.refused(f"{name} changes what has a gradient in place under torch.no_grad")
        node = self.operand(subject)
        if name == "__setitem__":
            rest = self.operand(tuple(args[1:]))
            self.node("call_function", assigned, (node, *rest), {}, subject)
        else:
            op, target = _target(func)
            rest, named = self.operand(tuple(args[1:])), self.operand(kwargs)
            copy = self.graph.create_node("call_method", "clone", (node,), {})
            copy.meta.update(line=line_here(), value=subject)
            self.node(op, target, (copy, *rest), named, subject)
        self.outdate(subject)
        return value

    def call(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module that is called: one node if the layouts name it, or what it is part of."""
        path = self.paths.get(id(module))
        owner = self.owner(path)
        if owner is not None and path is not None:
            name = re.sub(r"\W", "_", owner if self.targets[owner] == path else path)
            inner = _unwrapped(module)
            return self.opaque(
                "call_module", path, run if inner is module else inner, args, kwargs, name
            )
        if path is None or not _is_torchs_own(module):
            return run(*args, **kwargs)
        value = self._run(run, args, kwargs)
        operands = self.operand(tuple(args)), self.operand(kwargs)
        node = self.node("call_module", path, *operands, value)
        node.meta["kind"] = type(module).__name__
        return value

    def owner(self, path: str | None) -> str | None:
        """The name in the layouts of the module that ``path`` is, or is part of."""
        for name, target in self.targets.items():
            if path is not None and (path == target or path.startswith(target + ".")):
                return name
        return None

    def opaque(
        self, op: str, target: Any, run: Callable[..., Any], args: Any, kwargs: Any, name: str
    ) -> Any:
        """One call whose inside is not looked at; its shapes are known by rule, or probed."""
        if op == "call_module" and target in self.rules:
            return self._by_rule(op, target, args, kwargs, name)
        operands = self.operand(tuple(args)), self.operand(kwargs)
        line = line_here()
        with self.inside():
            try:
                found = probe(self.sizes, run, args, kwargs, self.example_of)
            except Exception as error:  # whatever the user's module does with the example's shapes
                raise CaptureError(
                    f"{line or name}: {type(error).__name__}: {error}\n"
                    f"  seen while finding the shapes that {name} makes"
                ) from error
            module = self.model.get_submodule(target) if op == "call_module" else None
            weights = module.parameters() if module is not None else ()
            learns = any(t.requires_grad for t in (*tensors_in((args, kwargs)), *weights))
            with self.mode:
                value = _symbolic(self.sizes, found, learns)
        for symbol in found.fixed:
            if self.sizes.growing(symbol):
                raise self.refused(
                    f"{name} takes no other number of {self._things(symbol)} than the example's"
                )
            self._guard_fixed(symbol, name)
        self.node(op, target, *operands, value, name)
        self.share(tensors_in(value), found.memory)
        return value

    def method(self, method: Method, label: str, arguments: dict[str, Any]) -> Any:
        """A glue method of the model that is one call, whose result is known by rule."""
        return self._by_rule("call_function", method, (), arguments, label)

    def _by_rule(self, op: str, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        rule = self.rules.get(target.name if isinstance(target, Method) else target)
        operands = self.operand(tuple(args)), self.operand(kwargs)
        answer = rule(kwargs) if rule is not None else None
        with self.inside():
            value = self._unknown() if answer is None else _made(answer, self.device)
        node = self.node(op, target, *operands, value, name)
        sources_open = any(source.meta.get("open") for source in node.all_input_nodes)
        node.meta["open"] = answer is None or sources_open
        return value

    def _unknown(self) -> torch.Tensor:
        """A tensor of which nothing is known."""
        return torch.empty((self.sizes.environment.create_unbacked_symint(),), device=self.device)

    def unknown(self, path: tuple[str, ...], *, required: bool) -> torch.Tensor:
        """A placeholder of which nothing is known; a ``required`` one must not be read."""
        value = self._unknown()
        self.placeholder(path, value, None)
        self._inputs[path].meta.update(open=True, required=required)
        return value

    def sees(self, args: Any, kwargs: Any) -> bool:
        """Whether a call is the forward's own, and not made inside a node."""
        return not self.depth

    def left_out(self, condition: Any) -> bool:
        """Whether a check looks at data: it is not made, and the guards of scatters do its work."""
        if isinstance(condition, torch.SymBool):
            looks = not condition.node.expr.free_symbols <= set(self.sizes.hints)
        else:
            looks = isinstance(condition, torch.Tensor)
        if looks and not self.depth:
            self.notes.append(f"the check at {line_here()} is left to the guards")
        return looks and (not self.depth or isinstance(condition, torch.Tensor))

    def finish(self, result: Any) -> None:
        """Make the output node."""
        made = self.graph.output(self.operand(result))
        made.meta.update(line="", value=None)

    def fix(self, symbol: sympy.Symbol, name: str) -> None:
        """Make the example's value of ``symbol`` a guard, and a number from now on."""
        self._guard_fixed(symbol, name)
        self.sizes.fix(symbol)

    def _guard_fixed(self, symbol: sympy.Symbol, name: str) -> None:
        hint = self.sizes.hints[symbol]
        if not any(guard.condition == sympy.Eq(symbol, hint) for guard in self.guards.sizes):
            text = f"{self.sizes.names[symbol]} == {hint}"
            self.guards.sizes.append(
                SizeGuard(sympy.Eq(symbol, hint), text, f"{name} takes no other")
            )

    def branched(self, expr: sympy.Basic, answer: Any) -> None:
        """The forward asked for the truth, or the plain number, of an expression in sizes."""
        if self.depth or not expr.free_symbols:
            return
        is_condition = answer in (True, False) and isinstance(
            answer, (bool, sympy.logic.boolalg.BooleanAtom)
        )
        growing = self.sizes.growing(expr)
        if not is_condition and growing:
            raise self.refused_count(growing[0], answer)
        condition = (
            (expr if answer else sympy.Not(expr)) if is_condition else sympy.Eq(expr, answer)
        )
        if any(symbol != self.sizes.batch for symbol in growing):
            self._check_any_number(condition)
        elif all(guard.condition != condition for guard in self.guards.sizes):
            self.guards.sizes.append(SizeGuard(condition, self.sizes.shown(condition), line_here()))

    def _check_any_number(self, condition: sympy.Basic) -> None:
        """Raise CaptureError for a branch that takes another side for other numbers of items: they
        differ from rank to rank. An encoder is never called without any."""
        items = set(self.sizes.items.values()) & condition.free_symbols
        more = {s: 1 + sympy.Symbol(f"more_{s}", integer=True, nonnegative=True) for s in items}
        if sympy.simplify(condition.xreplace(more)) != sympy.true:
            raise self.refused(
                f"a branch asks whether {self.sizes.shown(condition)}, and each rank sees another "
                "number of items"
            )

    def _things(self, symbol: sympy.Symbol) -> str:
        """What ``symbol`` counts."""
        return "samples" if symbol == self.sizes.batch else self.sizes.names[symbol]

    def refused_count(self, symbol: sympy.Symbol, count: Any) -> CaptureError:
        """What to say of code that takes the number of samples for a plain number."""
        return self.refused(
            f"the number of {self._things(symbol)}, {count} in the example, is used as a plain "
            "number, and each rank sees only some of them"
        )

    def looked_at_training(self, module: nn.Module, training: bool) -> None:
        """The forward read ``module.training``."""
        path = self.paths.get(id(module))
        if self.depth or path is None or self.owner(path) is not None:
            return
        guard = ModeGuard(path, training, line_here())
        if all((g.module, g.training) != (path, training) for g in self.guards.modes):
            self.guards.modes.append(guard)


def _symbolic(sizes: Sizes, found: Probe, learns: bool) -> Any:
    """The probed value with symbolic tensors; objects that are no containers stay."""
    shapes = iter(found.shapes)

    def change(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            shape = [sizes.symbolic(expr) for expr in next(shapes)]
            made = torch.empty(shape, dtype=part.dtype, device=part.device)
            # The clone may be changed in place, as the module's own result may.
            return made.requires_grad_().clone() if learns and made.is_floating_point() else made
        return part if children(part) is None else rebuilt(part, change)

    return change(found.value)


def _made(answer: Any, device: torch.device) -> Any:
    """What a rule says, as tensors without data."""
    return pytree.tree_map(
        lambda x: torch.empty(x[1], dtype=TORCH_DTYPES[x[0]], device=device) if is_shape(x) else x,
        answer,
        is_leaf=is_shape,
    )


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether a module is one glue operation: torch's own, and no container."""
    own = type(module).__module__.startswith("torch.nn")
    return own and not list(module.children())


def _unwrapped(module: nn.Module) -> nn.Module:
    """``module`` without its data parallel wrapper, whose forward prepares a reduction."""
    while isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return module


def _makes_tensors(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _target(func: Any) -> tuple[str, Any]:
    """The op and the target of a node for a torch function, as torch.fx would write it."""
    name = _name(func)
    if name == "__get__":
        return "call_function", Attribute(func.__self__.__name__)
    if name in OPERATORS:
        return "call_function", OPERATORS[name]
    if (
        getattr(torch.Tensor, name, None) is func
        or getattr(func, "__objclass__", None) is torch._C.TensorBase
    ):
        return "call_method", name
    return "call_function", func


class Attribute:
    """A read of an attribute that is a tensor, such as ``.T``: the target of a node."""

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = name

    def __call__(self, value: Any) -> Any:
        return getattr(value, self.name)

"""Trace the user's forward into a graph: one call per module of the layouts, glue between them.

Algorithm:
1. Bind the forward's arguments: an input becomes a placeholder (a nested one per tensor of the
   example, or per module where the model is known), anything else keeps its default.
2. Trace with torch.fx. A module that the layouts name is one call, also when the model calls its
   ``.forward()``; a method that looks at values, and a function marked ``colocc.leaf``, is one
   call.
3. Drop reads of shapes that nothing uses.

torch.fx traces through a custom ``autograd.Function`` and so loses its backward: that is an error
here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import operator
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from colocc.errors import CaptureError, LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Graph, Traits

_LIBRARIES = tuple(os.path.dirname(os.path.realpath(path)) for path in (torch.__file__, __file__))
# torch.fx replaces nn.Module.__call__ while it traces, for all threads: no other may run a module.
TRACING = threading.RLock()


def leaf[F: Callable[..., Any]](fn: F) -> F:
    """``fn`` as one opaque call of the captured graph, for glue that looks at values.

    It must treat every sample on its own: row i of its result may depend on row i of its arguments.
    """

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tracer = _tracer_of(args, kwargs)
        if tracer is None:
            return fn(*args, **kwargs)
        return tracer.create_proxy("call_function", wrapper, args, kwargs, name=fn.__name__)

    wrapper.colocc_leaf = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def capture(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    *,
    example_inputs: Mapping[str, Any] | None = None,
    traits: Traits | None = None,
) -> Graph:
    """Return the graph of ``model.forward``.

    Raises: LayoutError for a module in ``layouts`` that the model lacks, or parameters that no
    layout covers; CaptureError, with the user's line and the remedy, for a forward that cannot be
    traced.
    """
    traits = traits or Traits()
    targets = find_targets(model, layouts, traits)
    check_covered(model, targets)
    tracer = _Tracer(targets, traits)
    inputs = _bind(model, example_inputs, traits)
    with TRACING, tracer.prepared(model):
        graph = tracer.capture(model, inputs)
    _drop_unused_reads(graph)
    return Graph(graph, type(model).__name__, dict(layouts), targets)


def find_targets(model: nn.Module, layouts: Mapping[str, Layout], traits: Traits) -> dict[str, str]:
    """The submodule path of each name in ``layouts``: a path itself, or a name the traits know."""
    paths = {path for path, _ in model.named_modules() if path}
    targets = {}
    for name in layouts:
        path = traits.targets.get(name, name)
        if path not in paths:
            known = ", ".join([*traits.targets, *sorted(p for p in paths if "." not in p)])
            raise LayoutError(
                f"layouts names {name!r}, but {type(model).__name__} has no such module. "
                f"Use a submodule path or one of: {known}"
            )
        targets[name] = path
    for name, path in targets.items():
        inside = [
            n for n, p in targets.items() if p.startswith(path + ".") or (p == path and n != name)
        ]
        if inside:
            raise LayoutError(
                f"layouts names both {name!r} ({path}) and {inside[0]!r} ({targets[inside[0]]}), "
                "which is part of it. Give each parameter one layout."
            )
    return targets


def check_covered(model: nn.Module, targets: Mapping[str, str]) -> None:
    """Raise LayoutError if a parameter stands outside every module of the layouts."""
    covered = tuple(path + "." for path in targets.values())
    for name, parameter in model.named_parameters():
        if not name.startswith(covered):
            owner = name.rpartition(".")[0] or type(model).__name__
            raise LayoutError(
                f"no layout covers the parameter {name} {list(parameter.shape)}: layouts names "
                f"{', '.join(f'{n} ({p})' for n, p in targets.items())}. "
                f"Add a layout for {owner!r}, or move it into one of these modules."
            )


def _bind(
    model: nn.Module, example_inputs: Mapping[str, Any] | None, traits: Traits
) -> dict[str, Any]:
    """The forward's arguments: _Input where a value comes from the batch, else the default."""
    bound: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        given = example_inputs is not None and example_inputs.get(name) is not None
        if name in traits.nested:
            bound[name] = {module: _Input((name, module)) for module in traits.nested[name]}
        elif given:
            assert example_inputs is not None
            bound[name] = _inputs_of(example_inputs[name], (name,))
        elif required or name in traits.inputs:
            bound[name] = _Input((name,))
        else:
            bound[name] = parameter.default
    unknown = sorted(set(example_inputs or ()) - set(bound))
    if unknown:
        raise CaptureError(
            f"example_inputs has {unknown[0]!r}, which {type(model).__name__}.forward does not "
            f"take; it takes {', '.join(bound)}"
        )
    return bound


class _Input:
    """A placeholder to be, with its place in the batch."""

    def __init__(self, path: tuple[str, ...]) -> None:
        self.path = path


def _inputs_of(value: Any, path: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _inputs_of(item, (*path, str(key))) for key, item in value.items()}
    return _Input(path) if isinstance(value, torch.Tensor) else value


class _Tracer(fx.Tracer):
    def __init__(self, targets: Mapping[str, str], traits: Traits) -> None:
        super().__init__()
        self.targets, self.traits = targets, traits
        self.record_stack_traces = True
        self.inputs: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.targets.values():
            return True
        # A module of torch's own without parameters (GELU, Dropout) is one glue operation.
        return bool(super().is_leaf_module(m, module_qualified_name))

    @contextlib.contextmanager
    def prepared(self, model: nn.Module) -> Iterator[None]:
        """Make direct calls of ``.forward()`` and of glue methods visible to the trace."""
        with contextlib.ExitStack() as undo:
            for path in self.targets.values():
                self._watch_forward(model.get_submodule(path), undo)
            for glue in self.traits.glue:
                if hasattr(model, glue.method):
                    self._watch_method(model, Method(glue.method, glue.stage), glue.label, undo)
            for attribute in self.traits.disabled:
                kept = getattr(model, attribute)
                setattr(model, attribute, type(kept)())
                undo.callback(setattr, model, attribute, kept)
            undo.enter_context(_refuse_custom_backward())
            yield

    def _watch_forward(self, module: nn.Module, undo: contextlib.ExitStack) -> None:
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            if _tracer_of(args, kwargs) is self:
                return self.call_module(module, forward, args, kwargs)
            return forward(*args, **kwargs)

        object.__setattr__(module, "forward", watched)
        undo.callback(module.__dict__.pop, "forward")

    def _watch_method(
        self, model: nn.Module, call: Method, label: str, undo: contextlib.ExitStack
    ) -> None:
        name = call.name
        method = getattr(model, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if _tracer_of(args, kwargs) is self:
                bound = inspect.signature(method).bind(*args, **kwargs)
                return self.create_proxy("call_function", call, (), bound.arguments, name=label)
            return method(*args, **kwargs)

        object.__setattr__(model, name, watched)
        undo.callback(model.__dict__.pop, name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        def make(value: Any) -> Any:
            if isinstance(value, _Input):
                proxy = self.create_proxy("placeholder", "_".join(value.path), (), {})
                proxy.node.meta["path"] = value.path
                return proxy
            if isinstance(value, dict):
                return {key: make(item) for key, item in value.items()}
            return value

        arguments = {name: make(value) for name, value in self.inputs.items()}
        return (lambda root: root_fn(root, **arguments)), [self.root]

    def capture(self, model: nn.Module, inputs: dict[str, Any]) -> fx.Graph:
        self.inputs = inputs
        try:
            graph = self.trace(model)
        except (CaptureError, LayoutError):
            raise
        except Exception as error:  # whatever the user's forward does with a traced value
            raise _explain(error, model) from error
        names = {path: name for name, path in self.targets.items()}
        for node in graph.nodes:
            if node.op == "call_module" and node.target in names:
                node._rename(re.sub(r"\W", "_", names[str(node.target)]))
            node.meta["line"] = _line(node.stack_trace)
            if node.op == "call_module":
                node.meta["kind"] = type(model.get_submodule(str(node.target))).__name__
        return graph


class Method:
    """A method of the model as the target of a node; the executor binds it to the model."""

    def __init__(self, name: str, stage: str) -> None:
        self.name = self.__name__ = name
        self.stage = stage

    def __repr__(self) -> str:
        return f"model.{self.name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(f"{self!r} is bound to a model by the program that runs the graph")


def _tracer_of(args: Any, kwargs: Any) -> fx.Tracer | None:
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, fx.Proxy):
            tracer = value.tracer
            assert isinstance(tracer, fx.Tracer)
            return tracer
    return None


@contextlib.contextmanager
def _refuse_custom_backward() -> Iterator[None]:
    apply = torch.autograd.Function.__dict__["apply"]

    def refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if _tracer_of(args, kwargs) is not None:
            raise CaptureError(
                f"{cls.__name__}.apply() has a backward of its own, which a trace would lose. "
                f"{_user_line(traceback.extract_stack())}\n  Wrap the call in a function marked "
                "@colocc.leaf, or move it into a module that the layouts name."
            )
        return apply.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(refuse)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def _explain(error: Exception, model: nn.Module) -> CaptureError:
    where = _user_line(traceback.extract_tb(error.__traceback__))
    if isinstance(error, fx.proxy.TraceError):
        problem = "its control flow or arithmetic looks at the value of a tensor"
    else:
        problem = f"{type(error).__name__}: {error}"
    return CaptureError(
        f"{type(model).__name__}.forward cannot be traced: {problem}.\n  {where}\n"
        "  Move that code into a function marked @colocc.leaf (it must treat every sample on its "
        "own), or into a module that the layouts name."
    )


def _user_line(frames: traceback.StackSummary) -> str:
    """The innermost line that is neither torch's nor colocc's."""
    for frame in reversed(frames):
        path = os.path.realpath(frame.filename)
        if not path.startswith(_LIBRARIES) and not path.startswith("<"):
            return f"at {_short(path)}:{frame.lineno} {frame.line}"
    return "at a line that is not known"


def _line(stack_trace: str | None) -> str:
    """The last line of a recorded stack that is the user's, as ``file.py:31 self.vision(x)``."""
    found = ""
    lines = (stack_trace or "").splitlines()
    for line in lines:
        words = line.strip().split(", ")
        if len(words) < 2 or not words[0].startswith('File "'):
            continue
        path, number = words[0][6:-1], words[1].removeprefix("line ")
        if not os.path.realpath(path).startswith(_LIBRARIES):
            code = linecache.getline(path, int(number)).strip()
            found = f"{_short(path)}:{number} {code}"
    return found


def _short(path: str) -> str:
    return "/".join(path.split(os.sep)[-2:])


def _drop_unused_reads(graph: fx.Graph) -> None:
    """Erase reads of attributes, sizes and items that nothing uses; nothing else is ever
    dropped."""
    reads = {getattr, operator.getitem, len}
    for node in reversed(graph.nodes):
        unused = not node.users
        if unused and node.op == "call_function" and node.target in reads:
            graph.erase_node(node)
        elif unused and node.op == "placeholder":
            # What the forward takes and never reads is no input: a batch that has it is refused.
            graph.erase_node(node)
        elif unused and node.op == "call_method" and node.target in {"size", "dim"}:
            graph.erase_node(node)

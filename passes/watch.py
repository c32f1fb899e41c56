"""See what a model calls while its forward is traced, and leave it as it was.

torch.nn.Module's ``__call__`` is replaced for all threads while one traces, as torch.fx does; other
threads' calls pass through.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from colocc.errors import CaptureError
from colocc.passes.graph import Method, Traits
from colocc.passes.source import line_here

TRACING = threading.RLock()
"""Held by the one thread that traces."""


CHECKS = {"_check_with": 1, "_check_tensor_all_with": 1, "_check_tensor_all": 0}
"""torch's checks by name, with the place of the condition among their arguments."""


class Watcher(Protocol):
    """What is told of calls; each answers whether it is the watcher's own, and what it makes."""

    def sees(self, args: Any, kwargs: Any) -> bool: ...

    def call(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...

    def method(self, method: Method, label: str, arguments: dict[str, Any]) -> Any: ...


@contextlib.contextmanager
def watched(
    model: nn.Module, targets: Mapping[str, str], traits: Traits, watcher: Watcher
) -> Iterator[None]:
    """Inside, direct calls of ``.forward()`` and of glue methods go to ``watcher``, and a custom
    backward is refused."""
    with contextlib.ExitStack() as undo:
        for path in targets.values():
            _watch_forward(model.get_submodule(path), watcher, undo)
        for glue in traits.glue:
            if hasattr(model, glue.method):
                _watch_method(model, Method(glue.method, glue.stage), glue.label, watcher, undo)
        for attribute in traits.disabled:
            kept = getattr(model, attribute)
            setattr(model, attribute, type(kept)())
            undo.callback(setattr, model, attribute, kept)
        undo.enter_context(_refuse_custom_backward(watcher))
        yield


def _watch_forward(module: nn.Module, watcher: Watcher, undo: contextlib.ExitStack) -> None:
    forward = module.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        if watcher.sees(args, kwargs):
            return watcher.call(module, forward, args, kwargs)
        return forward(*args, **kwargs)

    object.__setattr__(module, "forward", seen)
    undo.callback(module.__dict__.pop, "forward")


def _watch_method(
    model: nn.Module, call: Method, label: str, watcher: Watcher, undo: contextlib.ExitStack
) -> None:
    method = getattr(model, call.name)

    def seen(*args: Any, **kwargs: Any) -> Any:
        # What is called with nothing but None (no packing) is no call of the graph.
        given = any(value is not None for value in (*args, *kwargs.values()))
        if given and watcher.sees(args, kwargs):
            bound = inspect.signature(method).bind(*args, **kwargs)
            return watcher.method(call, label, dict(bound.arguments))
        return method(*args, **kwargs)

    object.__setattr__(model, call.name, seen)
    undo.callback(model.__dict__.pop, call.name)


@contextlib.contextmanager
def _refuse_custom_backward(watcher: Watcher) -> Iterator[None]:
    apply = torch.autograd.Function.__dict__["apply"]

    def refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if watcher.sees(args, kwargs):
            raise CaptureError(
                f"{cls.__name__}.apply() has a backward of its own, which a trace would lose. "
                f"at {line_here()}\n  Wrap the call in a function marked "
                "@colocc.leaf, or move it into a module that the layouts name."
            )
        return apply.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(refuse)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


@contextlib.contextmanager
def every_call(watcher: Watcher) -> Iterator[None]:
    """Inside, every call of a module in this thread goes to ``watcher``."""
    thread, call = threading.get_ident(), nn.Module.__call__

    def seen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            return call(module, *given, **named)

        if threading.get_ident() == thread and watcher.sees(args, kwargs):
            return watcher.call(module, run, args, kwargs)
        return run(*args, **kwargs)

    nn.Module.__call__ = seen  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


@contextlib.contextmanager
def reads_of_training(told: Callable[[nn.Module, bool], None]) -> Iterator[None]:
    """Inside, ``told`` hears when this thread reads ``training`` of a module."""
    thread = threading.get_ident()

    def read(module: nn.Module) -> bool:
        training: bool = module.__dict__["training"]
        if threading.get_ident() == thread:
            told(module, training)
        return training

    def write(module: nn.Module, training: bool) -> None:
        module.__dict__["training"] = training

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


@contextlib.contextmanager
def checks_of_data(left_out: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, ``left_out`` is asked of the condition of each of torch's checks in this thread; one
    for which it answers true is not made."""
    thread = threading.get_ident()
    kept = {name: getattr(torch, name) for name in CHECKS}

    def check(original: Callable[..., Any], place: int) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            mine = threading.get_ident() == thread and len(args) > place
            return None if mine and left_out(args[place]) else original(*args, **kwargs)

        return seen

    for name, place in CHECKS.items():
        setattr(torch, name, check(kept[name], place))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever a forward leaves in the model's modules is taken back: attributes, and what their
    dicts, lists and sets hold."""
    kept = [(module, _copy(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, saved in kept:
            for name in set(module.__dict__) - set(saved):
                del module.__dict__[name]
            for name, (value, content) in saved.items():
                if content is not None:
                    _refill(value, content)
                module.__dict__[name] = value


def _copy(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    containers = (dict, OrderedDict, list, set)
    return {
        name: (value, value.copy() if type(value) in containers else None)
        for name, value in attributes.items()
    }


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)

"""Values inside containers: mappings, sequences, dataclasses, and what is built from them again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch.utils import _pytree as pytree

CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, Enum),
    *(torch.dtype, torch.device, torch.memory_format),
)
Step = tuple[str, Any]
"""One step into a container: ("item", key or index) or ("field", name)."""


def children(value: Any) -> list[tuple[Step, Any]] | None:
    """The parts of a container with the steps to them; None for any other value."""
    if isinstance(value, Mapping):
        return [(("item", key), item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [(("item", index), item) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        return [(("field", name), getattr(value, name)) for name in fields]
    return None


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to each of its parts; a container of the same kind."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: change(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        items = {key: change(item) for key, item in value.items()}
        if type(value) is dict:
            return items
        made: Any = copy.copy(value)
        for key, item in items.items():
            made[key] = item
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    parts = [change(item) for item in value]
    return tuple(parts) if isinstance(value, tuple) else parts


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """What torch's ``tree_map`` returns; sooner where ``value`` is a tensor, None or a dict of
    them."""
    if value is None or isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {key: mapped(change, part) for key, part in value.items()}
    return pytree.tree_map(change, value)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    for _, part in children(value) or []:
        yield from tensors_in(part)


def is_constant(value: Any) -> bool:
    """Whether a value is no tensor and holds none, and equals another of the same content."""
    if isinstance(value, CONSTANTS):
        return True
    parts = value if isinstance(value, (set, frozenset)) else [p for _, p in children(value) or []]
    return (children(value) is not None or value is parts) and all(map(is_constant, parts))


def same_constant(left: Any, right: Any) -> bool:
    """Whether two constants are equal and of one kind: 1, 1.0 and True are three; nan is itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (set, frozenset)):
        return left == right and {(type(x), x) for x in left} == {(type(x), x) for x in right}
    parts, others = children(left), children(right)
    if parts is None or others is None:
        return bool(left == right or (left != left and right != right))
    return [step for step, _ in parts] == [step for step, _ in others] and all(
        same_constant(part, other) for (_, part), (_, other) in zip(parts, others, strict=True)
    )


def is_plain(value: Any) -> bool:
    """Whether an FX argument can hold this container as it is."""
    return type(value) in (dict, list, tuple, slice)


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of the argument ``index`` in a template."""

    index: int


class Rebuilt:
    """A container of the user's own kind, made from values of the graph: the target of a node."""

    def __init__(self, template: Any) -> None:
        self.template = template
        self.__name__ = type(template).__name__
        self.is_record = dataclasses.is_dataclass(template)

    def __call__(self, *values: Any) -> Any:
        def fill(part: Any) -> Any:
            if isinstance(part, Slot):
                return values[part.index]
            return part if children(part) is None else rebuilt(part, fill)

        return fill(self.template)

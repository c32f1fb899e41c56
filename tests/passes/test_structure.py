"""Covers passes/structure.py: containers taken apart and built again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from colocc.passes.structure import (
    Rebuilt,
    Slot,
    children,
    is_constant,
    is_plain,
    rebuilt,
    tensors_in,
)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Record:
    value: Any
    more: list[Any] = field(default_factory=list)


class Named(OrderedDict[str, Any]):
    pass


def test_the_steps_to_each_part() -> None:
    assert children({"a": 1}) == [(("item", "a"), 1)]
    assert children(Pair(1, 2)) == [(("item", 0), 1), (("item", 1), 2)]
    assert children(Record(1)) == [(("field", "value"), 1), (("field", "more"), [])]
    assert children(torch.zeros(2)) is None and children("text") is None
    assert children(Record) is None


def test_a_container_is_built_again_as_its_own_kind() -> None:
    for value in ({"a": 1}, [1, 2], (1, 2), Pair(1, 2), Record(1, [2]), Named(a=1)):
        made = rebuilt(value, lambda part: part)
        assert type(made) is type(value) and made == value and made is not value
    assert rebuilt(Named(a=1), lambda part: part + 1) == Named(a=2)


def test_tensors_come_in_order() -> None:
    first, second, third = torch.zeros(1), torch.ones(1), torch.ones(2)
    found = list(tensors_in({"a": Record(first, [second]), "b": (3, third)}))
    assert [id(t) for t in found] == [id(first), id(second), id(third)]


def test_what_an_fx_argument_can_hold() -> None:
    assert is_plain({}) and is_plain([]) and is_plain(())
    assert not is_plain(Pair(1, 2)) and not is_plain(Named()) and not is_plain(Record(1))


def test_slots_are_filled_at_any_depth() -> None:
    target = Rebuilt(Record(Slot(1), [Slot(0), {"kind": "plain"}]))
    assert target("zero", "one") == Record("one", ["zero", {"kind": "plain"}])
    assert (target.__name__, target.is_record, Rebuilt([]).is_record) == ("Record", True, False)


def test_what_can_be_compared() -> None:
    for value in (None, 1.5, "a", (1, [2, {"a": {3}}]), torch.float32, Record(1), slice(1, 2)):
        assert is_constant(value)
    for odd in (torch.zeros(1), [torch.zeros(1)], object(), Record(object()), {1, len}):
        assert not is_constant(odd)

"""Covers passes/parts.py: values taken apart by sample, joined again in their order or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colocc.errors import CaptureError
from tests.passes.kit import pair_graph

Glue = Callable[[Tensor, Tensor], Tensor]


def glue_calls(glue: Glue) -> list[str]:
    """The glue, by name, without what the sizes of the inputs are read by."""
    graph = pair_graph(glue)
    between = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    return [str(getattr(n.target, "__name__", n.target)) for n in between]


JOINED: dict[str, tuple[Glue, list[str]]] = {
    "a stack": (lambda x, mask: torch.stack(list(x)), []),
    "a cat": (lambda x, mask: torch.cat(list(x)).view(x.shape), ["flatten"]),
    "an unbind": (lambda x, mask: torch.stack(x.unbind(0)) + 1, ["add"]),
    "another dim": (lambda x, mask: torch.stack(x.unbind(1), 1), ["unbind", *["getitem"] * 5]),
}


@pytest.mark.parametrize("name", JOINED)
def test_pieces_that_are_joined_again(name: str) -> None:
    glue, wanted = JOINED[name]
    assert glue_calls(glue)[: len(wanted)] == wanted
    if not wanted:
        assert glue_calls(glue) == []


def reversed_order(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack(list(x)[::-1])


def left_out(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack(list(x)[:-1])


def summed(x: Tensor, mask: Tensor) -> Tensor:
    return x + torch.stack([part.sum() for part in x]).view(-1, 1, 1)


@pytest.mark.parametrize("glue", [reversed_order, left_out, summed])
def test_pieces_that_are_read_by_themselves_are_refused(glue: Glue) -> None:
    with pytest.raises(CaptureError) as info:
        pair_graph(glue)
    message = str(info.value)
    assert "it takes out one of the 8 parts of a value that holds all samples" in message
    assert "passes/test_parts.py:" in message and "@colocc.leaf" in message


def counts_as_numbers(x: Tensor, mask: Tensor) -> Tensor:
    first: Tensor = mask.flatten(1).sum(1).unbind(0)[0]
    return x * first.item()


def test_a_count_of_one_sample_is_no_number() -> None:
    with pytest.raises(CaptureError, match="a size depends on data") as info:
        pair_graph(counts_as_numbers)
    assert "passes/test_parts.py:" in str(info.value)

"""Covers runtime/accumulate.py on a GPU: its kernel and torch agree to the bit."""

import pytest
import torch

from colocc.runtime.accumulate import _has_kernel, accumulate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 5, 4096, 4097, 1 << 20])
@pytest.mark.parametrize("first", [0, 1])
def test_the_kernel_adds_as_torch_does(
    world: int, size: int, first: int, dtype: torch.dtype
) -> None:
    assert world
    device = torch.device("cuda", torch.cuda.current_device())
    assert _has_kernel(device)
    generator = torch.Generator(device).manual_seed(size)
    total = torch.randn(size + 2, generator=generator, device=device)
    part = torch.randn(size, generator=generator, device=device).to(dtype)
    expected, before = total.clone(), total.clone()
    expected[first : first + size].add_(part)
    accumulate(total[first : first + size], part, dry=True)
    assert torch.equal(total, before)
    accumulate(total[first : first + size], part)
    assert torch.equal(total, expected)


def test_it_is_captured_in_a_graph(world: int) -> None:
    assert world
    total, part = torch.zeros(5000, device="cuda"), torch.ones(5000, device="cuda").bfloat16()
    accumulate(total, part, dry=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate(total, part)
    for _ in range(3):
        graph.replay()
    assert torch.equal(total, torch.full_like(total, 3.0))

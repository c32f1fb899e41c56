"""Covers runtime/context_parallel.py: Megatron's zigzag, and the gather with its adjoint."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank

from colocc import LayoutError
from colocc.runtime.context_parallel import chunks_of, gather, join, shard
from tests.harness import run_threads

SIZES = [1, 2, 3, 4]


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_each_chunk_is_on_one_rank(size: int, zigzag: bool) -> None:
    held = [chunk for rank in range(size) for chunk in chunks_of(rank, size, zigzag=zigzag)]
    assert sorted(held) == list(range(2 * size if zigzag else size))


@pytest.mark.parametrize("size", SIZES)
def test_zigzag_balances_a_causal_mask(size: int) -> None:
    work = [sum(chunk + 1 for chunk in chunks_of(rank, size)) for rank in range(size)]
    assert set(work) == {2 * size + 1}


def test_zigzag_is_megatron_s() -> None:
    whole = torch.arange(2 * 24).view(2, 24)

    def on_rank(rank: int) -> torch.Tensor:
        batch = {"tokens": whole}
        found = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=dist.group.WORLD)
        return torch.as_tensor(found["tokens"])

    for rank, part in enumerate(run_threads(3, on_rank)):
        assert torch.equal(shard(whole, 1, rank, 3), part)


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_join_is_the_inverse_of_shard(size: int, zigzag: bool) -> None:
    whole = torch.arange(5 * 24).view(5, 24)
    parts = [shard(whole, 1, rank, size, zigzag=zigzag) for rank in range(size)]
    assert torch.equal(join(parts, 1, zigzag=zigzag), whole)


def test_contiguous_is_a_run() -> None:
    assert shard(torch.arange(8), 0, 1, 4, zigzag=False).tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zigzag", [True, False])
def test_gather_and_its_adjoint(zigzag: bool, dtype: torch.dtype) -> None:
    size, length = 4, 16
    # Small integers: sums are exact in every dtype. Key and value differ in width.
    key = torch.arange(length * 2 * 3).view(length, 2, 3) % 7
    value = torch.arange(length * 2 * 5).view(length, 2, 5) % 5
    weights = [(rank + 1) * torch.ones(()) for rank in range(size)]

    def on_rank(rank: int) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        parts = [
            shard(whole, 0, rank, size, zigzag=zigzag).to(dtype).requires_grad_()
            for whole in (key, value)
        ]
        assert dist.group.WORLD is not None
        wholes = gather(parts[0], parts[1], dist.group.WORLD, zigzag=zigzag)
        loss = sum(
            (x * y.to(dtype)).sum() * weights[rank].to(dtype)
            for x, y in zip(wholes, (key, value), strict=True)
        )
        assert isinstance(loss, torch.Tensor)
        return [whole.detach() for whole in wholes], torch.autograd.grad(loss, parts)

    for rank, (wholes, gradients) in enumerate(run_threads(size, on_rank)):
        for whole, gradient, reference in zip(wholes, gradients, (key, value), strict=True):
            assert whole.dtype == gradient.dtype == dtype
            assert torch.equal(whole, reference.to(dtype))
            wanted = shard(reference, 0, rank, size, zigzag=zigzag) * (1 + 2 + 3 + 4)
            assert torch.equal(gradient, wanted.to(dtype))


def test_an_unused_output_has_a_gradient_of_zeros() -> None:
    """The collective of backward depends on no data: a rank that reads keys alone takes part."""

    def on_rank(rank: int) -> torch.Tensor:
        key, value = (torch.ones(4, 1, 1, requires_grad=True) for _ in range(2))
        assert dist.group.WORLD is not None
        keys, values = gather(key, value, dist.group.WORLD)
        (keys.sum() if rank == 0 else values.sum()).backward()
        assert key.grad is not None
        assert value.grad is not None
        return torch.stack([key.grad, value.grad])

    for gradients in run_threads(2, on_rank):
        assert torch.equal(gradients, torch.ones(2, 4, 1, 1))


def test_refusals() -> None:
    message = (
        r"the tensor to shard has a sequence of 10, which cp2 cuts into 4 equal chunks \(two for "
        r"each cp rank\): 10 % 4 = 2. Make it a multiple of 4."
    )
    with pytest.raises(LayoutError, match=message):
        shard(torch.zeros(10), 0, 0, 2)
    with pytest.raises(LayoutError, match=r"5 % 2 = 1\. Make it a multiple of 2"):
        shard(torch.zeros(5), 0, 0, 2, zigzag=False)

    def on_rank(_: int) -> str:
        assert dist.group.WORLD is not None
        with pytest.raises(LayoutError) as caught:
            gather(torch.zeros(3, 1), torch.zeros(3, 1), dist.group.WORLD)
        return str(caught.value)

    first, second = run_threads(2, on_rank)
    assert first == second
    assert first.startswith("key has a sequence of 6, which cp2 cuts into 4 equal chunks")

"""Covers examples/benchmark/multi_tensor.py."""

import torch

from examples.benchmark.multi_tensor import l2_norm, scale


def test_the_norm_of_all_tensors() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor([-7.0])]
    found, _ = l2_norm(0, None, [tensors], False)
    assert found.shape == (1,)
    torch.testing.assert_close(found[0], torch.cat([t.flatten() for t in tensors]).norm())


def test_scaling_writes_into_the_second_list() -> None:
    tensors = [torch.arange(4.0), torch.ones(2, 2)]
    kept = [tensor.data_ptr() for tensor in tensors]
    scale(0, None, [tensors, tensors], 0.5)
    assert [tensor.data_ptr() for tensor in tensors] == kept
    assert torch.equal(tensors[0], torch.tensor([0.0, 0.5, 1.0, 1.5]))
    assert torch.equal(tensors[1], torch.full((2, 2), 0.5))

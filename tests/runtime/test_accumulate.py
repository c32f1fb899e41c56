"""Covers runtime/accumulate.py where there is no kernel, and where it cannot be built; the kernel:
tests/gpus."""

import pytest
import torch

from colocc.runtime import accumulate as module
from colocc.runtime.accumulate import accumulate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_gpu_torch_adds(dtype: torch.dtype) -> None:
    total, part = torch.full((3, 2), 0.5), torch.tensor([[1.0, 2, 3], [4, 5, 6]]).t().to(dtype)
    accumulate(total, part, dry=True)
    assert torch.equal(total, torch.full((3, 2), 0.5))
    accumulate(total, part)
    assert total.tolist() == [[1.5, 4.5], [2.5, 5.5], [3.5, 6.5]]


@pytest.mark.parametrize("found", [None, [2.0, 2.0, 2.0, 2.0, 1.0]])
def test_a_kernel_that_cannot_be_built_or_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, found: list[float] | None
) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for GPUs alone")
    from colocc.runtime import accumulate_kernel

    def launch(total: torch.Tensor, part: torch.Tensor, size: int) -> None:
        if found is None:
            raise OSError("no compiler")
        total.copy_(torch.tensor(found))

    monkeypatch.setattr(accumulate_kernel, "launch", launch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    module._has_kernel.cache_clear()
    expected = "OSError: no compiler" if found is None else "three times of five is"
    with pytest.warns(UserWarning, match=expected):
        assert not module._has_kernel(torch.device("cpu"))
    module._has_kernel.cache_clear()

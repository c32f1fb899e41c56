"""Covers runtime/megatron/packing.py: the borders that a replica reads, and what are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colocc import Layout, LayoutError
from colocc.runtime.megatron.packing import packings


def given(borders: list[int], **more: Any) -> list[dict[str, Any]]:
    cu = torch.tensor(borders, dtype=torch.int32)
    packing = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, **more}
    return [{"input_ids": torch.zeros(4, 6, dtype=torch.int64), "packing_kwargs": packing}]


def cut(step: list[dict[str, Any]], dp: int = 2) -> list[dict[str, Any]]:
    found = packings("packing_kwargs", step, ("language", Layout(dp=dp)))
    assert found is not None
    return [found[0].of_replica(replica) for replica in range(dp)]


def test_each_replica_counts_its_own_tokens() -> None:
    first, second = cut(given([0, 4, 6, 12, 13, 18, 21, 24]))
    for side in ("q", "kv"):
        assert first[f"cu_seqlens_{side}"].tolist() == [0, 4, 6, 12]
        assert second[f"cu_seqlens_{side}"].tolist() == [0, 1, 6, 9, 12]
        assert (first[f"max_seqlen_{side}"], second[f"max_seqlen_{side}"]) == (6, 5)
    assert first["qkv_format"] == "thd" and "total_tokens" not in first


def test_padded_borders_and_borders_of_one_size() -> None:
    padded = torch.tensor([0, 6, 12, 15, 24, 24, 24])
    longest = torch.tensor(9, dtype=torch.int32)
    step = given(
        [0, 4, 9, 12, 19, 19, 19],
        cu_seqlens_q_padded=padded,
        max_seqlen_q=longest,
        total_tokens=24,
    )
    step[0]["packing_kwargs"]["cu_seqlens_kv_padded"] = padded
    first, second = cut(step)
    assert first["cu_seqlens_q"].tolist() == [0, 4, 9]
    assert first["cu_seqlens_q_padded"].tolist() == [0, 6, 12]
    assert second["cu_seqlens_q"].tolist() == [0, 3, 10, 10, 10]
    assert second["cu_seqlens_q_padded"].tolist() == [0, 3, 12, 12, 12]
    assert (int(first["max_seqlen_q"]), int(second["max_seqlen_q"])) == (6, 9)
    assert first["max_seqlen_q"].dtype == torch.int32 and first["total_tokens"] == 12


def test_without_packing_there_is_none() -> None:
    assert packings("packing_kwargs", [{"packing_kwargs": None}, {}], ("l", Layout())) is None
    assert packings("", given([0, 24]), ("l", Layout())) is None


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    (given([0, 4, 24]), "has no border at 12, where the rows of another replica of language"),
    (given([0, 12, 20]), "cu_seqlens_q ends with 20, input_ids is .4, 6.: it counts all 24 tokens"),
    (given([0, 12, 8, 24]), "cu_seqlens_kv has .12, 8.: it ascends, and begins with 0"),
    (given([0, 24], local_cp_size=2), "has local_cp_size, which cannot be cut by sample"),
    (given([0, 24], qkv_format="sbhd"), "has qkv_format='sbhd'"),
    (given([0, 24], cu_seqlens_kv=None), "has no cu_seqlens_kv: give cu_seqlens_q and"),
    (given([0, 24], cu_seqlens_q=[0, 24]), "cu_seqlens_q is list: give a tensor of integers"),
    (
        given([0, 12, 24], cu_seqlens_q_padded=torch.tensor([0, 6, 12, 24])),
        "has 3 borders in cu_seqlens_q and 4 in cu_seqlens_q_padded",
    ),
    (
        given([0, 13, 24], cu_seqlens_q_padded=torch.tensor([0, 12, 24])),
        "has a sequence that is longer in cu_seqlens_q than in cu_seqlens_q_padded",
    ),
    ([*given([0, 12, 24]), {"input_ids": torch.zeros(4, 6)}], "microbatch 1 has no packing_kwargs"),
]


@pytest.mark.parametrize(("step", "message"), REFUSED)
def test_borders_that_are_none(step: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        packings("packing_kwargs", step, ("language", Layout(dp=2)))


def test_packing_under_context_parallelism_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"language \(.*cp2.*\) cuts sequences over cp2"):
        packings("packing_kwargs", given([0, 24]), ("language", Layout(cp=2)))

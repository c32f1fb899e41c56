import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from colocc import LayoutError
from colocc.runtime import cpu
from colocc.runtime.attention import SdpaAttention
from colocc.runtime.context_parallel import join, shard
from tests.harness import run_threads

HEADS, WIDTH, BATCH = 4, 8, 2


def config(**fields: float | bool) -> TransformerConfig:
    values = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True}
    return TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, **(values | fields)
    )


def attention(
    kind: AttnMaskType, *, scale: float | None = None, **fields: float | bool
) -> SdpaAttention:
    return SdpaAttention(config(**fields), 1, kind, "self", softmax_scale=scale)


def inputs(length: int, keys: int, groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, HEADS), (keys, groups), (keys, groups)]
    return [
        torch.randn(
            n, BATCH, heads, WIDTH, dtype=torch.float64, generator=generator
        ).requires_grad_()
        for n, heads in shapes
    ]


def reference(
    tensors: list[torch.Tensor], hidden: torch.Tensor | None, scale: float = 1 / math.sqrt(WIDTH)
) -> torch.Tensor:
    """Softmax attention as it is written; ``hidden`` is True where a key must not be seen."""
    query, key, value = tensors
    repeats = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)


def check(
    module: SdpaAttention,
    tensors: list[torch.Tensor],
    mask: torch.Tensor | None,
    hidden: torch.Tensor | None,
    scale: float = 1 / math.sqrt(WIDTH),
) -> None:
    out, expected = module(*tensors, mask), reference(tensors, hidden, scale)
    weight = torch.arange(out.numel(), dtype=out.dtype).sin().view_as(out)
    found = torch.autograd.grad((out * weight).sum(), tensors)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def future(length: int, keys: int) -> torch.Tensor:
    return torch.ones(length, keys, dtype=torch.bool).triu(1 + keys - length)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "keys"), [(6, 6), (3, 6), (1, 6)])
def test_causal(length: int, keys: int, groups: int) -> None:
    tensors = inputs(length, keys, groups)
    check(attention(AttnMaskType.causal), tensors, None, future(length, keys))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("length", "keys"), [(6, 6), (3, 7), (7, 3)])
def test_full(length: int, keys: int, groups: int) -> None:
    check(attention(AttnMaskType.no_mask), inputs(length, keys, groups), None, None)


def padding(keys: int) -> torch.Tensor:
    """True at the padded tail of each sample: [b, 1, 1, t]."""
    lengths = torch.tensor([keys - 2, keys])[:, None]
    return (torch.arange(keys) >= lengths)[:, None, None, :]


@pytest.mark.parametrize("length", [3, 6])
def test_padding(length: int) -> None:
    mask = padding(6)
    check(attention(AttnMaskType.padding), inputs(length, 6, 2), mask, mask)


@pytest.mark.parametrize("length", [6])
def test_padding_and_causal(length: int) -> None:
    mask = padding(6)
    hidden = mask | future(length, 6)
    check(attention(AttnMaskType.padding_causal), inputs(length, 6, 2), mask, hidden)


def test_the_mask_matters() -> None:
    tensors = inputs(6, 6, 4)
    causal = attention(AttnMaskType.causal)(*tensors)
    full = attention(AttnMaskType.causal)(*tensors, attn_mask_type=AttnMaskType.no_mask)
    assert (causal - full).abs().max() > 0.1
    torch.testing.assert_close(full, reference(tensors, None))


def test_scale() -> None:
    check(attention(AttnMaskType.no_mask, scale=0.5), inputs(4, 4, 4), None, None, scale=0.5)


def test_dropout_in_training_only_and_from_megatron_s_states() -> None:
    from megatron.core.tensor_parallel import random

    module = attention(AttnMaskType.no_mask, attention_dropout=0.5)
    tensors = inputs(4, 4, 4)
    with cpu.ranks():
        random.initialize_rng_tracker(force_reset=True)
        random.get_cuda_rng_tracker().add(random._MODEL_PARALLEL_RNG_TRACKER_NAME, 7)
        before = torch.get_rng_state()
        first, second = module(*tensors), module(*tensors)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(first, second)
        random.get_cuda_rng_tracker().reset()
        random.get_cuda_rng_tracker().add(random._MODEL_PARALLEL_RNG_TRACKER_NAME, 7)
        assert torch.equal(module(*tensors), first)
    module.eval()
    torch.testing.assert_close(module(*tensors), reference(tensors, None))


def packing(lengths: list[int], padded: list[int] | None = None, **other: Any) -> Any:
    borders = {"": torch.tensor(lengths, dtype=torch.int32)}
    borders["_padded"] = torch.tensor(padded, dtype=torch.int32) if padded else None  # type: ignore[assignment]
    fields = {f"cu_seqlens_{s}{end}": b for s in ("q", "kv") for end, b in borders.items()}
    return SimpleNamespace(**{"qkv_format": "thd"} | fields | other)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kind", [AttnMaskType.causal, AttnMaskType.no_mask])
@pytest.mark.parametrize(
    ("lengths", "padded"),
    [
        ([0, 3, 8, 9], None),
        ([0, 9], None),
        ([0, 4, 4, 9, 9, 9], None),
        ([0, 2, 5, 6], [0, 3, 8, 9]),
        ([0, 2, 2, 5], [0, 4, 6, 9]),
    ],
)
def test_packed_sequences_see_themselves_alone(
    kind: AttnMaskType, groups: int, lengths: list[int], padded: list[int] | None
) -> None:
    module = attention(kind)
    tensors = [tensor[:, 0].detach().requires_grad_() for tensor in inputs(9, 9, groups)]
    out = module(*tensors, packed_seq_params=packing(lengths, padded))
    assert out.isfinite().all()
    starts = padded or lengths
    real = [
        (start, start + b - a)
        for start, a, b in zip(starts, lengths, lengths[1:], strict=False)
        if b > a
    ]
    alone = [module(*(t[a:b].unsqueeze(1) for t in tensors)).flatten(1) for a, b in real]
    packed = torch.cat([out[a:b] for a, b in real])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad((x * x.detach().sin()).sum(), tensors)
        for x in (packed, torch.cat(alone))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_refusals() -> None:
    module = attention(AttnMaskType.causal)
    tensors = inputs(4, 4, 4)
    with pytest.raises(NotImplementedError, match="takes no bias"):
        module(*tensors, attention_bias=torch.zeros(4, 4))
    packed = [tensor[:, 0] for tensor in tensors]
    with pytest.raises(NotImplementedError, match="without an attention_mask"):
        module(*packed, torch.zeros(4, 4) > 0, packed_seq_params=packing([0, 4]))
    with pytest.raises(NotImplementedError, match="in the format thd"):
        module(*packed, packed_seq_params=packing([0, 4], qkv_format="sbhd"))
    with pytest.raises(NotImplementedError, match="apply_query_key_layer_scaling=False"):
        attention(AttnMaskType.causal, apply_query_key_layer_scaling=True)


# ---------------------------------------------------------------- context parallelism


def attention_on_rank(
    rank: int, size: int, kind: AttnMaskType, wholes: list[torch.Tensor], zigzag: bool
) -> list[torch.Tensor]:
    """The output and the gradients of this rank's part of ``wholes``, from ``size`` ranks."""
    options = config(context_parallel_size=size)
    module = SdpaAttention(options, 1, kind, "self", pg_collection=world(), zigzag=zigzag)
    parts = [
        shard(whole.detach(), 0, rank, size, zigzag=zigzag).requires_grad_() for whole in wholes
    ]
    out = module(*parts)
    return [out.detach(), *torch.autograd.grad((out * weight(out.shape, rank)).sum(), parts)]


def world() -> Any:
    return SimpleNamespace(cp=dist.group.WORLD)


def weight(shape: torch.Size, rank: int) -> torch.Tensor:
    return (torch.arange(shape.numel(), dtype=torch.float64) + rank).sin().view(shape)


@pytest.mark.parametrize("kind", [AttnMaskType.causal, AttnMaskType.no_mask])
@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize(("size", "groups"), [(2, 1), (2, 4), (3, 2), (4, 2)])
def test_context_parallel(size: int, groups: int, zigzag: bool, kind: AttnMaskType) -> None:
    length = 4 * size
    wholes = inputs(length, length, groups)
    ranks = run_threads(
        size, partial(attention_on_rank, size=size, kind=kind, wholes=wholes, zigzag=zigzag)
    )
    hidden = future(length, length) if kind is AttnMaskType.causal else None
    expected = reference(wholes, hidden)
    shape = ranks[0][0].shape
    weights = join([weight(shape, rank) for rank in range(size)], 0, zigzag=zigzag)
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), wholes)]
    for parts, whole in zip(zip(*ranks, strict=True), wanted, strict=True):
        found = join(parts, 0, zigzag=zigzag)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_context_parallel_in_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    wholes = inputs(16, 16, 2)
    narrow = [whole.to(dtype) for whole in wholes]
    causal = AttnMaskType.causal

    def on_rank(rank: int) -> list[torch.Tensor]:
        return attention_on_rank(rank, 2, causal, narrow, zigzag=True)

    ranks = run_threads(2, on_rank)
    assert all(tensor.dtype == dtype for tensor in ranks[0])
    expected = reference(wholes, future(16, 16))
    weights = join([weight(ranks[0][0].shape, rank) for rank in range(2)], 0)
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), wholes)]
    for parts, whole in zip(zip(*ranks, strict=True), wanted, strict=True):
        error = (join(parts, 0).double() - whole).norm() / whole.norm()
        assert error < tolerance


def test_context_parallel_cross_attention_sees_all_keys() -> None:
    wholes = inputs(8, 12, 2)
    work = partial(attention_on_rank, size=2, kind=AttnMaskType.no_mask, wholes=wholes, zigzag=True)
    out = join([parts[0] for parts in run_threads(2, work)], 0)
    torch.testing.assert_close(out, reference(wholes, None), rtol=1e-12, atol=1e-12)


def test_context_parallel_refusals() -> None:
    def on_rank(_: int) -> list[str]:
        options = config(context_parallel_size=2)
        module = SdpaAttention(options, 1, AttnMaskType.causal, "self", pg_collection=world())
        found = []
        query, key, value = inputs(4, 4, 4)
        for error, arguments in (
            (NotImplementedError, (query, key, value, padding(4))),
            (LayoutError, (query[:2], key, value)),
            (LayoutError, (query[:3], key[:3], value[:3])),
        ):
            with pytest.raises(error) as caught:
                module(*arguments)
            found.append(str(caught.value))
        return found

    first, second = run_threads(2, on_rank)
    assert first == second
    assert "takes no attention_mask under context parallelism" in first[0]
    assert "causal attention on cp2 of 2 queries to 4 keys" in first[1]
    assert "6 % 4 = 2. Make it a multiple of 4" in first[2]


def test_the_cp_group_is_the_config_s_size() -> None:
    def on_rank(_: int) -> None:
        message = r"context_parallel_size is 4, and pg_collection.cp has 2 ranks"
        with pytest.raises(LayoutError, match=message):
            SdpaAttention(
                config(context_parallel_size=4),
                1,
                AttnMaskType.causal,
                "self",
                pg_collection=world(),
            )

    run_threads(2, on_rank)

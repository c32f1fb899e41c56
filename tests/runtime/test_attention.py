import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from colocc.runtime import cpu
from colocc.runtime.attention import SdpaAttention

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


def test_refusals() -> None:
    module = attention(AttnMaskType.causal)
    tensors = inputs(4, 4, 4)
    with pytest.raises(NotImplementedError, match="neither packed sequences nor a bias"):
        module(*tensors, attention_bias=torch.zeros(4, 4))
    with pytest.raises(NotImplementedError, match="neither packed sequences nor a bias"):
        module(*tensors, packed_seq_params=object())
    with pytest.raises(NotImplementedError, match="apply_query_key_layer_scaling=False"):
        attention(AttnMaskType.causal, apply_query_key_layer_scaling=True)

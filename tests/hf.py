"""Small multimodal models of Hugging Face's, from configs built here, and batches for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, LENGTH, PLACE = 64, 32, 12, 63
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in float64, its weights made from their names; torch's generator stays out."""
    model = model.double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6])
            generator = torch.Generator().manual_seed(key)
            value = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.2
            weight.copy_(value + 1 if "norm" in name and name.endswith("weight") else value)
    return model


def llava(vision: str = "clip") -> nn.Module:
    """LlavaForConditionalGeneration with CLIP or SigLIP and Llama; 4 tokens an image."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    kind = CLIPVisionConfig if vision == "clip" else SiglipVisionConfig
    config = LlavaConfig(
        vision_config=kind(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=PLACE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    model = seeded(LlavaForConditionalGeneration(config))
    # The features are taken before the last layer: what is behind gets no gradient.
    tower: Any = model.get_submodule("model.vision_tower")
    for part in (tower.encoder.layers[-1], tower.post_layernorm, getattr(tower, "head", None)):
        if part is not None:
            part.requires_grad_(False)
    return model


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tokens(seed: int, size: int, places: int, length: int = LENGTH) -> Tensor:
    """Token ids with ``places`` placeholders in each sample, at another place in each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 4, (size, length), generator=generator)
    for sample in range(size):
        start = sample % (length - places)
        ids[sample, start : start + places] = PLACE
    return ids


def llava_batch(seed: int = 0, size: int = 8, length: int = LENGTH) -> dict[str, Any]:
    ids = tokens(seed, size, 4, length)
    return {
        "input_ids": ids,
        "pixel_values": random(seed, size, 3, 8, 8),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.roll(1, 1),
    }


def placed(seed: int, rows: Sequence[int], length: int = LENGTH) -> Tensor:
    """Token ids with so many placeholders in each sample, among text."""
    ids = tokens(seed, len(rows), 0, length)
    for sample, count in enumerate(rows):
        start = sample % (length - count + 1)
        ids[sample, start : start + count] = PLACE
    return ids


def ragged_llava_batch(seed: int, images: Sequence[int]) -> dict[str, Any]:
    """A batch whose samples have so many images; without pixels where none has any."""
    ids = placed(seed, [4 * count for count in images])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.roll(1, 1),
    }
    pixels = {"pixel_values": random(seed, sum(images), 3, 8, 8)}
    return batch | pixels if sum(images) else batch


class TwoEyes(nn.Module):
    """Two vision encoders, each with a layout of its own, whose features stand side by side in each
    image token; a projector; Llama; the loss inside, as Hugging Face does it."""

    def __init__(self) -> None:
        from transformers import (
            CLIPVisionConfig,
            CLIPVisionModel,
            LlamaConfig,
            LlamaModel,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        super().__init__()
        self.near = CLIPVisionModel(CLIPVisionConfig(**VISION))
        self.far = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False))
        self.projector = nn.Linear(32, HIDDEN)
        self.language = LlamaModel(LlamaConfig(**TEXT))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(
        self, input_ids: Tensor, *, pixels: Any, labels: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            raise ValueError("pixels are [samples, channels, height, width]")
        near = self.near(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        far = self.far(pixels).last_hidden_state
        if near.shape != far.shape:
            raise ValueError("the towers disagree")
        features = self.projector(torch.cat([near, far.to(near.device, near.dtype)], dim=-1))
        embeds = self.language.embed_tokens(input_ids)
        places = (input_ids == PLACE).unsqueeze(-1).expand_as(embeds)
        embeds.masked_scatter_(places, features)
        hidden = self.language(inputs_embeds=embeds, **kwargs)[0]
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def two_eyes() -> nn.Module:
    model = seeded(TwoEyes())
    model.get_submodule("near.post_layernorm").requires_grad_(False)  # behind the features
    return model


def two_eyes_batch(seed: int = 0, size: int = 8) -> dict[str, Any]:
    given = llava_batch(seed, size)
    given["pixels"] = given.pop("pixel_values")
    return given


def qwen_vl() -> nn.Module:
    """Qwen2_5_VLForConditionalGeneration: windows in the vision tower, mRoPE; 4 tokens an image."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=PLACE,
        video_token_id=PLACE - 1,
    )
    return seeded(Qwen2_5_VLForConditionalGeneration(config))


def qwen_vl_batch(seed: int = 0, size: int = 8) -> dict[str, Any]:
    """One image of 4 by 4 patches in each sample: 16 rows of pixels, 4 tokens; positions given."""
    ids = tokens(seed, size, 4)
    positions = torch.arange(LENGTH).expand(3, size, LENGTH).clone()
    positions[1] += torch.arange(size)[:, None] % 3
    return {
        "input_ids": ids,
        "pixel_values": random(seed, size * 16, 12),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).expand(size, 3).contiguous(),
        "position_ids": positions,
        "labels": ids.roll(1, 1),
    }


def ragged_qwen_vl_batch(seed: int, grids: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
    """A batch whose samples have images of these grids of patches, 4 patches a token."""
    ids = placed(seed, [sum(h * w // 4 for h, w in images) for images in grids])
    flat = [(1, h, w) for images in grids for h, w in images]
    batch = qwen_vl_batch(seed, len(grids)) | {"input_ids": ids, "labels": ids.roll(1, 1)}
    pixels = random(seed, sum(h * w for _, h, w in flat), 12)
    if not flat:
        del batch["pixel_values"], batch["image_grid_thw"]
        return batch
    return batch | {"pixel_values": pixels, "image_grid_thw": torch.tensor(flat)}


def voxtral() -> nn.Module:
    """VoxtralForConditionalGeneration: a Whisper encoder and Llama; 4 tokens a clip."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    config = VoxtralConfig(
        audio_config={
            "vocab_size": 8,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_mel_bins": 6,
            "max_source_positions": 8,
            "head_dim": 8,
        },
        text_config={**TEXT, "model_type": "llama"},
        audio_token_id=PLACE,
    )
    return seeded(VoxtralForConditionalGeneration(config))


def voxtral_batch(seed: int = 0, size: int = 8) -> dict[str, Any]:
    ids = tokens(seed, size, 4)
    return {
        "input_ids": ids,
        "input_features": random(seed, size, 6, 16),
        "labels": ids.roll(1, 1),
    }


def qwen_audio() -> nn.Module:
    """Qwen2AudioForConditionalGeneration, which asks the ids whether they were expanded."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config = Qwen2AudioConfig(
        audio_config={
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 6,
            "max_source_positions": 8,
        },
        text_config={**TEXT, "model_type": "qwen2"},
        audio_token_index=PLACE,
    )
    return seeded(Qwen2AudioForConditionalGeneration(config))


def qwen_audio_batch(seed: int = 0, size: int = 8) -> dict[str, Any]:
    return {
        **voxtral_batch(seed, size),
        "feature_attention_mask": torch.ones(size, 16, dtype=torch.int64),
        "attention_mask": torch.ones(size, LENGTH, dtype=torch.int64),
    }

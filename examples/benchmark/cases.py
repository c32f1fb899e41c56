"""What is measured: models, cases and arms, and the arithmetic of a step.

Arms:
    megatron           megatron-core's MimoModel with its ColocatedBridgeCommunicator, pp1
    three_phase        colocc, and so for every schedule that compile() knows: lookahead=2 ...
    language_only      the language module alone, fed with embeddings that are at hand
    encoder_only=k     the encoder and the redistribution alone, k microbatches at once (all)
    homogeneous        three_phase with the encoder on the language module's layout; both on
                       another as homogeneous@tp4 dp2, another schedule as homogeneous=lookahead=1
    first_stage=n      the encoder inside the first pipeline stage, beside n of the language
                       layers (the same number as on other stages), in Megatron's schedule

``+graphs`` behind an arm of colocc's replays the encoder as CUDA graphs; with ``+first`` ranks ask
one another about the first batch alone.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from colocc import Layout


@dataclass(frozen=True)
class Tower:
    """A stack of transformer layers with an MLP four times as wide."""

    layers: int
    hidden: int
    heads: int

    @property
    def weights(self) -> int:
        """The weights in matrices."""
        return 12 * self.layers * self.hidden**2

    def flops(self, samples: int, length: int) -> int:
        """Forward and backward: 6 a weight and token, and 12 a layer, hidden unit and pair of
        tokens for attention. A causal mask is not counted as half."""
        attention = 12 * self.layers * self.hidden * length**2
        return samples * (6 * self.weights * length + attention)


@dataclass(frozen=True)
class Model:
    """A ViT whose ``patches`` fill the first places of a GPT's sequence of ``length`` tokens."""

    images: Tower
    language: Tower
    length: int = 2048
    patches: int = 1024
    features: int = 588
    vocabulary: int = 32768

    def image_flops(self, samples: int) -> int:
        """The encoder's share of a step, with the projections into and out of it."""
        ends = 6 * self.images.hidden * (self.features + self.language.hidden)
        return self.images.flops(samples, self.patches) + samples * self.patches * ends

    def language_flops(self, samples: int) -> int:
        """The language model's share of a step, with its logits."""
        logits = 6 * self.language.hidden * self.vocabulary * self.length
        return self.language.flops(samples, self.length) + samples * logits

    def layers_beside_the_encoder(self) -> int:
        """The language layers on the first of two stages, with the encoder, for equal work."""
        layer = self.language.flops(1, self.length) / self.language.layers
        half = (self.image_flops(1) + self.language_flops(1)) / 2
        return max(1, round((half - self.image_flops(1)) / layer))


MODELS = {
    "0.3B + 2.7B": Model(Tower(24, 1024, 16), Tower(32, 2560, 20)),
    "2.0B + 1.3B": Model(Tower(40, 2048, 16), Tower(24, 2048, 16)),
    "1.0B + 6.7B": Model(Tower(24, 1920, 20), Tower(32, 4096, 32)),
    "0.3B + 2.7B, 32k": Model(
        Tower(24, 1024, 16), Tower(32, 2560, 20), length=32768, patches=16384
    ),
    "1.0B + 6.7B, 32k": Model(
        Tower(24, 1920, 20), Tower(32, 4096, 32), length=32768, patches=16384
    ),
    "tiny": Model(
        Tower(2, 32, 4), Tower(4, 32, 4), length=24, patches=8, features=12, vocabulary=96
    ),
    # Of a size that the layouts of eight ranks divide.
    "toy": Model(
        Tower(2, 64, 8), Tower(8, 64, 8), length=64, patches=32, features=12, vocabulary=96
    ),
}


@dataclass(frozen=True)
class Case:
    """A model on a pair of layouts, with ``batch`` samples a step in ``microbatches``."""

    model: str
    images: str
    language: str
    batch: int
    microbatches: int
    arms: tuple[str, ...]

    @property
    def layouts(self) -> dict[str, Layout]:
        return {"images": Layout.parse(self.images), "language": Layout.parse(self.language)}

    @property
    def sizes(self) -> Model:
        return MODELS[self.model]

    def homogeneous(self, arm: str) -> "Case":
        """The same with both modules on the layout that ``arm`` names, or the language module's."""
        _, _, layout = arm.partition("=")[0].partition("@")
        return replace(self, images=layout or self.language, language=layout or self.language)

    def flops(self, arm: str) -> int:
        """The floating point operations of a step that ``arm`` must run, on all ranks together."""
        images, language = (
            self.sizes.image_flops(self.batch),
            self.sizes.language_flops(self.batch),
        )
        if arm == "language_only":
            return language
        return images if arm.startswith("encoder_only") else images + language

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.images} -> {self.language}, {self.batch} in {self.microbatches}"
        )

    def file_of(self, arm: str) -> str:
        """The name of a trace of ``arm``."""
        return re.sub(r"[^\w.]+", "_", f"{self}_{arm}") + ".json"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Case":
        return cls(**(found | {"arms": tuple(found["arms"])}))


def family(arm: str) -> str:
    """Arms of one family share a model; two families may not fit on a GPU at once."""
    return arm if arm.startswith(("first_stage", "homogeneous")) else "shared"


ALONE = ("language_only", "encoder_only")
AHEAD = ("lookahead=1", "lookahead=2", "three_phase")
GRAPHS = ("lookahead=1+graphs", "three_phase+graphs")
PIPELINED = ("three_phase", "filled", *ALONE)
APART = ("megatron", "lookahead=1", "three_phase", *ALONE)
COLOCATED = (*APART, "homogeneous")
# A rank has no room for all samples of these, which each encodes where layouts are equal.
WHOLE = ("three_phase", *ALONE, "homogeneous=lookahead=1")
FILLED = (
    *("three_phase", "three_phase+graphs", "filled=1+graphs", "filled+graphs"),
    *(*ALONE, "encoder_only+graphs"),
)
SMALL, LARGE = "0.3B + 2.7B", "2.0B + 1.3B"
BIG, LONG = "1.0B + 6.7B", "1.0B + 6.7B, 32k"
LONG_SMALL = "0.3B + 2.7B, 32k"


def _pp1(model: str, images: str, language: str, batch: int = 16) -> Case:
    """With graphs where the encoder has no collectives inside."""
    graphs = GRAPHS if Layout.parse(images).tp == 1 else ()
    return Case(model, images, language, batch, 4, ("megatron", *AHEAD, *graphs, *ALONE))


def _pp2(model: str, batch: int, microbatches: int) -> Case:
    """With filled in every number of portions, and as it chooses; and with the encoder inside the
    first stage beside half of the layers, and balanced."""
    sizes = MODELS[model]
    counts = (sizes.language.layers // 2, sizes.layers_beside_the_encoder())
    inside = tuple(f"first_stage={count}" for count in counts)
    portions = tuple(f"filled={count}+graphs" for count in range(1, 1 + batch // microbatches))
    filled = ("three_phase+graphs", "filled=1", *portions, "filled+graphs")
    arms = ("three_phase", *filled, *ALONE, "encoder_only+graphs", *inside)
    return Case(model, "tp1 dp2", "tp1 pp2", batch, microbatches, arms)


def _held(model: str, batch: int, microbatches: int, *arms: str) -> Case:
    return Case(model, "tp1 dp2", "tp1 pp2", batch, microbatches, arms)


SETS: dict[str, tuple[Case, ...]] = {
    "tiny": (
        Case("tiny", "tp1 dp2", "tp2", 8, 4, ("megatron", *AHEAD, *ALONE)),
        Case("tiny", "tp1 dp2", "tp1 pp2", 8, 4, (*PIPELINED, "first_stage=1")),
        Case("tiny", "tp1 dp2", "cp2 zigzag", 8, 4, ("three_phase", *ALONE, "homogeneous")),
    ),
    "pp1": (
        _pp1(LARGE, "tp1 dp2", "tp2", batch=8),
        _pp1(LARGE, "tp1 dp2", "tp2"),
        _pp1(LARGE, "tp2", "tp2"),
        _pp1(SMALL, "tp1 dp2", "tp2"),
        _pp1(SMALL, "tp2", "tp2"),
        _pp1(SMALL, "tp2", "tp1 dp2"),
        _pp1(SMALL, "tp1 dp2", "tp1 dp2"),
    ),
    "pp2": (_pp2(LARGE, 8, 4), _pp2(SMALL, 8, 4), _pp2(LARGE, 8, 8), _pp2(SMALL, 16, 8)),
    "cp2": (
        Case(LARGE, "tp1 dp2", "cp2 zigzag", 8, 4, ("three_phase", *ALONE, "homogeneous")),
        Case(SMALL, "tp1 dp2", "cp2 zigzag", 16, 4, ("three_phase", *ALONE, "homogeneous")),
    ),
    "four": (
        Case(BIG, "tp2 dp2", "tp4", 16, 4, COLOCATED),
        Case(BIG, "tp1 dp4", "tp4", 16, 4, ("three_phase+graphs", *COLOCATED)),
        Case(BIG, "tp1 dp4", "tp2 pp2", 16, 8, FILLED),
        Case(BIG, "tp1 dp4", "tp1 pp4", 16, 8, FILLED),
        Case(LONG_SMALL, "tp1 dp4", "tp2 cp2 zigzag", 4, 4, WHOLE),
        Case(LONG_SMALL, "tp1 dp4", "cp4 zigzag", 4, 4, WHOLE),
    ),
    "eight": (
        Case(BIG, "tp2 dp4", "tp4 dp2", 32, 4, COLOCATED),
        # The 20 heads of this encoder are not cut in 8.
        Case(BIG, "tp1 dp8", "tp8", 32, 4, (*APART, "three_phase+graphs", "homogeneous@tp4 dp2")),
        Case(BIG, "tp1 dp8", "tp2 pp2 dp2", 32, 8, FILLED),
        Case(BIG, "tp1 dp8", "tp2 pp4", 32, 16, FILLED),
        Case(BIG, "tp1 dp8", "tp1 pp8", 32, 16, FILLED),
        Case(LONG, "tp1 dp8", "tp2 cp4 zigzag", 8, 8, WHOLE),
        Case(LONG, "tp1 dp8", "cp8 zigzag", 8, 8, WHOLE),
    ),
    # Where three_phase ran out of memory.
    "held": (
        _held(LARGE, 16, 4, "filled=4,3"),
        _held(LARGE, 16, 8, "filled"),
        _held(SMALL, 16, 4, "filled"),
    ),
    "memory": tuple(
        Case(LARGE, "tp1 dp2", language, 2 * count, count, arms if count <= 8 else arms[1:])
        for language, arms in (
            ("tp1 pp2", ("three_phase", "filled")),
            ("tp2", ("three_phase", "megatron", "lookahead=1")),
        )
        for count in (4, 8, 16, 32)
    ),
}

"""The digits task: 1,797 real scans, the prompt around them, and the words the model must write.

<bos> <image> x 16 the digit is s e v e n <eos>
                                ------------- the loss falls on the name alone
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAD, BOS, EOS, IMAGE = range(4)
WORDS = ("<pad>", "<bos>", "<eos>", "<image>", "the", "digit", "is")
VOCABULARY = WORDS + tuple(sorted(set("".join(NAMES))))
VOCABULARY_SIZE = 32  # the next multiple of 8: every tp up to 8 divides it

SIDE, PATCH = 8, 2
PATCHES = (SIDE // PATCH) ** 2
MEAN, SPREAD = 4.88, 6.02  # of all pixels, which run from 0 to 16
PROMPT = (BOS,) + (IMAGE,) * PATCHES + tuple(VOCABULARY.index(w) for w in ("the", "digit", "is"))
NAME_LENGTH = max(map(len, NAMES)) + 1  # with <eos>
LENGTH = len(PROMPT) + NAME_LENGTH - 1  # the last token is only ever a label

Batch = dict[str, Any]


@dataclass(frozen=True)
class Scans:
    """Scans and what they show.

    Shapes: pixels [n, 8, 8], standardised; digits [n].
    """

    pixels: torch.Tensor
    digits: torch.Tensor

    def __len__(self) -> int:
        return len(self.digits)


def load(held_out: int = 360) -> tuple[Scans, Scans]:
    """The training scans and the held-out scans, stratified by digit, the same in every run."""
    data = load_digits()
    pixels = (np.asarray(data.images, dtype=np.float32) - MEAN) / SPREAD
    digits = np.asarray(data.target, dtype=np.int64)
    parts = train_test_split(
        pixels, digits, test_size=held_out, stratify=digits, random_state=0, shuffle=True
    )
    train_pixels, test_pixels, train_digits, test_digits = map(torch.from_numpy, parts)
    return Scans(train_pixels, train_digits), Scans(test_pixels, test_digits)


def spell(digit: int) -> list[int]:
    """The tokens of a digit's name, <eos> last."""
    return [*(VOCABULARY.index(letter) for letter in NAMES[digit]), EOS]


def read(tokens: list[int]) -> str:
    """The text that tokens spell, up to the first <eos>."""
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    return "".join(VOCABULARY[t] if t < len(VOCABULARY) else "?" for t in tokens[:end])


def prompt(pixels: torch.Tensor, written: torch.Tensor) -> Batch:
    """MimoModel's forward arguments, without labels, for scans whose first letters are written.

    Shapes: pixels [b, 8, 8], written [b, letters so far]; input_ids [b, LENGTH].
    """
    size, letters = len(pixels), written.shape[1]
    input_ids = torch.full((size, LENGTH), PAD)
    input_ids[:, : len(PROMPT)] = torch.tensor(PROMPT)
    input_ids[:, len(PROMPT) : len(PROMPT) + letters] = written
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(LENGTH).expand(size, LENGTH).contiguous(),
        "modality_inputs": {"images": {"vit": {"pixel_values": pixels}}},
    }


def lesson(scans: Scans) -> Batch:
    """MimoModel's forward arguments for training: the prompt, the name, and a mask on the name."""
    names = torch.full((len(scans), NAME_LENGTH), PAD)
    for row, digit in enumerate(scans.digits.tolist()):
        tokens = spell(digit)
        names[row, : len(tokens)] = torch.tensor(tokens)
    batch = prompt(scans.pixels, names[:, :-1])
    labels = torch.full((len(scans), LENGTH), PAD)
    labels[:, len(PROMPT) - 1 :] = names
    return {**batch, "labels": labels, "loss_mask": (labels != PAD).float()}


class Lessons:
    """A training step's global microbatches, drawn epoch by epoch; a function of seed and step."""

    def __init__(self, scans: Scans, global_batch: int, microbatches: int, seed: int) -> None:
        self.scans, self.seed = scans, seed
        self.global_batch, self.microbatches = global_batch, microbatches
        self.per_epoch = len(scans) // global_batch

    def step(self, step: int) -> list[Batch]:
        """The microbatches of one step, each a dict of forward arguments."""
        epoch, turn = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.scans), generator=self._generator(epoch))
        ids = order[turn * self.global_batch : (turn + 1) * self.global_batch]
        pixels = disturb(self.scans.pixels[ids], self._generator(1_000_000 + step))
        digits = self.scans.digits[ids].chunk(self.microbatches)
        parts = zip(pixels.chunk(self.microbatches), digits, strict=True)
        return [lesson(Scans(*part)) for part in parts]

    def _generator(self, turn: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 10_000_019 + turn)


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The scans with noise, three in ten moved by at most one pixel up or down and left or
    right."""
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-MEAN / SPREAD)
    moved = (torch.rand(len(pixels), generator=generator) < 0.3).long()
    down, right = 1 + moved * torch.randint(-1, 2, (2, len(pixels)), generator=generator)
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    scan = torch.arange(len(pixels))[:, None, None]
    shifted = padded[scan, down[:, None, None] + rows, right[:, None, None] + columns]
    return shifted + 0.2 * torch.randn(shifted.shape, generator=generator)

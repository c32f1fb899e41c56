"""Covers examples/digits_model.py: any layout starts from the weights of one process."""

from functools import partial

import pytest
import torch

import colocc
from colocc import Layout
from colocc.runtime import cpu
from colocc.testing import full_weights
from examples import digits_data
from examples.digits_model import Sizes, build_model
from tests.harness import ProcessPool

Weights = dict[str, torch.Tensor]
SIZES = Sizes(hidden=32, ffn=32, language_layers=4)


def weights_on_rank(_: int, layouts: dict[str, Layout], seed: int = 0) -> Weights:
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = build_model(groups, SIZES, seed=seed)
        modules = {
            "images": model.modality_submodules["images"],
            "language": model.language_model,
        }
        return full_weights(modules, groups)


def merged(ranks: list[Weights]) -> Weights:
    """All stages' weights; ranks that hold the same one must agree."""
    found: Weights = {}
    for weights in ranks:
        for name, weight in weights.items():
            assert torch.equal(found.setdefault(name, weight), weight), name
    return found


ONE = {"images": Layout(), "language": Layout()}


@pytest.mark.parametrize(
    ("images", "language"),
    [("tp1 dp8", "tp2 pp2 dp2"), ("tp4 dp2", "tp1 pp4 dp2"), ("tp8", "tp8")],
)
def test_every_layout_starts_from_the_same_weights(
    processes: ProcessPool, images: str, language: str
) -> None:
    layouts = {"images": Layout.parse(images), "language": Layout.parse(language)}
    alone = processes.run(1, partial(weights_on_rank, layouts=ONE))[0]
    spread = merged(processes.run(8, partial(weights_on_rank, layouts=layouts)))
    assert spread.keys() == alone.keys()
    different = [name for name in alone if not torch.equal(alone[name], spread[name])]
    assert not different


def test_a_seed_changes_every_matrix_and_no_vector(processes: ProcessPool) -> None:
    first = processes.run(1, partial(weights_on_rank, layouts=ONE))[0]
    second = processes.run(1, partial(weights_on_rank, layouts=ONE, seed=1))[0]
    for name, weight in first.items():
        assert torch.equal(weight, second[name]) == (weight.dim() < 2), name


def embeddings_on_rank(_: int, pixels: torch.Tensor) -> torch.Tensor:
    with cpu.ranks(), colocc.process_groups(ONE) as groups:
        encoder = build_model(groups, SIZES).modality_submodules["images"]
        out: torch.Tensor = encoder(encoder_inputs={"vit": {"pixel_values": pixels}})
        return out.detach()


def test_embeddings_are_sample_major_and_every_patch_sees_every_other(
    processes: ProcessPool,
) -> None:
    pixels = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = processes.run(1, partial(embeddings_on_rank, pixels=pixels))[0]
    assert whole.shape == (3 * digits_data.PATCHES, SIZES.hidden)
    pixels[1, -1, -1] += 1
    changed = processes.run(1, partial(embeddings_on_rank, pixels=pixels))[0]
    rows = (whole != changed).any(dim=1).view(3, digits_data.PATCHES)
    assert rows[1].all()
    assert not rows[[0, 2]].any()

"""Covers examples/benchmark/cases.py: sizes, floating point operations, and the cases."""

from dataclasses import replace

import pytest

from examples.benchmark.cases import MODELS, SETS, Case, Tower

CASE = Case("2.0B + 1.3B", "tp1 dp2", "tp2", 16, 4, ("megatron", "language_only", "encoder_only"))


@pytest.mark.parametrize(
    ("name", "images", "language"),
    [
        ("0.3B + 2.7B", 0.3e9, 2.6e9),
        ("2.0B + 1.3B", 2.0e9, 1.25e9),
        ("1.0B + 6.7B", 1.06e9, 6.6e9),
    ],
)
def test_models_have_the_size_in_their_name(name: str, images: float, language: float) -> None:
    model = MODELS[name]
    assert model.images.weights == pytest.approx(images, rel=0.05)
    assert model.language.weights == pytest.approx(language, rel=0.05)


def test_flops_of_a_tower_by_hand() -> None:
    # 12 h^2 weights a layer: 12 * 4; two tokens: 6 * 48 * 2 + 12 * 2 * 2^2.
    assert Tower(layers=1, hidden=2, heads=1).flops(samples=1, length=2) == 576 + 96
    assert Tower(layers=3, hidden=2, heads=1).flops(samples=5, length=2) == 15 * 672


def test_flops_of_the_parts_add_up() -> None:
    parts = CASE.flops("language_only") + CASE.flops("encoder_only=2")
    assert CASE.flops("megatron") == CASE.flops("lookahead=2") == parts


RANKS = {"four": 4, "eight": 8}


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(RANKS.get(name, 2), case) for name, cases in SETS.items() for case in cases],
    ids=str,
)
def test_cases_fit_their_ranks_and_survive_json(ranks: int, case: Case) -> None:
    assert Case.from_json(case.to_json()) == case
    everywhere = [case.homogeneous(arm) for arm in case.arms if arm.startswith("homogeneous")]
    for one in (case, *everywhere):
        for name, layout in one.layouts.items():
            assert layout.size == ranks
            assert getattr(one.sizes, name).heads % layout.tp == 0
    assert case.batch % case.microbatches == 0
    megatron = "megatron" in case.arms
    assert not (megatron and case.layouts["language"].pp > 1)


@pytest.mark.parametrize("case", SETS["four"] + SETS["eight"], ids=str)
def test_a_toy_fits_the_layouts_of_eight_ranks(case: Case) -> None:
    for one in (case, *(case.homogeneous(arm) for arm in case.arms if "homogeneous" in arm)):
        toy = replace(one, model="toy")
        for name, layout in toy.layouts.items():
            tower = getattr(toy.sizes, name)
            assert tower.heads % layout.tp == 0
            assert name == "images" or tower.layers % layout.pp == 0
            assert toy.sizes.length % (2 * layout.cp) == 0


@pytest.mark.parametrize("name", ["0.3B + 2.7B", "2.0B + 1.3B"])
def test_layers_beside_the_encoder_balance_two_stages(name: str) -> None:
    model = MODELS[name]
    count = model.layers_beside_the_encoder()
    layer = model.language.flops(1, model.length) / model.language.layers
    first = model.image_flops(1) + count * layer
    last = model.language_flops(1) - count * layer
    assert abs(first - last) <= layer


def test_homogeneous_layouts() -> None:
    case = Case("tiny", "tp1 dp8", "tp8", 8, 4, ())
    found = [
        case.homogeneous(arm)
        for arm in ("homogeneous", "homogeneous=lookahead=1", "homogeneous@tp4 dp2=lookahead=1")
    ]
    assert [(one.images, one.language) for one in found] == [
        ("tp8", "tp8"),
        ("tp8", "tp8"),
        ("tp4 dp2", "tp4 dp2"),
    ]

"""Covers passes/fillable.py: which layouts may fill bubbles, against every group of ranks."""

import itertools

import pytest

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.fillable import slots_by_stage


def test_slots_of_two_stages() -> None:
    encoder, language = Layout(tp=1, dp=8), Layout(tp=2, pp=2, dp=2)
    assert slots_by_stage(("images", encoder), ("language", language)) == (
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    )
    other = Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp")
    assert slots_by_stage(("images", encoder), ("language", other)) == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_a_group_on_two_stages_is_refused() -> None:
    encoder = ("images", Layout(tp=4, dp=2))
    fits = ("language", Layout(tp=2, pp=2, dp=2))
    torn = ("language", Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp"))
    assert slots_by_stage(encoder, fits) == ((0,), (1,))
    with pytest.raises(LayoutError) as error:
        slots_by_stage(encoder, torn)
    text = str(error.value)
    assert "the ranks [0, 1, 2, 3]" in text and "images (tp4 dp2)" in text
    assert "on the stages [0, 1] of language (tp2 pp2 dp2" in text
    assert "schedule='three_phase'" in text and "the 4 ranks of a stage" in text


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-pp-dp", "dp-tp-pp"])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_refused_exactly_if_a_group_is_torn(order: str, pp: int) -> None:
    for tp, encoder_tp in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        if 8 % (tp * pp):
            continue
        language = Layout(tp=tp, pp=pp, dp=8 // tp // pp, order=order)
        encoder = Layout(tp=encoder_tp, dp=8 // encoder_tp)
        stages = [
            {r for r in range(8) if language.coordinates("pp")[r] == stage} for stage in range(pp)
        ]
        whole = all(any(set(g) <= s for s in stages) for g in encoder.groups("tp"))
        try:
            found = slots_by_stage(("images", encoder), ("language", language))
        except LayoutError:
            assert not whole
        else:
            assert whole
            assert sorted(itertools.chain(*found)) == list(range(encoder.dp))

"""Covers runtime/costs.py."""

from dataclasses import replace

import pytest

from colocc.passes.timeline import Task
from colocc.runtime.costs import LAUNCHED, Work, costs_of

# 24 layers of 2048 on two stages, and the logits of 32,768 words; 40 layers of 2048.
STAGES = [Work(0.604e9, 48), Work(0.671e9, 49)]
ENCODER = Work(2.01e9, 160)
PER_SECOND = 250e12


def test_what_was_measured_on_two_gpus() -> None:
    """Two samples of 2048 tokens and 1024 patches, in seconds."""
    costs = costs_of(STAGES, ENCODER, tokens=4096, rows=2048, captured=True, learns=True)
    whole = (1, 1)
    for task, stage, seconds in (
        (Task("forward", 0), 0, 11.0e-3),
        (Task("forward", 0), 1, 13.3e-3),
        (Task("backward", 0), 1, 26.7e-3),
        (Task("encode", 0), 0, 17.0e-3),
        (Task("encode_backward", 0), 1, 35.0e-3),
    ):
        foreseen = costs.seconds(task, stage, whole) / PER_SECOND
        assert foreseen == pytest.approx(seconds, rel=0.17)
    # What decides is the encoder beside the language module.
    ratio = costs.seconds(Task("encode", 0), 0, whole) / costs.forward
    assert ratio == pytest.approx(17.0 / 13.3, rel=0.1)


def test_portions_add_their_kernels() -> None:
    costs = costs_of(STAGES, ENCODER, tokens=4096, rows=2048, captured=True, learns=True)
    one, two = (costs.seconds(Task("encode", 0), 0, (count,)) for count in (1, 2))
    assert one < 2 * two < 1.2 * one
    assert 2 * two - one == pytest.approx(costs.portion)


def test_the_host_launches_what_is_not_captured() -> None:
    captured, launched = (
        costs_of(STAGES, ENCODER, tokens=4096, rows=2048, captured=how, learns=True)
        for how in (True, False)
    )
    assert launched.encode == LAUNCHED * captured.encode
    # 14 us on the GPU and 55 us of the host for each product.
    for costs, seconds in ((captured, 14e-6), (launched, 55e-6)):
        assert costs.portion / PER_SECOND == pytest.approx(ENCODER.products * seconds, rel=0.03)
    assert launched.forward == captured.forward


def test_a_frozen_encoder_has_no_backward() -> None:
    learns, frozen = (
        costs_of(STAGES, ENCODER, tokens=4096, rows=2048, captured=True, learns=how)
        for how in (True, False)
    )
    assert learns.encode_backward == 2 * learns.encode
    assert frozen == replace(learns, encode_backward=0.0, portion_backward=0.0)


def test_a_language_module_without_products() -> None:
    costs = costs_of([Work(0, 0)] * 2, ENCODER, tokens=8, rows=8, captured=False, learns=True)
    assert costs.loads == (0.0, 0.0)

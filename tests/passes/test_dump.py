"""The dump is what a person reads: whole pages are pinned."""

from __future__ import annotations

import pytest
from expecttest import assert_expected_inline

from colocc.layout import Layout
from colocc.passes.dump import dot, human, page, ranks
from tests.passes.kit import pair_graph, trio_graph


def test_two_encoders_and_a_pipeline() -> None:
    assert_expected_inline(page(trio_graph()), """""")


def test_no_pipeline() -> None:
    assert_expected_inline(page(pair_graph()), """""")


def test_ranks() -> None:
    assert_expected_inline(ranks(trio_graph(), "vision_language"), """""")


def test_dot() -> None:
    assert_expected_inline(dot(trio_graph()), """""")


@pytest.mark.parametrize("pp", [1, 2])
def test_a_page_is_ascii_narrow_and_the_same_every_time(pp: int) -> None:
    layout = Layout(tp=4 // pp, pp=pp, dp=2)
    text = page(trio_graph(language=layout))
    assert text == page(trio_graph(language=layout))
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 108
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert text.splitlines()[-1].startswith("moved   fwd ")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (9 << 20, "9.00 MiB"),
        (3 << 50, "3072.00 TiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human(count) == text

"""Covers colocc/cli_explain.py."""

import json
from typing import Any

import pytest
from expecttest import assert_expected_inline

from colocc.cli import main
from colocc.cli_explain import read_layouts, typed
from colocc.errors import LayoutError
from colocc.layout import Layout


def explained(capsys: pytest.CaptureFixture[str], *words: str, tensor: str) -> str:
    layouts = [word for layout in words for word in ("--layout", layout)]
    assert main(["explain", *layouts, "--tensor", tensor]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: str, tensor: str) -> Any:
    layouts = [word for layout in words for word in ("--layout", layout)]
    assert main(["explain", "--json", *layouts, "--tensor", tensor]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = explained(
        capsys, "images=tp2,dp4", "language=tp2,cp2,dp2,sp,zigzag", tensor="bf16[8,576,4096]"
    )
    assert_expected_inline(
        page,
        """\
graph explain    world 8    after 4/6 redistribute

layouts
  images     tp2 dp4                 tp = r%2   dp = r//2
  language   tp2 cp2 dp2 sp zigzag   tp = r%2   cp = r//2%2   dp = r//4

  %images            bf16[8@dp,576,4096]         images     [2,576,4096]   input(images)
+ %images_language   bf16[8@dp,576@tp@cp,4096]   language   [4,144,4096]   redistribute(%images)
+   fan_in x2   images tp2 dp4 -> language tp2 cp2 dp2 sp zigzag   where language.dp = images.dp//2
+   where language holds part r%2 of 2 of chunks c and 3-c of 4, c = r//2%2
+   fwd   send_recv(dims=0,1)    2.25 MiB   [0,2] [1,3] [4,6] [5,7]
+   bwd   all_to_all(dims=0,1)   6.75 MiB   [0,1,2,3] [4,5,6,7]
  return (%images_language)

moved   fwd 2.25 MiB, bwd 6.75 MiB per receiving rank for a batch of 8, 2 collectives per step
bound   fwd 2.25 MiB, bwd 6.75 MiB
""",
    )


def test_bytes_by_rank_of_a_cut_reader(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "images=tp2,dp4", "language=tp8,sp", tensor="bf16[4,8,16]")
    (edge,) = found["edges"]
    value = 4 * 8 * 16 * 2
    # A rank needs an eighth of all samples and has a quarter of them; backward it needs the quarter
    # and has an eighth.
    assert edge["forward"]["received_bytes"] == [value * 3 // 32] * 8
    assert edge["backward"]["received_bytes"] == [value * 7 // 32] * 8
    for direction in ("forward", "backward"):
        assert edge[direction]["received_bytes"] == edge[direction]["bound_bytes"]
    assert [step["kind"] for step in edge["forward"]["steps"]] == ["all_to_all"]
    assert edge["forward"]["steps"][0]["groups"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert edge["closed_forms"] == ["language.dp = 0", "language holds chunk r of 8"]


def test_a_pipeline_s_first_stage_alone_receives(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "images=dp8", "language=tp2,pp2,dp2", tensor="bf16[8,4]")
    (edge,) = found["edges"]
    assert edge["forward"]["received_bytes"] == [24] * 4 + [0] * 4


def test_every_encoder_has_an_edge(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("language=tp3,dp2", "images=tp2,dp3", "audio=dp6")
    found = as_json(capsys, *words, tensor="f32[12,4]")
    assert [(edge["src"], edge["dst"]) for edge in found["edges"]] == [
        ("images", "language"),
        ("audio", "language"),
    ]
    assert (found["edges"][0]["kind"], found["edges"][0]["ratio"]) == ("fan_in", "3/2")


def test_types_are_cut_by_their_layout() -> None:
    layout = Layout.parse("tp2,cp2,dp2,sp,zigzag")
    assert str(typed("bf16[8,576,4096]", "language", layout)) == "bf16[8@dp,576@tp@cp,4096]"
    assert str(typed("bf16[8*576,4096]", "language", layout)) == "bf16[8*576@tp@cp@dp,4096]"


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ("bf16[8]", "has 1 dim, language"),
        ("bf16[8,574,16]", r"574 % 4 = 2. Make it a multiple of 4"),
        ("bf16[B,576]", "has no size for every dim"),
        ("bf16[8,576", "is not a type"),
        ("__import__('os')", "is not a type"),
    ],
)
def test_tensors_that_cannot_be_cut(tensor: str, problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        typed(tensor, "language", Layout.parse("tp2,cp2,dp2,sp,zigzag"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["images"], "is no layout"),
        (["a=dp2", "a=dp2"], "a has two layouts"),
        (["a=dp2"], "an edge has two ends"),
        (["a b=dp2", "c=dp2"], "is no layout"),
        (["a=dp0", "b=dp2"], "gives dp no positive size"),
    ],
)
def test_words_that_are_no_layouts(words: list[str], problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        read_layouts(words)

"""The dump is what a person reads: whole pages are pinned."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from colocc.layout import Layout
from colocc.passes.dump import dot, human, page, ranks
from colocc.passes.graph import Graph
from tests.passes.kit import PAIR_BATCH, Pair, graph_of, pair_graph, trio_graph


def test_two_encoders_and_a_pipeline() -> None:
    assert_expected_inline(
        page(trio_graph()),
        """\
graph Trio    world 8    after 5/6 phases

layouts
  vision     tp2 dp4       tp = r%2   dp = r//2
  audio      tp8 dp1       tp = r
  language   tp2 pp2 dp2   tp = r%2   pp = r//4   dp = r//2%2

phase 1  encode           all ranks, all samples of the step at once
  %images            f32[8@dp,5,16]   vision         [2,5,16]   input(images)
  %clips             f32[8@dp,5,4]    audio          [8,5,4]    input(clips)
  %vision            f32[8@dp,5,8]    vision         [2,5,8]    vision(%images)
+ %vision_language   f32[8@dp,5,8]    language pp0   [4,5,8]    redistribute(%vision)
+   fan_in x2   vision tp2 dp4 -> language tp2 pp2 dp2   where language.dp = vision.dp%2
+   fwd   send_recv(dim=0, to pp0)     320 B   [0,4] [1,5] [2,6] [3,7]
+   bwd   send_recv(dim=0, from pp0)   320 B   [0,4] [1,5] [2,6] [3,7]
+   bwd   scale x2                             vision mean, language mean over dp
+   at    passes/kit.py:59 seen = self.vision(images)
  %audio             f32[8@dp,5,8]    audio          [8,5,8]    audio(%clips)
+ %audio_language    f32[8@dp,5,8]    language pp0   [4,5,8]    redistribute(%audio)
+   fan_out x2   audio tp8 dp1 -> language tp2 pp2 dp2   where audio.dp = 0
+   fwd   narrow(dim=0)                 0 B        local
+   bwd   all_to_all(dim=0, from pp0)   1.25 KiB   [0,2,4,6] [1,3,5,7]
+   bwd   scale x1/2                               audio mean, language mean over dp
+   at    passes/kit.py:60 heard = self.audio(clips)

phase 2  language         1f1b over 2 stages, by microbatch
  %mask        bool[8@dp,5]     language       [4,5]     input(mask)
  %unsqueeze   bool[8@dp,5,1]   language pp0   [4,5,1]   unsqueeze(%mask, -1)
  %where       f32[8@dp,5,8]    language pp0   [4,5,8]   where(%unsqueeze, %vision_language, %aud...
  %language    f32[8@dp,5,8]    language       [4,5,8]   language(%where)
  return %language

phase 3  encode backward  audio and vision, all samples at once; then finalise once

guard   images.shape[2] == 16   vision takes no other
guard   clips.shape[2] == 4     audio takes no other

moved   fwd 320 B, bwd 1.56 KiB per receiving rank for a batch of 8, 3 collectives per step
bound   fwd 320 B, bwd 1.56 KiB
""",
    )


def test_no_pipeline() -> None:
    assert_expected_inline(
        page(pair_graph()),
        """\
graph Pair    world 8    after 5/6 phases

layouts
  vision     tp2 dp4   tp = r%2   dp = r//2
  language   tp4 dp2   tp = r%4   dp = r//4

phase 1  encode           all ranks, all samples of the step at once
  %images            f32[8@dp,5,16]   vision     [2,5,16]   input(images)
  %vision            f32[8@dp,5,8]    vision     [2,5,8]    vision(%images)
+ %vision_language   f32[8@dp,5,8]    language   [4,5,8]    redistribute(%vision)
+   fan_in x2   vision tp2 dp4 -> language tp4 dp2   where language.dp = vision.dp//2
+   fwd   all_gather(dim=0)   320 B   [0,2] [1,3] [4,6] [5,7]
+   bwd   narrow(dim=0)       0 B     local
+   bwd   scale x2                    vision mean, language mean over dp
+   at    passes/kit.py:36 x = self.vision(images)

phase 2  language         by microbatch
  %language   f32[8@dp,5,8]   language   [4,5,8]   language(%vision_language)
  return %language

phase 3  encode backward  vision, all samples at once; then finalise once

guard   images.shape[2] == 16   vision takes no other

moved   fwd 320 B, bwd 0 B per receiving rank for a batch of 8, 1 collective per step
bound   fwd 320 B, bwd 0 B
""",
    )


def cut_graph() -> Graph:
    """dp 3:2 on 12 ranks, and a sequence that the reader cuts over cp and tp."""
    layouts = {
        "vision": Layout(tp=4, dp=3),
        "language": Layout(tp=3, cp=2, dp=2, sp=True, zigzag=True),
    }
    batch = {"images": torch.zeros(12, 24, 16)}
    return graph_of(Pair(), layouts, batch, sequence_dims={"vision": 1})


def test_a_cut_sequence_and_dp_that_do_not_divide() -> None:
    assert_expected_inline(
        page(cut_graph()),
        """\
graph Pair    world 12    after 5/6 phases

layouts
  vision     tp4 dp3                 tp = r%4   dp = r//4
  language   tp3 cp2 dp2 sp zigzag   tp = r%3   cp = r//3%2   dp = r//6

phase 1  encode           all ranks, all samples of the step at once
  %images            f32[12@dp,24,16]        vision     [4,24,16]   input(images)
  %vision            f32[12@dp,24,8]         vision     [4,24,8]    vision(%images)
+ %vision_language   f32[12@dp,24@tp@cp,8]   language   [6,4,8]     redistribute(%vision)
+   fan_in 3:2   vision tp4 dp3 -> language tp3 cp2 dp2 sp zigzag
+   where vision.dp = r//4, language.dp = r//6
+   where language holds part r%3 of 3 of chunks c and 3-c of 4, c = r//3%2
+   fwd   all_to_all(dims=0,1)   512 B      [0,4,8] [1,5,9] [2,6,10] [3,7,11]
+   bwd   all_to_all(dims=0,1)   2.75 KiB   [0,1,2,3,4,5,6,7,8,9,10,11]
+   bwd   scale x3/4                        vision mean, language mean over dp and cp
+   at    passes/kit.py:36 x = self.vision(images)

phase 2  language         by microbatch
  %language   f32[12@dp,24,8]   language   [6,24,8]   language(%vision_language)
  return %language

phase 3  encode backward  vision, all samples at once; then finalise once

guard   images.shape[2] == 16   vision takes no other

moved   fwd 512 B, bwd 2.75 KiB per receiving rank for a batch of 12, 2 collectives per step
bound   fwd 512 B, bwd 2.75 KiB
""",
    )


def test_ranks_of_a_cut_sequence() -> None:
    layouts = {"vision": Layout(dp=4), "language": Layout(cp=2, dp=2, zigzag=True)}
    batch = {"images": torch.zeros(4, 8, 16)}
    graph = graph_of(Pair(), layouts, batch, sequence_dims={"vision": 1})
    assert_expected_inline(
        ranks(graph, "vision_language"),
        """\
%vision_language  fan_in  parts of 4 of the step's samples held by each rank, 4 of the sequence
rank                0         1     2         3
vision              0:1       1:2   2:3       3:4
vision sequence     0:4       0:4   0:4       0:4
language            0:2       0:2   2:4       2:4
language sequence   0:1,3:4   1:3   0:1,3:4   1:3
""",
    )


def test_gradients_that_are_added() -> None:
    layout = Layout(tp=2, cp=2, dp=2)
    graph = graph_of(Pair(), {"vision": layout, "language": layout}, PAIR_BATCH)
    lines = [line for line in page(graph).splitlines() if line.startswith(("+", "moved", "bound"))]
    assert_expected_inline(
        "\n".join(lines),
        """\
+ %vision_language   f32[8@dp,5,8]    language   [4,5,8]    redistribute(%vision)
+   equal   vision tp2 cp2 dp2 -> language tp2 cp2 dp2   where language.dp = vision.dp
+   fwd   as it is                 0 B     local
+   bwd   all_reduce(dim=0, sum)   640 B   [0,2] [1,3] [4,6] [5,7]
+   bwd   scale x1/2                       vision mean, language mean over dp and cp
+   bwd   at the bound; every cell has 2 summands, one on each cp rank
+   at    passes/kit.py:36 x = self.vision(images)
moved   fwd 0 B, bwd 640 B per receiving rank for a batch of 8, 1 collective per step
bound   fwd 0 B, bwd 640 B""",
    )


def test_ranks() -> None:
    assert_expected_inline(
        ranks(trio_graph(), "vision_language"),
        """\
%vision_language  fan_in  parts of 4 of the step's samples held by each rank
rank       0     1     2     3     4     5     6     7
vision     0:1   0:1   2:3   2:3   1:2   1:2   3:4   3:4
language   0:2   0:2   2:4   2:4   -     -     -     -
""",
    )


def test_dot() -> None:
    assert_expected_inline(
        dot(trio_graph()),
        """\
digraph Trio {
  rankdir=LR; node [shape=box, style=rounded];
  subgraph cluster_0 { label="vision   tp2 dp4"; images; vision; }
  subgraph cluster_1 { label="audio   tp8 dp1"; clips; audio; }
  subgraph cluster_2 { label="language   tp2 pp2 dp2"; mask; unsqueeze; where; language; }
  images -> vision [label="f32[8@dp,5,16]"];
  vision_language [style=filled, fillcolor="#ffd9a0", label="fan_in\\nlanguage.dp = vision.dp%2"];
  vision -> vision_language [label="f32[8@dp,5,8]"];
  clips -> audio [label="f32[8@dp,5,4]"];
  audio_language [style=filled, fillcolor="#ffd9a0", label="fan_out\\naudio.dp = 0"];
  audio -> audio_language [label="f32[8@dp,5,8]"];
  mask -> unsqueeze [label="bool[8@dp,5]"];
  unsqueeze -> where [label="bool[8@dp,5,1]"];
  vision_language -> where [label="f32[8@dp,5,8]"];
  audio_language -> where [label="f32[8@dp,5,8]"];
  where -> language [label="f32[8@dp,5,8]"];
}
""",
    )


@pytest.mark.parametrize("pp", [1, 2])
def test_a_page_is_ascii_narrow_and_the_same_every_time(pp: int) -> None:
    layout = Layout(tp=4 // pp, pp=pp, dp=2)
    text = page(trio_graph(language=layout))
    assert text == page(trio_graph(language=layout))
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 108
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert text.splitlines()[-2].startswith("moved   fwd ")


@pytest.mark.parametrize(
    ("schedule", "forward", "backward"),
    [
        ("three_phase", "all samples of the step at once", "all samples at once"),
        (
            "lookahead=1",
            "one microbatch at a time, then phases 2 and 3 of these",
            "one microbatch at a time",
        ),
        (
            "lookahead=3",
            "3 microbatches at a time, then phases 2 and 3 of these",
            "3 microbatches at a time",
        ),
        (
            "filled=2,6",
            "portions in the bubbles of phase 2, each sent when made",
            "portions in these bubbles",
        ),
    ],
)
def test_what_encoders_take_at_a_time(schedule: str, forward: str, backward: str) -> None:
    lines = page(trio_graph(), schedule=schedule).splitlines()
    assert f"phase 1  encode           all ranks, {forward}" in lines
    assert f"phase 3  encode backward  audio and vision, {backward}; then finalise once" in lines


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

"""Covers what a person reads of Megatron's own MimoModel: print(program), ranks(), COLOCC_DUMP."""

import os
import tempfile
from functools import partial
from pathlib import Path

import expecttest
import pytest

import colocc
from colocc import Layout
from colocc.runtime import cpu
from tests import mimo
from tests.harness import ProcessPool

LAYOUTS = {
    "images": Layout(tp=2, dp=4),
    "audio": Layout(tp=8),
    "language": Layout(tp=2, pp=2, dp=2),
}


def page_on_rank(_: int, folder: str) -> tuple[str, str]:
    os.environ["COLOCC_DUMP"] = folder
    try:
        with cpu.ranks(), colocc.process_groups(LAYOUTS) as groups:
            model = mimo.build(groups, LAYOUTS, wrap=False)
            batch = mimo.batch(8, ("images", "audio"))
            with colocc.compile(model, LAYOUTS, groups=groups, example_inputs=batch) as program:
                return str(program), program.ranks("images_language")
    finally:
        del os.environ["COLOCC_DUMP"]


@pytest.fixture(scope="module")
def pages(processes: ProcessPool) -> tuple[list[tuple[str, str]], dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        ranks = processes.run(8, partial(page_on_rank, folder=folder))
        return ranks, {path.name: path.read_text() for path in Path(folder).iterdir()}


def test_every_rank_prints_the_same_page(
    pages: tuple[list[tuple[str, str]], dict[str, str]],
) -> None:
    ranks, _ = pages
    assert len(set(ranks)) == 1
    page, table = ranks[0]
    assert max(map(len, page.splitlines())) <= 100
    expecttest.assert_expected_inline(
        page,
        """\
graph MimoModel    world 8    after 5/6 phases

layouts
  images     tp2 dp4       tp = r%2   dp = r//2                 modality_submodules.images
  audio      tp8 dp1       tp = r                               modality_submodules.audio
  language   tp2 pp2 dp2   tp = r%2   pp = r//4   dp = r//2%2   language_model

phase 1  encode           all ranks, all samples of the step at once
  %modality_inputs_images   f32[8@dp,3,6]    images         [2,3,6]   input(modality_inputs.images)
  %modality_inputs_audio    f32[8@dp,3,6]    audio          [8,3,6]   input(modality_inputs.audio)
  %images                   f32[8*3@dp,32]   images         [6,32]    images(encoder_inputs=%moda...
+ %images_language          f32[8*3@dp,32]   language pp0   [12,32]   redistribute(%images)
+   fan_in x2   images tp2 dp4 -> language tp2 pp2 dp2   where language.dp = images.dp%2
+   fwd   send_recv(dim=0, to pp0)     768 B   [0,4] [1,5] [2,6] [3,7]
+   bwd   send_recv(dim=0, from pp0)   768 B   [0,4] [1,5] [2,6] [3,7]
+   at    model/base.py:809 embeddings = submodule.forward(encoder_inputs=modality_inputs[modalit...
  %audio                    f32[8*3@dp,32]   audio          [24,32]   audio(encoder_inputs=%modal...
+ %audio_language           f32[8*3@dp,32]   language pp0   [12,32]   redistribute(%audio)
+   fan_out x2   audio tp8 dp1 -> language tp2 pp2 dp2   where audio.dp = 0
+   fwd   narrow(dim=0)                 0 B        local
+   bwd   all_to_all(dim=0, from pp0)   3.00 KiB   [0,2,4,6] [1,3,5,7]
+   at    model/base.py:809 embeddings = submodule.forward(encoder_inputs=modality_inputs[modalit...

phase 2  language         1f1b over 2 stages, by microbatch
  %input_ids      i64[8@dp,12]      language       [4,12]      input(input_ids)
  %position_ids   i64[8@dp,12]      language       [4,12]      input(position_ids)
  %loss_mask      f32[8@dp,12]      language       [4,12]      input(loss_mask)
  %labels         i64[8@dp,12]      language       [4,12]      input(labels)
  %text           f32[8*6@dp,32]    language pp0   [24,32]     get_text_embeddings(input_ids=%inp...
  %merged         f32[12,8@dp,32]   language pp0   [12,4,32]   align_embeddings_by_token_position...
  %language       f32[8@dp,12]      language       [4,12]      language(position_ids=%position_id...
  return (%language, %loss_mask)

phase 3  encode backward  audio and images, all samples at once; then finalise once

moved   fwd 768 B, bwd 3.75 KiB per receiving rank for a batch of 8, 3 collectives per step
bound   fwd 768 B, bwd 3.75 KiB
""",
    )
    expecttest.assert_expected_inline(
        table,
        """\
%images_language  fan_in  parts of 4 of the step's samples held by each rank
rank       0     1     2     3     4     5     6     7
images     0:1   0:1   2:3   2:3   1:2   1:2   3:4   3:4
language   0:2   0:2   2:4   2:4   -     -     -     -
""",
    )


def test_the_dump_has_a_page_per_pass(pages: tuple[list[tuple[str, str]], dict[str, str]]) -> None:
    _, files = pages
    passes = ("capture", "propagate", "merge", "redistribute", "phases")
    shared = [f"{place:02d}_{name}.txt" for place, name in enumerate(passes, 1)]
    own = [f"06_specialize.rank{rank}.txt" for rank in range(8)]
    assert sorted(files) == [*shared, *own]
    # A later stage computes neither the text embedding nor the merge.
    assert "get_text_embeddings" in files["06_specialize.rank0.txt"]
    assert "get_text_embeddings" not in files["06_specialize.rank4.txt"]
    assert "redistribute(" in files["06_specialize.rank4.txt"]

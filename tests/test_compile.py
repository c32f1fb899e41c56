"""Covers colocc/compile.py: what it refuses, it refuses on all ranks alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import colocc
from colocc import CaptureError, Layout, LayoutError
from colocc.passes.graph import Graph
from tests.harness import run_threads
from tests.plain import (
    LAYOUTS,
    ORDERS,
    Model,
    batch,
    contains,
    layouts_of,
    model,
    refused,
)


def compiling(layouts: dict[str, Any], **options: Any) -> Callable[[int], Any]:
    return lambda _: colocc.compile(model(), layouts, example_inputs=batch(), **options)


def test_a_world_of_another_size() -> None:
    text = refused(4, compiling(LAYOUTS))
    contains(text, "vision (tp2 dp4)", "= 8 ranks, the world has 4", "Start 8 ranks, or change")
    text = refused(4, lambda _: colocc.process_groups(LAYOUTS))
    contains(text, "vision (tp2 dp4)", "= 8 ranks, the world has 4")


def test_layouts_of_different_sizes() -> None:
    layouts = {**LAYOUTS, "audio": Layout(tp=4)}
    text = refused(8, compiling(layouts))
    contains(text, "audio (tp4 dp1)", "= 4 ranks, the world has 8")


def test_dp_sizes_that_do_not_divide_ask_for_a_batch_that_both_can_cut() -> None:
    layouts = layouts_of(ORDERS[0], (2, 3), (6, 1), (3, 2))

    def work(rank: int) -> None:
        with colocc.compile(model(), layouts, example_inputs=batch()) as program:
            program(**batch())

    text = refused(6, work)
    contains(text, "replicas of decoder 8", "vision (tp2 dp3) must cut into 3 equal parts")
    contains(text, "8 % 3 = 2", "Make the step a multiple of 6 samples")


def test_an_encoder_with_a_pipeline() -> None:
    layouts = {**LAYOUTS, "vision": Layout(tp=2, pp=2, dp=2)}
    text = refused(8, compiling(layouts))
    contains(text, "vision (tp2 pp2 dp2)", "decoder", "pp2", "Write tp2 dp4 for vision")


def test_a_module_that_the_model_lacks() -> None:
    text = refused(8, compiling({**LAYOUTS, "smell": Layout(tp=8)}))
    contains(text, "layouts names 'smell'", "Model has no such module", "audio, decoder, vision")


def test_parameters_that_no_layout_covers() -> None:
    layouts = {name: LAYOUTS[name] for name in ("vision", "decoder")}
    text = refused(8, compiling(layouts))
    contains(text, "no layout covers the parameter audio.weight [8, 4]", "Add a layout for 'audio'")


def test_no_layouts_and_layouts_of_another_kind() -> None:
    contains(refused(8, compiling({})), "no layouts: give one for each module")
    text = refused(8, compiling({**LAYOUTS, "audio": "tp8"}))
    contains(text, "audio is laid out by 'tp8'", "Layout(tp=2, dp=4)")


@pytest.mark.parametrize("order", ["tp-xx", "tp--dp", "tp-tp-dp", "dp", 3])
def test_a_malformed_order(order: Any) -> None:
    with pytest.raises(LayoutError, match="order"):
        Layout(tp=2, dp=4, order=order)


def test_a_model_that_cannot_be_traced() -> None:
    class Peeking(Model):
        def forward(self, images: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
            if mask.sum() > 0:
                return super().forward(images, clips, mask)
            return images

    text = refused(8, lambda _: colocc.compile(Peeking().double(), LAYOUTS, example_inputs=batch()))
    contains(text, "CaptureError: Peeking.forward cannot be traced", "if mask.sum() > 0:")
    contains(text, "@colocc.leaf")


def test_options_that_nothing_reads() -> None:
    text = refused(8, compiling(LAYOUTS, batch_dims={"image": 1}))
    contains(text, "batch_dims has 'image': 1", "images, clips, mask")
    text = refused(8, compiling(LAYOUTS, batch_dims={"images": -1}))
    contains(text, "batch_dims has 'images': -1", "a dim of at least 0")
    text = refused(8, compiling(LAYOUTS, reductions={"vision": "average"}))
    contains(text, "reductions has 'vision': 'average'", "'mean' or 'sum'")
    contains(refused(8, compiling(LAYOUTS, schedule="fast")), "write schedule='three_phase'")
    text = refused(8, compiling(LAYOUTS, groups={"vision": None}))
    contains(text, "groups is a dict", "colocc.process_groups(layouts)")


def test_groups_of_other_layouts() -> None:
    def work(rank: int) -> None:
        groups = colocc.process_groups({**LAYOUTS, "audio": Layout(dp=8)})
        colocc.compile(model(), LAYOUTS, groups=groups, example_inputs=batch())

    contains(refused(8, work), "audio tp1 dp8", "audio tp8 dp1", "Open them with the same layouts")


def test_ranks_with_different_layouts() -> None:
    other = {**LAYOUTS, "audio": Layout(dp=8)}
    text = refused(8, lambda rank: compiling(other if rank == 5 else LAYOUTS)(rank))
    contains(text, "the ranks do not agree on the compiled program", "rank 5 has", "audio tp1 dp8")
    contains(text, "rank 5 must be given what rank 0 is given")
    text = refused(8, lambda rank: colocc.process_groups(other if rank == 5 else LAYOUTS))
    contains(text, "the ranks do not agree on the layouts", "rank 5 has", "audio tp1 dp8")


@pytest.mark.parametrize(
    "options",
    [{"batch_dims": {"images": 1}}, {"schedule": "fast"}, {"reductions": {"vision": "sum"}}],
)
def test_one_rank_with_other_options(options: dict[str, Any]) -> None:
    text = refused(8, lambda rank: compiling(LAYOUTS, **(options if rank == 2 else {}))(rank))
    contains(text, "LayoutError", "rank 2")


def test_one_rank_with_groups() -> None:
    def work(rank: int) -> None:
        groups = colocc.process_groups(LAYOUTS)
        compiling(LAYOUTS, groups=groups if rank else None)(rank)

    contains(refused(8, work), "do not agree on the compiled program", "ranks 1, 2, 3, 4, 5, 6, 7")


def test_one_rank_whose_model_fails() -> None:
    class Broken(Model):
        def forward(self, images: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
            raise RuntimeError("no such file")

    def work(rank: int) -> None:
        made = Broken().double() if rank == 3 else model()
        colocc.compile(made, LAYOUTS, example_inputs=batch())

    contains(refused(8, work), "rank 3: Broken.forward cannot be traced", "no such file")


def test_one_rank_whose_options_are_no_options() -> None:
    def work(rank: int) -> None:
        colocc.compile(model(), LAYOUTS if rank else [1], example_inputs=batch())  # type: ignore[arg-type]

    contains(refused(8, work), "LayoutError: rank 0: ")


def test_an_error_that_is_no_refusal_comes_out_as_it_is() -> None:
    def main(rank: int) -> tuple[type[BaseException], bool]:
        with pytest.raises(CaptureError) as caught:
            colocc.compile(model(), LAYOUTS, example_inputs={**batch(), "more": torch.ones(16)})
        return caught.type, caught.value.__cause__ is None

    assert run_threads(8, main) == [(CaptureError, True)] * 8


def test_the_dump_has_a_page_for_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOCC_DUMP", str(tmp_path / "pages"))
    run_threads(8, lambda _: colocc.compile(model(), LAYOUTS, example_inputs=batch()).destroy())
    names = sorted(path.name for path in (tmp_path / "pages").iterdir())
    passes = ("capture", "propagate", "merge", "redistribute", "phases")
    common = [f"{place:02d}_{name}.txt" for place, name in enumerate(passes, 1)]
    assert names == common + [f"06_specialize.rank{rank}.txt" for rank in range(8)]


def test_pages_say_what_the_schedule_encodes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOCC_DUMP", str(tmp_path / "pages"))
    program = colocc.compile(
        model(),
        {**LAYOUTS, "decoder": Layout(tp=4, dp=2)},
        example_inputs=batch(),
        schedule="lookahead=2",
    )
    (path,) = (tmp_path / "pages").glob("*_phases.txt")
    for text in (str(program), path.read_text()):
        assert "all ranks, 2 microbatches at a time, then phases 2 and 3 of these\n" in text


def test_the_graph_of_all_ranks_is_left_as_it_is() -> None:
    program = colocc.compile(model(), LAYOUTS, example_inputs=batch())
    assert isinstance(program.graph, Graph)
    run_threads(8, lambda _: colocc.compile(model(), LAYOUTS, example_inputs=batch()).destroy())
    assert str(program) == str(colocc.compile(model(), LAYOUTS, example_inputs=batch()))


@pytest.mark.parametrize("ranks_per_node", [0, -1, 2.0, True])
def test_ranks_per_node_that_is_no_number_of_ranks(ranks_per_node: Any) -> None:
    text = refused(8, compiling(LAYOUTS, ranks_per_node=ranks_per_node))
    contains(text, f"ranks_per_node is {ranks_per_node!r}: give an integer of at least 1")

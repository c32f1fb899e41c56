"""Covers colocc/program.py: batches and calls that are refused, on every rank alike."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import colocc
from colocc import Layout, LayoutError
from colocc.testing import relative_l2
from tests.harness import run_threads
from tests.plain import (
    BATCH,
    LAYOUTS,
    LENGTH,
    Model,
    batch,
    contains,
    model,
    refused,
    replica,
)

EXACT = 1e-12


def calling(change: Callable[[dict[str, Any], int], Any]) -> Callable[[int], Any]:
    """Compile, then call the program with a batch that ``change`` has spoiled."""

    def work(rank: int) -> None:
        program = colocc.compile(model(), LAYOUTS, example_inputs=batch())
        given: dict[str, Any] = dict(batch())
        change(given, rank)
        program(**given)

    return work


def test_an_input_that_is_missing() -> None:
    text = refused(8, calling(lambda given, _: given.pop("clips")))
    contains(text, "lacks the input clips, which Model.forward reads; it has images, mask")
    text = refused(8, calling(lambda given, _: given.update(clips=None)))
    contains(text, "lacks the input clips")


def test_an_optional_input_that_the_trace_has_seen() -> None:
    class Scaled(Model):
        def forward(
            self, images: Tensor, clips: Tensor, mask: Tensor, scale: Tensor | None = None
        ) -> Tensor:
            out = super().forward(images, clips, mask)
            return out if scale is None else out * scale.unsqueeze(-1).unsqueeze(-1)

    scale = torch.arange(float(BATCH)).double()

    def work(rank: int) -> None:
        made = Scaled().double()
        colocc.compile(made, LAYOUTS, example_inputs={**batch(), "scale": scale})(**batch())

    contains(refused(8, work), "lacks the input scale")

    def added(rank: int) -> None:
        made = Scaled().double()
        colocc.compile(made, LAYOUTS, example_inputs=batch())(**batch(), scale=scale)

    contains(refused(8, added), "has 'scale', which Scaled.forward does not read")


def test_an_input_that_nothing_reads() -> None:
    text = refused(8, calling(lambda given, _: given.update(extra=torch.ones(BATCH))))
    contains(text, "has 'extra', which Model.forward does not read", "clips, images, mask")


def test_inputs_of_different_sizes() -> None:
    text = refused(8, calling(lambda given, _: given.update(clips=given["clips"][:8])))
    contains(text, "clips", "8 samples", "16", "batch_dims={")


def test_a_batch_that_does_not_divide() -> None:
    text = refused(8, calling(lambda given, _: given.update(batch(size=7))))
    contains(text, "7 samples, decoder (tp4 dp2) has 2 dp", "7 % 2 = 1", "a multiple of 2")
    text = refused(8, calling(lambda given, _: given.update(batch(size=6))))
    contains(text, "vision (tp2 dp4) must cut", "3 % 2 = 1", "a multiple of 4 samples")


def test_lengths_that_are_not_those_of_the_example() -> None:
    """A length of one, and lengths that are equal in the example, are read as such."""

    class Counted(Model):
        def forward(self, images: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
            seen = self.vision(images).sum(1) * mask.shape[1] / images.shape[1]
            out: Tensor = self.decoder(seen + self.audio(clips).sum(1) * clips.shape[1])
            return out

    def cut(**lengths: int) -> dict[str, Tensor]:
        return {name: value[:, : lengths.get(name)] for name, value in batch().items()}

    def work(example: dict[str, Tensor], given: dict[str, Tensor]) -> Callable[[int], Any]:
        return lambda _: colocc.compile(Counted().double(), LAYOUTS, example_inputs=example)(
            **given
        )

    text = refused(8, work(cut(clips=1), batch()))
    contains(text, "clips.shape[1] = 5, and the graph holds where that is 1, as in the example")
    assert refused(8, work(batch(), cut(clips=3, mask=2))) == "accepted"

    def flat(given: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        return {**given, "clips": given["clips"].sum(-1)[:, :length]}

    class Flat(Counted):
        def forward(self, images: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
            return super().forward(images, clips[..., None].expand(-1, -1, 4), mask)

    def alike(_: int) -> None:
        example = flat(batch(), LENGTH)
        colocc.compile(Flat().double(), LAYOUTS, example_inputs=example)(**flat(batch(), 3))

    contains(refused(8, alike), "this batch has mask.shape[1] = 5, and the graph holds where that ")


def test_one_rank_with_another_batch() -> None:
    text = refused(8, calling(lambda given, rank: given.update(batch(int(rank == 6)))))
    contains(text, "do not agree on the batch, which must be global", "rank 6 has")


def test_one_rank_with_a_malformed_batch() -> None:
    text = refused(8, calling(lambda given, rank: rank == 4 and given.pop("mask")))
    contains(text, "LayoutError: rank 4: microbatch 0 lacks the input mask")


def test_the_program_goes_on_after_a_refused_batch() -> None:
    wanted = model()(**batch()).detach()

    def main(rank: int) -> Tensor:
        with colocc.compile(model(), LAYOUTS, example_inputs=batch()) as program:
            for _ in range(2):
                with pytest.raises(LayoutError):
                    program(images=batch()["images"])
            program(**batch())
            with pytest.raises(LayoutError):
                program(**batch(size=7))
            out: Tensor = program(**batch()).detach()
            return out

    for rank, output in enumerate(run_threads(8, main)):
        assert relative_l2(output, replica(wanted, LAYOUTS["decoder"], rank)) < EXACT


def test_a_number_without_a_batch_dim_reaches_every_rank() -> None:
    class Scaled(Model):
        def forward(
            self, images: Tensor, clips: Tensor, mask: Tensor, scale: Tensor | None = None
        ) -> Tensor:
            assert scale is not None
            return super().forward(images, clips, mask) * scale

    base, given = Scaled().double(), {**batch(), "scale": torch.tensor(2.0).double()}
    wanted = base(**given).detach()

    def main(rank: int) -> Tensor:
        made = copy.deepcopy(base)
        with colocc.compile(made, LAYOUTS, example_inputs=given) as program:
            out: Tensor = program(**given).detach()
            return out

    for rank, output in enumerate(run_threads(8, main)):
        assert relative_l2(output, replica(wanted, LAYOUTS["decoder"], rank)) < EXACT


def test_a_plain_module_has_no_schedule_and_a_pipeline_no_call() -> None:
    def work(rank: int) -> None:
        program = colocc.compile(model(), LAYOUTS, example_inputs=batch())
        program.forward_backward([batch()], num_microbatches=1)

    contains(refused(8, work), "Model is no MimoModel: call program(**batch)")
    pipelined = {**LAYOUTS, "decoder": Layout(tp=2, pp=2, dp=2)}

    def call(rank: int) -> None:
        colocc.compile(model(), pipelined, example_inputs=batch())(**batch())

    contains(
        refused(8, call), "decoder (tp2 pp2 dp2) is pipelined over 2 stages", "forward_backward"
    )


def test_a_destroyed_program_says_so() -> None:
    def work(rank: int) -> None:
        program = colocc.compile(model(), LAYOUTS, example_inputs=batch())
        program.destroy()
        program(**batch())

    contains(refused(8, work), "the program was destroyed: compile the model again")

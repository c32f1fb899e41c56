"""Covers runtime/intake.py: bad batches are one error on every rank, and leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import colocc
from colocc import Layout, LayoutError
from colocc.runtime import cpu
from colocc.runtime import ragged as runtime_ragged
from colocc.runtime.intake import take
from colocc.testing import Run, observed
from tests import mimo, plain, ragged
from tests.harness import ProcessPool, run_threads

LAYOUTS = {"images": Layout(dp=8), "language": Layout(tp=2, pp=2, dp=2)}
IMAGES = [[0, 1, 2, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 2, 1, 0]]
Step = list[dict[str, Any]]


def good(seed: int) -> Step:
    return [ragged.batch(images, seed=seed + index) for index, images in enumerate(IMAGES)]


def pixels(step: Step, microbatch: int) -> torch.Tensor:
    found: torch.Tensor = step[microbatch]["modality_inputs"]["images"]["vit"]["x"]
    return found


def with_pixels(step: Step, value: Any) -> None:
    step[1]["modality_inputs"]["images"]["vit"]["x"] = value


def ids(step: Step, microbatch: int) -> torch.Tensor:
    found: torch.Tensor = step[microbatch]["input_ids"]
    return found


# What is done to a good step, on all ranks or on rank 3 alone; what every rank then says.


def a_placeholder_less(step: Step, rank: int) -> None:
    ids(step, 1)[5, (ids(step, 1)[5] == ragged.TOKEN).nonzero()[0]] = 1


def an_image_too_many(step: Step, rank: int) -> None:
    with_pixels(step, torch.cat([pixels(step, 1), pixels(step, 1)[:1]]))


def no_image(step: Step, rank: int) -> None:
    for batch in step:
        batch["modality_inputs"] = None


def no_placeholder(step: Step, rank: int) -> None:
    for batch in step:
        batch["input_ids"].clamp_(max=ragged.TOKEN - 1)


def a_nan(step: Step, rank: int) -> None:
    pixels(step, 1)[1, 0, 2] = float("nan")


def an_inf_in_the_mask(step: Step, rank: int) -> None:
    step[0]["loss_mask"][6, 3] = float("inf")


def fewer_labels(step: Step, rank: int) -> None:
    step[1]["labels"] = step[1]["labels"][:6]


def a_list(step: Step, rank: int) -> None:
    with_pixels(step, list(pixels(step, 1)))


def an_array(step: Step, rank: int) -> None:
    step[1]["labels"] = step[1]["labels"].numpy()


def a_set(step: Step, rank: int) -> None:
    step[0]["modality_inputs"]["images"]["vit"]["sizes"] = {4, 5}


def ids_of_one_dim(step: Step, rank: int) -> None:
    step[0]["input_ids"] = step[0]["input_ids"][:, 0]


def a_mask_of_seven_heads(step: Step, rank: int) -> None:
    step[1]["attention_mask"] = torch.ones(1, 7, mimo.LENGTH, mimo.LENGTH).triu(1) > 0


def an_image_less_on_rank_3(step: Step, rank: int) -> None:
    if rank == 3:
        with_pixels(step, pixels(step, 1)[1:])


def other_samples_on_rank_3(step: Step, rank: int) -> None:
    """A batch that is good in itself, of the same shapes."""
    if rank == 3:
        step[0]["input_ids"] = step[0]["input_ids"].flip(0)


def wrong_rows_on_rank_3(step: Step, rank: int) -> None:
    """The encoder of one rank makes a row less of each image."""
    step[0]["spoils"] = a_row_less if rank == 3 else None


def a_row_less(output: torch.Tensor) -> torch.Tensor:
    return output.view(-1, mimo.ROWS, output.shape[-1])[:, 1:].flatten(0, 1)


def rows_of_another_width_on_rank_3(step: Step, rank: int) -> None:
    step[0]["spoils"] = (lambda output: output[:, 1:]) if rank == 3 else None


def rows_without_a_way_back_on_rank_3(step: Step, rank: int) -> None:
    step[0]["spoils"] = torch.Tensor.detach if rank == 3 else None


def a_number_on_rank_3(step: Step, rank: int) -> None:
    step[0]["spoils"] = torch.Tensor.sum if rank == 3 else None


def an_encoder_that_fails_on_rank_3(step: Step, rank: int) -> None:
    step[0]["spoils"] = fails if rank == 3 else None


def fails(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel for these images")


BAD: dict[Callable[[Step, int], None], str] = {
    a_placeholder_less: "images: the step has 32 placeholders in input_ids for 11 items, an item "
    "of this shape makes 3 rows, but sample 5 of microbatch 1 has 5",
    an_image_too_many: "an item of this shape makes 3 rows, but microbatch 1 has 15 placeholders "
    "for 6 items: one is without the other",
    no_image: "sample 1 of microbatch 0 has 3 placeholders in input_ids, and the step has no items",
    no_placeholder: "the step has 11 items and no placeholder in input_ids",
    a_nan: "modality_inputs.images.vit.x of microbatch 1 has 1 NaN and 0 inf, the first in "
    "sample 1",
    an_inf_in_the_mask: "loss_mask of microbatch 0 has 0 NaN and 1 inf, the first in sample 6",
    fewer_labels: "labels of microbatch 1 has 6 samples in dim 0, input_ids of microbatch 0 has 8",
    a_list: "modality_inputs.images.vit.x of microbatch 1 is a list of 5 tensors: only a tensor is "
    "cut by sample",
    an_array: "labels of microbatch 1 is a numpy.ndarray: only a tensor is cut by sample",
    a_set: "modality_inputs.images.vit.sizes of microbatch 0 is a set",
    ids_of_one_dim: "input_ids of microbatch 0 is int64 [8]: give a tensor of int64 or int32",
    a_mask_of_seven_heads: "attention_mask of microbatch 1 is of 7 heads, language has 8: give",
    an_image_less_on_rank_3: "rank 3: images: the step has",
    other_samples_on_rank_3: "the ranks do not agree on the batch, which must be global",
    wrong_rows_on_rank_3: "rank 3: images on rank 3 made 2 rows, the samples that it encodes there "
    "have 3 placeholders in input_ids: sample 7 of microbatch 0 has 3 for 1 items, which make 2",
    an_encoder_that_fails_on_rank_3: "rank 3: no kernel for these images",
    rows_of_another_width_on_rank_3: "rank 0 has images float32 [rows, 32] on cpu with a gradient; "
    "rank 3 has images float32 [rows, 31] on cpu with a gradient",
    rows_without_a_way_back_on_rank_3: "rank 3 has images float32 [rows, 32] on cpu. rank 3 must",
    a_number_on_rank_3: "rank 3: TypeError: len() of a 0-d tensor",
}


@contextlib.contextmanager
def faulty(model: Any, step: Step) -> Iterator[None]:
    """Inside, what this rank's encoder makes is spoiled as ``step`` says."""
    spoils = step[0].pop("spoils", None)
    if spoils is None:
        yield
        return
    encoder = model.modality_submodules["images"]
    hook = encoder.register_forward_hook(lambda module, args, output: spoils(output))
    try:
        yield
    finally:
        hook.remove()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.main_grad.clone() for name, p in model.named_parameters()}


def skip_on_rank(rank: int) -> tuple[list[list[Run]], dict[str, str]]:
    """Two good steps with an update between them: alone, then with every bad batch between them;
    and what each bad one said."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(LAYOUTS))
        model = mimo.build(groups, LAYOUTS)
        weights = [weight.detach().clone() for weight in model.parameters()]
        program = stack.enter_context(colocc.compile(model, LAYOUTS, groups=groups, check="finite"))
        said: dict[str, str] = {}

        def run(step: Step) -> list[dict[str, Any]]:
            return program.forward_backward(
                step, num_microbatches=2, loss_func=mimo.loss_func, force_all_reduce=True
            )

        def spoiled() -> None:
            before = gradients(model)
            for spoil in BAD:
                step = good(20)
                spoil(step, rank)
                with faulty(model, step), pytest.raises((LayoutError, RuntimeError)) as info:
                    run(step)
                said[spoil.__name__] = str(info.value)
            after = gradients(model)
            assert all(torch.equal(before[name], after[name]) for name in before)

        runs = []
        for spoils in (False, True):
            for weight, kept in zip(model.parameters(), weights, strict=True):
                weight.data.copy_(kept)
            found = []
            for seed in (0, 10):
                if seed and spoils:
                    spoiled()
                model.zero_grad_buffer()
                logs = run(good(seed))
                found.append(observed(program, [log["loss"] for log in logs], microbatches=2))
                for weight in model.parameters():
                    weight.data -= 0.1 * weight.main_grad
            runs.append(found)
        return runs, said


def test_training_goes_on_as_if_a_bad_batch_had_never_been_seen(processes: ProcessPool) -> None:
    ranks = processes.run(8, skip_on_rank)
    missing = []
    for spoil, message in BAD.items():
        texts = {said[spoil.__name__] for _, said in ranks}
        assert len(texts) == 1, (spoil.__name__, texts)
        (text,) = texts
        missing += [(spoil.__name__, text)] * (message not in text)
    assert not missing
    for (alone, skipping), _ in ranks:
        for wanted, run in zip(alone, skipping, strict=True):
            assert run.loss == wanted.loss
            assert run.gradients.keys() == wanted.gradients.keys()
            for name, gradient in wanted.gradients.items():
                assert torch.equal(run.gradients[name], gradient), name


def unlike_on_rank(_: int) -> list[str]:
    """What is said where one slot alone has images of two sizes, or with inputs of two kinds; a
    good step follows."""
    layouts = {"images": Layout(dp=2), "language": Layout(pp=2)}
    steps = [[ragged.batch([1] * 4, seed=seed) for seed in range(3)] for _ in range(3)]
    taller, more, good_one = steps
    # The first slot has those of microbatch 0 and half of 1.
    with_pixels([*taller[1:]], torch.nn.functional.pad(pixels(taller, 2), (0, 0, 0, 1)))
    more[2]["modality_inputs"]["images"]["vit"]["sizes"] = torch.ones(4)
    said = []
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups) as program:
            for step in (taller, more):
                with pytest.raises(LayoutError) as info:
                    program.forward_backward(step, num_microbatches=3, loss_func=mimo.loss_func)
                said.append(str(info.value))
            program.forward_backward(good_one, num_microbatches=3, loss_func=mimo.loss_func)
    return said


def test_items_of_one_slot_that_are_not_alike_are_one_error_on_all(processes: ProcessPool) -> None:
    one, other = processes.run(2, unlike_on_rank)
    assert one == other
    taller, more = one
    assert "rank 1: modality_inputs.images.vit.x is [items, 3, 6] in microbatch 1" in taller
    assert "and [items, 4, 6] in microbatch 2, whose items are encoded together" in taller
    assert "vit.sizes is not given in microbatch 1 and [items] in microbatch 2" in more


# ---------------------------------------------------------------- plain modules, ranks in threads


def fallen(rank: int, program: colocc.Program, given: Mapping[str, Any]) -> str:
    """What ``program`` says of ``given``."""
    try:
        program(**given)
    except (LayoutError, colocc.CaptureError, RuntimeError) as error:
        return str(error)
    return "accepted"


def test_a_plain_module_s_later_batch_that_is_bad_on_one_rank() -> None:
    """In each direction: an input of other sizes, one that is no tensor, an encoder that fails, one
    that is frozen."""

    def main(rank: int) -> tuple[list[str], torch.Tensor]:
        mine = plain.model()
        with colocc.compile(mine, plain.LAYOUTS, example_inputs=plain.batch()) as program:
            said = [fallen(rank, program, plain.batch())]
            for spoiled in (plain.batch(size=8), {**plain.batch(), "clips": [1, 2]}):
                said.append(fallen(rank, program, spoiled if rank == 5 else plain.batch()))
            if rank == 2:
                mine.audio = torch.nn.Linear(5, plain.HIDDEN).double()
            said.append(fallen(rank, program, plain.batch()))
            mine.audio = plain.model().audio.requires_grad_(rank != 4)
            said.append(fallen(rank, program, plain.batch()))
            mine.audio.requires_grad_(True)
            return said, program(**plain.batch(1)).detach()

    found = run_threads(8, main)
    (texts,) = {tuple(said) for said, _ in found}
    plain.contains(texts[0], "accepted")
    plain.contains(texts[1], "the ranks do not agree on the batch", "rank 5 has shapes [[8, 5, 4]")
    plain.contains(texts[2], "rank 5: clips of microbatch 0 is a list: only a tensor is cut")
    plain.contains(texts[3], "rank 2: mat1 and mat2 shapes cannot be multiplied")
    plain.contains(
        *(texts[4], "the encoders that are trained: rank 0 has", "trained vision, audio; rank 4"),
        "trained vision. rank 4 must be given what rank 0 is given",
    )
    whole = plain.model()(**plain.batch(1))
    for rank, (_, output) in enumerate(found):
        wanted = plain.replica(whole, plain.LAYOUTS["decoder"], rank)
        assert torch.allclose(output, wanted, rtol=0, atol=1e-12)


def test_the_order_of_a_batch_s_names_is_no_difference() -> None:
    def main(rank: int) -> tuple[str, ...]:
        steps = [plain.batch(0), plain.batch(1)]
        if rank == 5:
            steps = [dict(reversed(step.items())) for step in steps]
        with colocc.compile(plain.model(), plain.LAYOUTS, example_inputs=plain.batch()) as program:
            return tuple(fallen(rank, program, step) for step in steps)

    assert set(run_threads(8, main)) == {("accepted", "accepted")}


def test_nan_is_found_where_it_is_read() -> None:
    """By the ranks that read the sample, and not without ``check``."""
    bad = plain.batch()
    bad["images"][9, 2, 1, 1] = float("nan")

    def main(rank: int, check: str) -> str:
        with colocc.compile(
            plain.model(), plain.LAYOUTS, example_inputs=plain.batch(), check=check
        ) as program:
            return fallen(rank, program, bad)

    assert set(run_threads(8, partial(main, check="every"))) == {"accepted"}
    (text,) = set(run_threads(8, partial(main, check="finite")))
    # vision is tp2 dp4: its third slot holds samples 8 to 11.
    plain.contains(
        text, "ranks 4, 5: images of microbatch 0 has 1 NaN and 0 inf, the first in sample 9"
    )


def test_without_agreement_an_error_is_the_rank_s_own() -> None:
    def main(rank: int) -> list[str]:
        with colocc.compile(
            plain.model(), plain.LAYOUTS, example_inputs=plain.batch(), check="first"
        ) as program:
            said = [fallen(rank, program, plain.batch())]
            if rank == 1:
                said.append(fallen(rank, program, {**plain.batch(), "mask": 3}))
            dist.barrier()
            return said

    found = run_threads(8, main)
    assert [len(said) for said in found] == [1, 2, 1, 1, 1, 1, 1, 1]
    plain.contains(found[1][1], "mask of microbatch 0 is a int: only a tensor is cut by sample")


def test_a_check_that_is_not_known() -> None:
    with pytest.raises(LayoutError, match="check 'all' is not known: write check='every'"):
        colocc.compile(plain.model(), plain.LAYOUTS, example_inputs=plain.batch(), check="all")


@pytest.mark.parametrize(
    ("given", "count", "message"),
    [
        ([{}], 2, "the batches ended after 1 of 2 microbatches"),
        ([{}], 0, "num_microbatches is 0"),
        ({"input_ids": 1}, 1, "the batches are a dict: give a list or an iterator of dicts"),
        (None, 1, "the batches are a NoneType"),
    ],
)
def test_what_is_no_list_of_microbatches(given: Any, count: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        take(given, count)


def looks_on_rank(_: int, schedule: str) -> list[int]:
    """How many times a step copies input_ids to the host, in each of two steps."""
    layouts = {"images": Layout(dp=2), "language": Layout(tp=2)}
    looks: list[int] = []
    on_host = runtime_ragged.on_host

    def counted(ids: Any) -> Any:
        looks[-1] += 1
        return on_host(ids)

    with (
        cpu.ranks(),
        colocc.process_groups(layouts) as groups,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(runtime_ragged, "on_host", counted)
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
            for step in range(2):
                looks.append(0)
                model.zero_grad_buffer()
                program.forward_backward(
                    [mimo.batch(8, seed=3 * step + index) for index in range(3)],
                    num_microbatches=3,
                    loss_func=mimo.loss_func,
                )
    return looks


@pytest.mark.parametrize("schedule", ["lookahead=1", "lookahead=2", "three_phase"])
def test_a_step_is_looked_at_once(processes: ProcessPool, schedule: str) -> None:
    assert processes.run(2, partial(looks_on_rank, schedule=schedule)) == [[1, 1], [1, 1]]

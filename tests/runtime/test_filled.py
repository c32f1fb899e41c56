"""Covers runtime/filled.py with bubbles.py, lanes.py, channels.py and megatron/pipeline.py: against
the oracle; what is refused."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout, LayoutError
from colocc.passes.fill import fill
from colocc.passes.timeline import Costs, Task, Timeline
from colocc.runtime import bubbles, cpu
from colocc.runtime.bubbles import Bubbles
from colocc.runtime.captured import Captured
from colocc.runtime.filled import Filled
from colocc.testing import Run
from tests import mimo
from tests.harness import ProcessPool
from tests.oracle import (
    ORDERS,
    TUPLES,
    Oracle,
    batches,
    check,
    layouts_of,
    steps_on_rank,
)


def legal(encoder: tuple[int, int], language: tuple[int, int, int], order: str) -> bool:
    """Whether the tp groups of the encoder lie inside stages; counted here rank by rank."""
    layouts = layouts_of(encoder, language, order)
    stage = layouts["language"].coordinates("pp").tolist()
    groups = layouts["images"].groups("tp")
    return language[1] > 1 and all(len({stage[r] for r in group}) == 1 for group in groups)


CASES = [
    (encoder, language, order)
    for encoder, language in TUPLES
    for order in ORDERS
    if language[1] > 1
]
LEGAL = [case for case in CASES if legal(*case)]
REFUSED = [case for case in CASES if not legal(*case)]
TWO = ((1, 2), (1, 2, 1), ORDERS[0])


@pytest.mark.parametrize(("encoder", "language", "order"), LEGAL)
def test_filled_equals_the_oracle(
    processes: ProcessPool,
    reference: Oracle,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
) -> None:
    pp = language[1]
    counts = tuple(sorted({1, pp, pp + 1, 6}))
    check(processes, reference, layouts_of(encoder, language, order), counts, schedule="filled")


@pytest.mark.parametrize("portions", [1, 2, 3, 8])
@pytest.mark.parametrize(("encoder", "language", "order"), [TWO, ((1, 4), (1, 4, 1), ORDERS[0])])
def test_any_number_of_portions(
    processes: ProcessPool,
    reference: Oracle,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
    portions: int,
) -> None:
    layouts = layouts_of(encoder, language, order)
    schedule = f"filled={portions}"
    check(processes, reference, layouts, (1, 5), schedule=schedule, detail=True)


def uneven(
    stages: int, choices: Sequence[int], microbatches: int, costs: Costs, **options: Any
) -> tuple[tuple[int, ...], Timeline]:
    portions = (3, *(1 + index % 2 for index in range(microbatches - 2)), 2)[:microbatches]
    return portions, fill(stages, portions, costs, **options)


def uneven_on_rank(rank: int, **given: Any) -> list[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bubbles, "shortest", uneven)
        return steps_on_rank(rank, **given)


@pytest.mark.parametrize("case", [TWO, ((1, 4), (2, 2, 1), ORDERS[1]), LEGAL[-1]])
def test_every_microbatch_has_its_own_portions(
    processes: ProcessPool, reference: Oracle, case: Any
) -> None:
    how: dict[str, Any] = {"schedule": "filled", "detail": True, "on_rank": uneven_on_rank}
    check(processes, reference, layouts_of(*case), (1, 5), **how)


@pytest.mark.parametrize("overlap", [False, True])
def test_reductions_that_overlap_backward(
    processes: ProcessPool,
    reference: Oracle,
    overlap: bool,
) -> None:
    check(processes, reference, layouts_of(*TWO), (4, 3, 4), schedule="filled", overlap=overlap)


def frozen_on_rank(_: int, layouts: dict[str, Layout], schedule: str) -> tuple[Any, Any]:
    """Losses and gradients of the language module of a step with a frozen encoder."""
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, frozen=("images",))
        with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
            module: Any = program.sink_module
            module.zero_grad_buffer()
            logs = program.forward_backward(
                batches(3), num_microbatches=3, loss_func=mimo.loss_func, force_all_reduce=True
            )
            return logs, [weight.main_grad.clone() for weight in module.parameters()]


def test_a_frozen_encoder_gets_no_gradient(processes: ProcessPool) -> None:
    layouts = layouts_of(*TWO)
    work = partial(frozen_on_rank, layouts=layouts)
    phases, filled = (
        processes.run(2, partial(work, schedule=how)) for how in ("three_phase", "filled")
    )
    for (logs, wanted), (found_logs, found) in zip(phases, filled, strict=True):
        assert found_logs == logs
        for gradient, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(other, gradient)


def forward_only_on_rank(_: int, layouts: dict[str, Layout], schedule: str) -> list[Any]:
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
            model.zero_grad_buffer()
            logs = program.forward_backward(
                batches(5), num_microbatches=5, loss_func=mimo.loss_func, forward_only=True
            )
            modules: list[Any] = list(program.trainable().values())
            assert all(not p.main_grad.any() for m in modules for p in m.parameters())
            return [log["loss"] for log in logs]


@pytest.mark.parametrize("schedule", ["filled", "filled=4"])
def test_forward_only(processes: ProcessPool, schedule: str) -> None:
    layouts = layouts_of((1, 4), (1, 2, 2), ORDERS[0])
    work = partial(forward_only_on_rank, layouts=layouts)
    phases, filled = (
        processes.run(4, partial(work, schedule=how)) for how in ("three_phase", schedule)
    )
    assert any(phases)
    for wanted, found in zip(phases, filled, strict=True):
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted])


def held_on_rank(_: int, layouts: dict[str, Layout], count: int) -> tuple[int, int]:
    """The most encoded portions that awaited backward at a time, and how many ran."""
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups, schedule="filled") as program:
            alive = most = calls = 0
            encoder: Any = model.modality_submodules["images"]

            def entered(*unused: Any) -> None:
                nonlocal alive, most, calls
                if torch.is_grad_enabled():
                    calls += 1
                    alive += 1
                    most = max(most, alive)

            def left(*unused: Any) -> None:
                nonlocal alive
                alive -= 1

            encoder.register_forward_hook(entered)
            encoder.module.encoders["vit"].outward.register_full_backward_hook(left)
            program.forward_backward(
                batches(count), num_microbatches=count, loss_func=mimo.loss_func
            )
            assert alive == 0
            return most, calls


def test_the_activations_of_few_microbatches_are_alive(processes: ProcessPool) -> None:
    layouts = layouts_of(*TWO)
    few, many = (
        processes.run(2, partial(held_on_rank, layouts=layouts, count=count)) for count in (12, 24)
    )
    for rank in range(2):
        (most, calls), (most_of_more, more_calls) = few[rank], many[rank]
        assert more_calls > 1.5 * calls
        assert most_of_more <= most + 1 < calls
    assert sum(calls for _, calls in many) >= 24


def refused_on_rank(_: int, layouts: dict[str, Layout]) -> str:
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False)
        with pytest.raises(LayoutError) as caught:
            colocc.compile(model, layouts, groups=groups, schedule="filled")
    return str(caught.value)


@pytest.mark.parametrize(("encoder", "language", "order"), REFUSED)
def test_groups_across_stages_are_refused(
    processes: ProcessPool,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
) -> None:
    layouts = layouts_of(encoder, language, order)
    for text in processes.run(8, partial(refused_on_rank, layouts=layouts)):
        assert "schedule 'filled' runs images in the bubbles of language" in text
        assert "one tp and cp group of images" in text


@pytest.mark.parametrize(
    ("layouts", "text"),
    [
        (
            {"images": Layout(dp=2), "audio": Layout(dp=2), "language": Layout(pp=2)},
            "these layouts have 2: images, audio",
        ),
        ({"images": Layout(dp=2), "language": Layout(tp=2)}, "which is not pipelined: write"),
    ],
)
def test_other_layouts_are_refused(
    processes: ProcessPool, layouts: dict[str, Layout], text: str
) -> None:
    for found in processes.run(2, partial(refused_on_rank, layouts=layouts)):
        assert text in found


def careful_on_rank(_: int, layouts: dict[str, Layout]) -> list[Any]:
    """The gradients of the same step twice, the first time with messages through the host."""
    with pytest.MonkeyPatch.context() as patch, cpu.ranks():
        patch.setattr(Bubbles, "needs_care", staticmethod(lambda: True))
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        with colocc.process_groups(layouts) as groups:
            model = mimo.build(groups, layouts, layers=layouts["language"].pp)
            with colocc.compile(model, layouts, groups=groups, schedule="filled") as program:
                assert program.bubbles is not None
                found, careful = [], []
                for _step in range(2):
                    model.zero_grad_buffer()
                    program.forward_backward(
                        batches(3), num_microbatches=3, loss_func=mimo.loss_func
                    )
                    careful.append(program.bubbles.onward.careful)
                    weights: list[Any] = list(model.parameters())
                    found.append([weight.main_grad.clone() for weight in weights])
                assert careful == [True, False]
                return found


@pytest.mark.parametrize("tuples", [TWO, ((1, 4), (1, 4, 1), ORDERS[0])])
def test_the_first_step_sends_through_the_host(processes: ProcessPool, tuples: Any) -> None:
    # torch's own check counts messages as collectives: a group must not have both.
    work = partial(careful_on_rank, layouts=layouts_of(*tuples))
    for one, other in processes.run(tuples[0][1], work, detail=True):
        assert any(gradient.any() for gradient in one)
        for gradient, again in zip(one, other, strict=True):
            torch.testing.assert_close(again, gradient)


def changed_on_rank(rank: int, layouts: dict[str, Layout]) -> list[bool]:
    """Whether messages were careful in steps between which modules change how they run."""
    with pytest.MonkeyPatch.context() as patch, cpu.ranks():
        patch.setattr(Bubbles, "needs_care", staticmethod(lambda: True))
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        with colocc.process_groups(layouts) as groups:
            model: Any = mimo.build(groups, layouts)
            with colocc.compile(model, layouts, groups=groups, schedule="filled") as program:
                assert program.bubbles is not None
                found = []

                def step() -> None:
                    model.zero_grad_buffer()
                    program.forward_backward(
                        batches(3), num_microbatches=3, loss_func=mimo.loss_func
                    )
                    assert program.bubbles is not None
                    found.append({channel.careful for channel in program.bubbles.channels})

                step()
                step()
                for learns in (False, True):
                    model.modality_submodules["images"].requires_grad_(learns)
                    step()
                    step()
                # On one rank alone.
                model.language_model.train(rank == 0)
                step()
                step()
    return [careful for (careful,) in found]


def test_messages_are_careful_where_modules_run_in_another_way(processes: ProcessPool) -> None:
    wanted = [True, False, True, False, False, False, True, False]
    assert processes.run(2, partial(changed_on_rank, layouts=layouts_of(*TWO))) == [wanted] * 2


def queues_on_rank(rank: int, layouts: dict[str, Layout], given: str | None) -> str:
    with pytest.MonkeyPatch.context() as patch, cpu.ranks():
        patch.setattr(Bubbles, "needs_care", staticmethod(lambda: True))
        patch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        if given is not None and rank == 0:
            patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
        with colocc.process_groups(layouts) as groups:
            model = mimo.build(groups, layouts)
            with pytest.raises(LayoutError) as error:
                colocc.compile(model, layouts, groups=groups, schedule="filled")
            return str(error.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "CUDA_DEVICE_MAX_CONNECTIONS is not set, which means 8: set it to 32"),
        ("1", "rank 0: schedule 'filled' runs on some 16 streams"),
        ("16", "rank 1: schedule 'filled' runs on some 16 streams"),
    ],
)
def test_too_few_hardware_queues_are_refused_on_every_rank(
    processes: ProcessPool, given: str | None, text: str
) -> None:
    one, other = processes.run(2, partial(queues_on_rank, layouts=layouts_of(*TWO), given=given))
    assert one == other
    assert text in one


def wrong_on_rank(rank: int, layouts: dict[str, Layout]) -> list[str]:
    """What a step says whose placeholders are fewer than the rows of an item, on all ranks, and of
    an encoder that fails on one; a good step follows."""
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups, schedule="filled") as program:

            def said(step: list[dict[str, Any]]) -> str:
                try:
                    program.forward_backward(step, num_microbatches=3, loss_func=mimo.loss_func)
                except (LayoutError, RuntimeError) as error:
                    return str(error)
                return "accepted"

            fewer, text = batches(3), batches(3)
            for one, none in zip(fewer, text, strict=True):
                one["input_ids"][:, 1] = 0
                none["input_ids"].clamp_(max=mimo.VOCABULARY - 8)
                none["modality_inputs"] = None
            found = [said(fewer), said(text)]

            def fail(*unused: Any) -> None:
                raise RuntimeError("no kernel")

            encoder: Any = model.modality_submodules["images"]
            hook = encoder.register_forward_pre_hook(fail) if rank else None
            found.append(said(batches(3)))
            if hook is not None:
                hook.remove()
            return [*found, said(batches(3))]


def test_what_the_first_try_of_a_shape_finds_is_one_error_on_all(processes: ProcessPool) -> None:
    ranks = processes.run(2, partial(wrong_on_rank, layouts=layouts_of(*TWO)))
    (fewer, text, failed, good) = ranks[0]
    assert ranks[1] == ranks[0]
    assert "images made 3 rows of sample 0 of microbatch 0, which has 2 placeholders" in fewer
    assert "schedule 'filled' needs rows of every sample, images makes none" in text
    assert failed == "rank 1: no kernel"
    assert good == "accepted"


def test_what_is_held_outlives_the_output_that_the_schedule_empties() -> None:
    filled: Any = object.__new__(Filled)
    filled.held, output = {}, torch.arange(6.0)
    filled._hold(Task("forward", 0), None, output, 1)
    # As Megatron does with deallocate_pipeline_outputs.
    output.data = torch.empty(1)
    ((_, kept, _),) = filled.held[Task("forward", 0)]
    assert kept.tolist() == list(range(6))


def last_on_rank(_: int, layouts: dict[str, Layout]) -> tuple[list[int], int, bool]:
    """At how many backwards the last one of the step was announced, and how many ran."""
    found: list[int] = []
    backwards = 0
    backward, announced = Filled._backward, Captured.last_backward

    def counted(self: Filled, microbatch: int, portion: int, *, last: bool) -> None:
        nonlocal backwards
        backwards += 1
        backward(self, microbatch, portion, last=last)

    def noted(self: Captured, *given: Any, **options: Any) -> Any:
        found.append(backwards)
        return announced(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch, cpu.ranks():
        patch.setattr(Filled, "_backward", counted)
        patch.setattr(Captured, "last_backward", noted)
        with colocc.process_groups(layouts) as groups:
            model = mimo.build(groups, layouts)
            with colocc.compile(model, layouts, groups=groups, schedule="filled") as program:
                program.forward_backward(batches(5), num_microbatches=5, loss_func=mimo.loss_func)
                assert program.bubbles is not None
                (places,) = program.bubbles._places.values()
                return found, backwards, places.last_backward() is not None


def test_the_last_backward_of_a_step_is_announced(processes: ProcessPool) -> None:
    ranks = processes.run(2, partial(last_on_rank, layouts=layouts_of(*TWO)))
    for found, backwards, at_the_end in ranks:
        assert found == ([backwards] if at_the_end else [])
    assert any(at_the_end for _, _, at_the_end in ranks)

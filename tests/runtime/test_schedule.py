"""Covers runtime/schedule.py: every layout and schedule against the one-process float64 oracle."""

from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout, LayoutError
from colocc.runtime import cpu
from colocc.runtime.schedule import Schedule
from colocc.testing import Run, check_identity, compare, float64, observed, oracle
from tests import mimo
from tests.harness import ProcessPool
from tests.oracle import BATCH, ORDERS, TUPLES, Oracle, batches, check, layouts_of, steps_on_rank


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("encoder", "language"), TUPLES)
def test_layouts_equal_the_oracle(
    processes: ProcessPool,
    reference: Oracle,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
) -> None:
    # Fewer microbatches than stages, as many, more, and no multiple; of the second order the ends.
    pp = language[1]
    counts = {1, pp, pp + 1, 6} if order == ORDERS[0] else {1, pp + 1}
    check(processes, reference, layouts_of(encoder, language, order), tuple(sorted(counts)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("encoder", "language"), [t for t in TUPLES if t[1][1] == 1])
@pytest.mark.parametrize("schedule", ["lookahead=1", "lookahead=2"])
def test_lookahead_equals_the_oracle(
    processes: ProcessPool,
    reference: Oracle,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
    schedule: str,
) -> None:
    layouts = layouts_of(encoder, language, order)
    check(processes, reference, layouts, (1, 5), schedule=schedule)


def test_lookahead_of_the_whole_step_is_three_phase(processes: ProcessPool) -> None:
    layouts = layouts_of((2, 4), (4, 1, 2), ORDERS[0])
    work = partial(steps_on_rank, layouts=layouts, counts=(3,), options={})
    phases, ahead = (
        processes.run(8, partial(work, schedule=how)) for how in ("three_phase", "lookahead=7")
    )
    for one, other in zip(phases, ahead, strict=True):
        assert one[0].loss == other[0].loss
        for name, gradient in one[0].gradients.items():
            assert torch.equal(other[0].gradients[name], gradient), name


@pytest.mark.parametrize("schedule", ["three_phase", "lookahead=2"])
@pytest.mark.parametrize("encoder", [(2, 4), (4, 2)])
def test_reductions_that_overlap_backward(
    processes: ProcessPool, reference: Oracle, encoder: tuple[int, int], schedule: str
) -> None:
    # From the second step on, Megatron reduces inside backward, once a bucket has as many gradients
    # as in the first: so a chunk that is not the last must not count, and the chunks vary.
    layouts = layouts_of(encoder, (2, 1, 4), ORDERS[0])
    check(processes, reference, layouts, (5, 3, 5), schedule=schedule, overlap=True, detail=True)


def held_on_rank(_: int, layouts: dict[str, Layout], schedule: str) -> list[tuple[int, int]]:
    """After each encoder call of a step of 5 microbatches: how many calls ran, how many await
    backward."""
    seen, calls, done = [], 0, 0
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
            encoder: Any = model.modality_submodules["images"]

            def entered(*unused: Any) -> None:
                nonlocal calls
                calls += 1
                seen.append((calls, calls - done))

            def left(*unused: Any) -> None:
                nonlocal done
                done += 1

            encoder.register_forward_hook(entered)
            encoder.module.encoders["vit"].outward.register_full_backward_hook(left)
            program.forward_backward(
                batches(5), num_microbatches=5, loss_func=mimo.loss_func, force_all_reduce=True
            )
    assert calls == done
    return seen


@pytest.mark.parametrize(
    ("schedule", "calls"), [("three_phase", 1), ("lookahead=1", 5), ("lookahead=2", 3)]
)
def test_one_chunk_of_activations_is_alive(
    processes: ProcessPool, schedule: str, calls: int
) -> None:
    layouts = layouts_of((1, 2), (2, 1, 1), ORDERS[0])
    seen = processes.run(2, partial(held_on_rank, layouts=layouts, schedule=schedule))
    assert seen == [[(call, 1) for call in range(1, calls + 1)]] * 2


def refused_on_rank(_: int, layouts: dict[str, Layout], schedule: str, count: int) -> str:
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        try:
            with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
                program.forward_backward(
                    [mimo.batch(6)] * count, num_microbatches=count, loss_func=mimo.loss_func
                )
        except LayoutError as error:
            return str(error)
    return "not refused"


def test_lookahead_is_refused_where_stages_are_apart(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 4), (2, 2, 1), ORDERS[0])
    work = partial(refused_on_rank, layouts=layouts, schedule="lookahead=2", count=2)
    for text in processes.run(4, work):
        assert "'lookahead=2'" in text and "language (tp2 pp2 dp1)" in text
        assert text.endswith("Write schedule='three_phase', or pp1.")


def test_a_chunk_of_images_that_do_not_divide(processes: ProcessPool, reference: Oracle) -> None:
    # Chunks of 12 and of 6 images over 4 slots: the last ones are cut 2, 2, 1, 1.
    layouts = layouts_of((1, 4), (4, 1, 1), ORDERS[0])
    check(processes, reference, layouts, (3,), schedule="lookahead=2", size=6)


@pytest.mark.parametrize(
    "text", ["fast", "lookahead", "lookahead=0", "lookahead=x", "three", "filled=0", "filled=1,"]
)
def test_unknown_schedules(text: str) -> None:
    with pytest.raises(LayoutError, match="write schedule='three_phase', or 'lookahead=2'"):
        Schedule.parse(text, ("language", Layout()))


def identity_on_rank(_: int, layouts: dict[str, Layout], microbatches: int) -> bool:
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False)
        with colocc.compile(model, layouts, groups=groups) as program:
            assert program.redistributions
            check_identity(program, num_microbatches=microbatches, batch_size=BATCH)
    return True


@pytest.mark.parametrize("order", ORDERS)
def test_identity_coded_rows_arrive(processes: ProcessPool, order: str) -> None:
    layouts = layouts_of((1, 8), (2, 2, 2), order)
    assert all(processes.run(8, partial(identity_on_rank, layouts=layouts, microbatches=3)))


def forward_only_on_rank(_: int, layouts: dict[str, Layout]) -> tuple[list[Any], bool]:
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups) as program:
            model.zero_grad_buffer()
            logs = program.forward_backward(
                batches(3), num_microbatches=3, loss_func=mimo.loss_func, forward_only=True
            )
            modules: list[Any] = list(program.trainable().values())
            untouched = all(not p.main_grad.any() for m in modules for p in m.parameters())
            return [log["loss"] for log in logs], untouched


def test_forward_only(processes: ProcessPool, reference: Oracle) -> None:
    layouts = layouts_of((2, 4), (2, 2, 2), ORDERS[1])
    ranks = processes.run(8, partial(forward_only_on_rank, layouts=layouts))
    (wanted,) = reference.get((3,), 2, ("images",), BATCH, ())
    dp = layouts["language"].coordinates("dp")
    sums = {int(dp[rank]): losses for rank, (losses, _) in enumerate(ranks) if losses}
    total = sum(loss for losses in sums.values() for loss, _ in losses)
    tokens = sum(count for losses in sums.values() for _, count in losses)
    assert total / tokens == pytest.approx(wanted.loss, rel=1e-5)
    assert all(untouched for _, untouched in ranks)


LENGTHS = (12, 10, 12)


def of_lengths() -> list[dict[str, Any]]:
    """Microbatches of LENGTHS tokens."""
    return [mimo.batch(BATCH, seed=index, length=length) for index, length in enumerate(LENGTHS)]


def lengths_on_rank(_: int, layouts: dict[str, Layout], schedule: str, variable: bool) -> Any:
    """What is said of microbatches of several lengths, and of a seq_length that none has; or the
    gradients."""
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model: Any = mimo.build(groups, layouts)
        model.language_model.module.config.variable_seq_lengths = variable
        with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
            run = partial(
                program.forward_backward, num_microbatches=len(LENGTHS), loss_func=mimo.loss_func
            )
            said = []
            for given, length in ((of_lengths(), None), (batches(3), 13)) * (not variable):
                with pytest.raises(LayoutError) as error:
                    run(given, seq_length=length)
                said.append(str(error.value))
            model.zero_grad_buffer()
            logs = run(of_lengths() if variable else batches(3), force_all_reduce=True)
            return said, observed(program, [log["loss"] for log in logs], microbatches=3)


def of_lengths_on_one_rank(_: int) -> Run:
    layouts = {"images": Layout(), "language": Layout()}
    with cpu.ranks(), float64(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False)
        return oracle(model, of_lengths(), mimo.loss_func, replicas=1)


def test_lengths_that_differ_need_stages_that_expect_them(processes: ProcessPool) -> None:
    work = partial(lengths_on_rank, layouts=layouts_of((1, 2), (1, 2, 1), ORDERS[0]))
    for schedule in ("three_phase", "filled"):
        (said, _), (other, _) = processes.run(2, partial(work, schedule=schedule, variable=False))
        assert said == other
        assert "input_ids of microbatch 1 has 10 tokens, of microbatch 0 12: the stages" in said[0]
        assert "seq_length is 13, the hidden states that the stages of language" in said[1]
    (wanted,) = processes.run(1, of_lengths_on_one_rank)
    ranks = processes.run(2, partial(work, schedule="three_phase", variable=True))
    compare(
        [Run(gradients=run.gradients) for _, run in ranks],
        Run(gradients=wanted.gradients),
        tolerance=1e-5,
        noise=1e-9,
    )

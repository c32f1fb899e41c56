"""Covers runtime/schedule.py and gradients.py: every layout against the one-process float64
oracle."""

import contextlib
import warnings
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import colocc
from colocc import Layout, LayoutError
from colocc.runtime import cpu
from colocc.runtime.schedule import Schedule
from colocc.testing import (
    MUTATIONS,
    Run,
    check_identity,
    compare,
    float64,
    full_weights,
    mutated,
    observed,
    oracle,
    relative_l2,
    watch_input,
)
from tests import mimo
from tests.harness import ProcessPool

# Design section 7: encoder tp,dp -> language tp,pp,dp, on 8 ranks.
TUPLES = [
    ((2, 4), (4, 1, 2)),
    ((4, 2), (2, 1, 4)),
    ((4, 2), (4, 1, 2)),
    ((2, 4), (2, 2, 2)),
    ((4, 2), (2, 2, 2)),
    ((1, 8), (4, 2, 1)),
    ((4, 2), (1, 2, 4)),
    ((1, 8), (2, 2, 2)),
    ((8, 1), (1, 1, 8)),
    ((8, 1), (2, 2, 2)),
    ((2, 4), (1, 4, 2)),
]
ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-pp-dp"]
BATCH = 8
ONE = {"images": Layout(), "language": Layout()}


def layouts_of(encoder: tuple[int, int], language: tuple[int, int, int], order: str) -> Any:
    tp, pp, dp = language
    return {
        "images": Layout(tp=encoder[0], dp=encoder[1], order=order),
        "language": Layout(tp=tp, pp=pp, dp=dp, order=order),
    }


def batches(
    count: int, names: tuple[str, ...] = ("images",), size: int = BATCH
) -> list[dict[str, Any]]:
    return [mimo.batch(size, names, seed=index) for index in range(count)]


def encoders(layouts: dict[str, Layout]) -> tuple[str, ...]:
    return tuple(name for name in layouts if name != "language")


# ---------------------------------------------------------------- what the ranks run


def reference_on_rank(
    _: int,
    counts: tuple[int, ...],
    replicas: int,
    names: tuple[str, ...],
    size: int,
    options: dict[str, Any],
) -> list[Run]:
    layouts = {name: Layout() for name in (*names, "language")}
    with cpu.ranks(), float64(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False, **options)
        per_token = options.get("per_token", True)
        return [
            oracle(
                model,
                batches(count, names, size),
                mimo.loss_func,
                replicas=replicas,
                per_token=per_token,
            )
            for count in counts
        ]


def steps_on_rank(
    _: int,
    layouts: dict[str, Layout],
    counts: tuple[int, ...],
    options: dict[str, Any],
    mutation: str | None = None,
    double: bool = False,
    schedule: str = "three_phase",
    size: int = BATCH,
) -> list[Run]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        if double:
            stack.enter_context(float64())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts, **options)
        program = stack.enter_context(
            colocc.compile(model, layouts, groups=groups, schedule=schedule)
        )
        if mutation is not None:
            stack.enter_context(mutated(program, mutation))
        runs = []
        for count in counts:
            seen: list[torch.Tensor] = []
            model.zero_grad_buffer() if not options.get("frozen") else _zero(program)
            with watch_input(model.language_model, seen):
                logs = program.forward_backward(
                    batches(count, encoders(layouts), size),
                    num_microbatches=count,
                    loss_func=mimo.loss_func,
                    force_all_reduce=True,
                )
            losses = [log["loss"] for log in logs]
            runs.append(observed(program, losses, seen, microbatches=count))
        return runs


def _zero(program: colocc.Program) -> None:
    modules: list[Any] = list(program.trainable().values())
    for module in modules:
        module.zero_grad_buffer()


# ---------------------------------------------------------------- the oracle, once each


class Oracle:
    """References by (microbatch counts, replicas, encoders, samples, options), each run once."""

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool
        self.get = cache(self._get)

    def _get(
        self,
        counts: tuple[int, ...],
        replicas: int,
        names: tuple[str, ...],
        size: int,
        options: Any,
    ) -> list[Run]:
        work = partial(
            reference_on_rank,
            counts=counts,
            replicas=replicas,
            names=names,
            size=size,
            options=dict(options),
        )
        return self.pool.run(1, work)[0]


@pytest.fixture(scope="module")
def reference(processes: ProcessPool) -> Oracle:
    return Oracle(processes)


def check(
    pool: ProcessPool,
    reference: Oracle,
    layouts: dict[str, Layout],
    counts: tuple[int, ...],
    *,
    mutation: str | None = None,
    double: bool = False,
    tolerance: float = 1e-5,
    schedule: str = "three_phase",
    size: int = BATCH,
    **options: Any,
) -> None:
    """Run the layouts and compare every rank with the oracle; raises AssertionError where they
    differ."""
    options["layers"] = max(2, layouts["language"].pp)
    work = partial(
        steps_on_rank,
        layouts=layouts,
        counts=counts,
        options=options,
        mutation=mutation,
        double=double,
        schedule=schedule,
        size=size,
    )
    ranks = pool.run(layouts["language"].size, work)
    wanted = reference.get(
        counts,
        layouts["language"].dp,
        encoders(layouts),
        size,
        tuple(
            sorted(
                (name, value)
                for name, value in options.items()
                if name not in ("overlap", "recompute")
            )
        ),
    )
    for index, (count, run) in enumerate(zip(counts, wanted, strict=True)):
        seen = [rank[index] for rank in ranks]
        compare(seen, run, tolerance=tolerance, noise=1e-9)
        inputs = {place for rank in seen for place in rank.inputs}
        assert inputs == run.inputs.keys()
        if options.get("per_token", True):
            check_loss(seen, run, layouts["language"], batches(count, size=size))


def check_loss(
    seen: list[Run],
    run: Run,
    language: Layout,
    given: list[dict[str, Any]],
    *,
    rel: float = 1e-5,
) -> None:
    """The sums of the replicas' losses over the oracle's tokens are the oracle's loss."""
    leaders = {
        int(language.coordinates("dp")[rank]): seen[rank].loss
        for rank in range(language.size)
        if seen[rank].loss is not None
    }
    assert len(leaders) == language.dp
    tokens = sum(int(batch["loss_mask"].sum()) for batch in given)
    total = sum(loss for loss in leaders.values() if loss is not None) / tokens
    assert run.loss is not None
    assert total == pytest.approx(run.loss, rel=rel)


# ---------------------------------------------------------------- tests


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
    check(processes, reference, layouts, (5, 3, 5), schedule=schedule, overlap=True)


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


@pytest.mark.parametrize("order", ORDERS)
def test_in_float64_the_error_is_rounding(
    processes: ProcessPool, reference: Oracle, order: str
) -> None:
    layouts = layouts_of((2, 4), (2, 2, 2), order)
    check(processes, reference, layouts, (3,), double=True, tolerance=1e-12)


@pytest.mark.parametrize("language", [(4, 1, 2), (2, 2, 2), (1, 2, 4)])
def test_mean_losses(
    processes: ProcessPool, reference: Oracle, language: tuple[int, int, int]
) -> None:
    layouts = layouts_of((4, 2), language, ORDERS[0])
    check(processes, reference, layouts, (3,), per_token=False)


@pytest.mark.parametrize("schedule", ["three_phase", "filled"])
def test_recomputed_encoder(processes: ProcessPool, reference: Oracle, schedule: str) -> None:
    layouts = layouts_of((1, 2), (1, 2, 1), ORDERS[0])
    check(processes, reference, layouts, (3,), schedule=schedule, recompute=True)


def lost_on_rank(_: int, layouts: dict[str, Layout]) -> str:
    """An encoder that is recomputed from pixels, which require no grad, by torch's old way."""
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        encoder: Any = model.modality_submodules["images"]
        vit = encoder.module.encoders["vit"]
        forward = vit.forward
        vit.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
        with (
            warnings.catch_warnings(action="ignore"),
            colocc.compile(model, layouts, groups=groups) as program,
            pytest.raises(LayoutError, match="images has parameters to train, and its output"),
        ):
            program.forward_backward(batches(2), num_microbatches=2, loss_func=mimo.loss_func)
    return "refused"


def test_recomputation_that_loses_gradients_is_refused(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 2), (2, 1, 1), ORDERS[0])
    assert processes.run(2, partial(lost_on_rank, layouts=layouts)) == ["refused"] * 2


def test_tied_embeddings(processes: ProcessPool, reference: Oracle) -> None:
    check(processes, reference, layouts_of((2, 4), (2, 2, 2), ORDERS[0]), (3,), tied=True)


def test_sequence_parallel_language(processes: ProcessPool) -> None:
    layouts = layouts_of((2, 4), (2, 2, 2), ORDERS[0])
    plain = processes.run(8, partial(steps_on_rank, layouts=layouts, counts=(2,), options={}))
    work = partial(steps_on_rank, layouts=layouts, counts=(2,), options={"sequence_parallel": True})
    for one, other in zip(plain, processes.run(8, work), strict=True):
        for name, gradient in one[0].gradients.items():
            assert relative_l2(other[0].gradients[name], gradient) < 1e-5, name


def test_several_encoders(processes: ProcessPool, reference: Oracle) -> None:
    layouts = {
        "images": Layout(tp=2, dp=4),
        "audio": Layout(tp=8),
        "language": Layout(tp=2, pp=2, dp=2),
    }
    check(processes, reference, layouts, (2,))


def test_frozen_encoder(processes: ProcessPool, reference: Oracle) -> None:
    layouts = {
        "images": Layout(tp=2, dp=4),
        "audio": Layout(tp=8),
        "language": Layout(tp=2, pp=2, dp=2),
    }
    check(processes, reference, layouts, (2,), frozen=("images",))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mutation_turns_the_oracle_red(
    processes: ProcessPool, reference: Oracle, mutation: str
) -> None:
    # Fan-out: the adjoint gathers, so that zero padding loses something.
    layouts = layouts_of((4, 2), (1, 2, 4), ORDERS[0])
    with pytest.raises(AssertionError, match="differ from the oracle"):
        check(processes, reference, layouts, (3,), mutation=mutation)


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


def trained_on_rank(_: int, layouts: dict[str, Layout], how: str) -> tuple[Any, Any, Any]:
    """(weights before, weights after, losses) of a few optimizer steps through the program."""
    from megatron.core.optimizer import OptimizerConfig

    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups) as program:
            adam = how == "adam"
            options = {"optimizer": how, "lr": 1e-3 if adam else 0.1, "clip_grad": 1.0 * adam}
            optimizer = program.optimizer(OptimizerConfig(**options, weight_decay=0.0))
            before = full_weights(program.trainable(), groups)
            losses = []
            for _step in range(10 if adam else 3):
                model.zero_grad_buffer()
                optimizer.zero_grad()
                logs = program.forward_backward(
                    batches(2), num_microbatches=2, loss_func=mimo.loss_func
                )
                success, _norm, _zeros = optimizer.step()
                assert success
                losses.append([log["loss"] for log in logs])
            return before, full_weights(program.trainable(), groups), losses


def _mean_losses(ranks: list[Any], language: Layout) -> list[float]:
    leaders = {
        int(language.coordinates("dp")[r]): log[2] for r, log in enumerate(ranks) if log[2][0]
    }
    steps = zip(*leaders.values(), strict=True)
    return [
        sum(total for log in step for total, _ in log) / sum(n for log in step for _, n in log)
        for step in steps
    ]


@pytest.mark.parametrize("how", ["sgd", "adam"])
def test_training_through_the_optimizer(processes: ProcessPool, how: str) -> None:
    layouts = layouts_of((2, 4), (2, 2, 2), ORDERS[0])
    ((before, after, _),) = single = processes.run(
        1, partial(trained_on_rank, layouts=ONE, how=how)
    )
    ranks = processes.run(8, partial(trained_on_rank, layouts=layouts, how=how))
    wanted = _mean_losses(single, ONE["language"])
    assert _mean_losses(ranks, layouts["language"]) == pytest.approx(wanted, rel=1e-4)
    assert wanted[-1] < wanted[0]
    if how == "adam":
        return
    seen = set()
    for start, end, _ in ranks:
        for name, weight in end.items():
            moved, reference = weight - start[name], after[name] - before[name]
            seen.add(name)
            if reference.norm() > 1e-7:
                assert relative_l2(moved, reference) < 1e-4, name
    assert seen == after.keys()


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

"""Covers runtime/gradients.py: losses, modules and optimizers of every kind against the oracle."""

import warnings
from functools import partial
from typing import Any

import pytest
from torch.utils.checkpoint import checkpoint

import colocc
from colocc import Layout, LayoutError
from colocc.runtime import cpu
from colocc.testing import MUTATIONS, full_weights, global_names, relative_l2
from tests import mimo
from tests.harness import ProcessPool
from tests.oracle import ORDERS, Oracle, batches, check, layouts_of, steps_on_rank

ONE = {"images": Layout(), "language": Layout()}
# What the second of two stages of the language module has.
SECOND = ("decoder.layers.1.", "decoder.final_layernorm.", "output_layer.")


@pytest.mark.parametrize("order", ORDERS)
def test_in_float64_the_error_is_rounding(
    processes: ProcessPool, reference: Oracle, order: str
) -> None:
    layouts = layouts_of((2, 4), (2, 2, 2), order)
    check(processes, reference, layouts, (3,), double=True, tolerance=1e-12, detail=True)


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
    check(processes, reference, layouts, (2,), detail=True)


def test_frozen_encoder(processes: ProcessPool, reference: Oracle) -> None:
    layouts = {
        "images": Layout(tp=2, dp=4),
        "audio": Layout(tp=8),
        "language": Layout(tp=2, pp=2, dp=2),
    }
    check(processes, reference, layouts, (2,), frozen=("images",), detail=True)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mutation_turns_the_oracle_red(
    processes: ProcessPool, reference: Oracle, mutation: str
) -> None:
    # Fan-out: the adjoint gathers, so that zero padding loses something.
    layouts = layouts_of((4, 2), (1, 2, 4), ORDERS[0])
    with pytest.raises(AssertionError, match="differ from the oracle"):
        check(processes, reference, layouts, (3,), mutation=mutation)


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


def frozen_stage_on_rank(rank: int, layouts: dict[str, Layout], bare: bool) -> Any:
    """The norms of two steps and how the weights moved, where all that the second of two stages
    has is frozen; or what is said where it is ``bare`` of DDP there."""
    from megatron.core.optimizer import OptimizerConfig

    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model: Any = mimo.build(groups, layouts)
        for name, weight in global_names(model.language_model):
            weight.requires_grad_(not name.startswith(SECOND))
        if bare and rank == 1:
            model.language_model = model.language_model.module
        with colocc.compile(model, layouts, groups=groups) as program:
            config = OptimizerConfig(optimizer="sgd", lr=0.1, clip_grad=1.0, weight_decay=0.0)
            if bare:
                with pytest.raises(LayoutError) as error:
                    program.optimizer(config)
                return str(error.value)
            optimizer = program.optimizer(config)
            before, norms = full_weights(program.trainable(), groups), []
            for _step in range(2):
                for module in program.trainable().values():
                    module.zero_grad_buffer()  # type: ignore[operator]
                optimizer.zero_grad()
                program.forward_backward(batches(3), num_microbatches=3, loss_func=mimo.loss_func)
                success, norm, _zeros = optimizer.step()
                assert success
                norms.append(float(norm))
            after = full_weights(program.trainable(), groups)
            return norms, {name: after[name] - weight for name, weight in before.items()}


def test_a_frozen_stage_takes_part_in_the_optimizer(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 2), (1, 2, 1), ORDERS[0])
    work = partial(frozen_stage_on_rank, bare=False)
    ((norms, moved),) = processes.run(1, partial(work, layouts=ONE))
    seen = set()
    for found, weights in processes.run(2, partial(work, layouts=layouts), timeout=60):
        assert found == pytest.approx(norms, rel=1e-5)
        seen |= weights.keys()
        for name, weight in weights.items():
            if moved[name].norm() > 1e-7:
                assert relative_l2(weight, moved[name]) < 1e-4, name
    frozen = {name for name in moved if name.removeprefix("language.").startswith(SECOND)}
    assert frozen and seen == moved.keys() - frozen
    assert not any(moved[name].any() for name in frozen)


def test_a_frozen_stage_without_ddp_is_refused_on_every_rank(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 2), (1, 2, 1), ORDERS[0])
    work = partial(frozen_stage_on_rank, layouts=layouts, bare=True)
    one, other = processes.run(2, work, timeout=60)
    assert one == other
    assert "rank 1: language has parameters to train and is no Megatron" in one

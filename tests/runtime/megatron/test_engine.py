"""Covers runtime/megatron/engine.py: Megatron's own optimizer and DDP train as they are."""

from functools import partial
from typing import Any

import pytest

import colocc
from colocc import Layout
from colocc.runtime import cpu, megatron
from tests import mimo
from tests.harness import ProcessPool

ONE = {"images": Layout(), "language": Layout()}


def legacy_on_rank(_: int, order: str) -> tuple[str, int, list[tuple[float, int]], bool]:
    """A script that has initialised parallel_state and trains both modules in that one layout."""
    from megatron.core import parallel_state

    with cpu.ranks():
        parallel_state.initialize_model_parallel(2, 1, order=order)
        layout = Layout.from_parallel_state()
        layouts = {"images": layout, "language": layout}
        with colocc.process_groups(layouts) as groups:
            model = mimo.build(groups, layouts)
            with colocc.compile(model, layouts, groups=groups) as program:
                model.zero_grad_buffer()
                logs = program.forward_backward(
                    [mimo.batch(8)], num_microbatches=1, loss_func=mimo.loss_func
                )
                adopted = groups["language"].tp is parallel_state.get_tensor_model_parallel_group()
                return str(layout), len(program.redistributions), logs[0]["loss"], adopted


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "dp-tp-cp-ep-pp"])
def test_a_legacy_script_compiles_without_a_bridge(processes: ProcessPool, order: str) -> None:
    ranks = processes.run(8, partial(legacy_on_rank, order=order), detail=True)
    (name,) = {layout for layout, _, _, _ in ranks}
    layout = Layout.parse(name)
    assert layout.same_grid(Layout(tp=2, dp=4, order=order))
    assert {count for _, count, _, _ in ranks} == {0}
    assert all(adopted for _, _, _, adopted in ranks)
    losses: dict[int, Any] = {
        int(layout.coordinates("dp")[rank]): loss for rank, (_, _, loss, _) in enumerate(ranks)
    }
    assert sum(count for _, count in losses.values()) == int(mimo.batch(8)["loss_mask"].sum())


def train_on_rank(
    _: int,
    layouts: dict[str, Layout],
    distributed: bool,
    schedule: str = "three_phase",
    overlap: bool = False,
    cuda_graphs: bool = False,
) -> list[tuple[float, list[tuple[float, int]]]]:
    """Three steps of Adam: the norm of the gradients and the losses of each."""
    from megatron.core.optimizer import OptimizerConfig

    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(
            groups,
            layouts,
            distributed_optimizer=distributed,
            overlap=overlap,
            bucket_size=100 if overlap else None,
            gather=overlap,
        )
        with colocc.compile(
            model, layouts, groups=groups, schedule=schedule, cuda_graphs=cuda_graphs
        ) as program:
            optimizer = program.optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=1e-3,
                    weight_decay=0.0,
                    clip_grad=1.0,
                    use_distributed_optimizer=distributed,
                    overlap_param_gather=overlap,
                )
            )
            losses: list[tuple[float, list[tuple[float, int]]]] = []
            for _step in range(3):
                model.zero_grad_buffer()
                optimizer.zero_grad()
                logs = program.forward_backward(
                    [mimo.batch(8), mimo.batch(8, seed=1)],
                    num_microbatches=2,
                    loss_func=mimo.loss_func,
                )
                _, norm, _ = optimizer.step()
                losses.append((norm, [log["loss"] for log in logs]))
            return losses


def check_trained(found: list[Any], wanted: list[Any]) -> None:
    """Norms and losses of every step on every rank are those ``wanted``."""
    for one, other in zip(found, wanted, strict=True):
        for (norm, logs), (wanted_norm, wanted_logs) in zip(one, other, strict=True):
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
            assert logs == [pytest.approx(log, rel=1e-5) for log in wanted_logs]


def test_the_distributed_optimizer_steps_as_the_plain_one(processes: ProcessPool) -> None:
    layouts = {"images": Layout(tp=2, dp=4), "language": Layout(tp=2, pp=2, dp=2)}
    plain = processes.run(1, partial(train_on_rank, layouts=ONE, distributed=False))[0]
    work = partial(train_on_rank, layouts=layouts, distributed=True)
    ranks = processes.run(8, work, detail=True)
    leaders = {int(layouts["language"].coordinates("dp")[r]): run for r, run in enumerate(ranks)}
    for step, (norm, logs) in enumerate(plain):
        assert [run[step][0] for run in ranks] == pytest.approx([norm] * 8, rel=1e-4)
        shares = [log for run in leaders.values() for log in run[step][1]]
        total, tokens = (sum(part) for part in zip(*shares, strict=True))
        wanted, count = (sum(part) for part in zip(*logs, strict=True))
        assert tokens == count
        assert total == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("language", "schedule"),
    [(Layout(pp=2), "three_phase"), (Layout(pp=2), "filled=1"), (Layout(tp=2), "lookahead=1")],
)
def test_parameters_gathered_behind_the_step_before(
    processes: ProcessPool, language: Layout, schedule: str
) -> None:
    work = partial(
        train_on_rank,
        layouts={"images": Layout(dp=2), "language": language},
        distributed=True,
        schedule=schedule,
    )
    check_trained(processes.run(2, partial(work, overlap=True)), processes.run(2, work))


def weights_on_rank(rank: int) -> tuple[int, int]:
    """The weights that this stage multiplies by, and what its table of words holds."""
    layouts = {"images": Layout(dp=2), "language": Layout(pp=2)}
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        language: Any = mimo.build(groups, layouts).language_model
        every = sum(weight.numel() for weight in language.parameters())
        return sum(weight.numel() for weight in megatron.weights_in_products(language)), every


def test_tables_of_embeddings_are_not_multiplied_with(processes: ProcessPool) -> None:
    (first, whole), (last, every) = processes.run(2, weights_on_rank)
    # One row for each word, one for each position.
    assert whole - first == (mimo.VOCABULARY + mimo.LENGTH) * mimo.HIDDEN
    assert last == every

"""Training steps of the small MimoModel on any layouts, and the one-process float64 oracle of
each."""

import contextlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout
from colocc.runtime import cpu
from colocc.testing import Run, compare, float64, mutated, observed, oracle, watch_input
from tests import mimo
from tests.harness import ProcessPool
from tests.passes.solve.pairs import TUPLES as TUPLES

ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-pp-dp"]
BATCH = 8


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
    detail: bool = False,
    on_rank: Callable[..., list[Run]] = steps_on_rank,
    **options: Any,
) -> None:
    """Run the layouts and compare every rank with the oracle; raises AssertionError where they
    differ."""
    options["layers"] = max(2, layouts["language"].pp)
    work = partial(
        on_rank,
        layouts=layouts,
        counts=counts,
        options=options,
        mutation=mutation,
        double=double,
        schedule=schedule,
        size=size,
    )
    ranks = pool.run(layouts["language"].size, work, detail=detail)
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

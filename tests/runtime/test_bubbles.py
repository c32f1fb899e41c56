"""Covers runtime/bubbles.py: what the plan of a step reckons with."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout
from colocc.passes.fill import shortest
from colocc.passes.timeline import Costs, Timeline
from colocc.runtime import bubbles, cpu
from colocc.runtime.costs import Work, costs_of
from tests import mimo
from tests.harness import ProcessPool
from tests.oracle import BATCH, ORDERS, batches, layouts_of

TWO = ((1, 2), (1, 2, 1), ORDERS[0])


def planned_on_rank(_: int, layouts: dict[str, Layout]) -> list[Costs]:
    """What plans of a step with a trained, and then with a frozen encoder reckon with."""
    found = []

    def planned(
        stages: int, choices: Sequence[int], microbatches: int, costs: Costs, **options: Any
    ) -> tuple[tuple[int, ...], Timeline]:
        found.append(costs)
        return shortest(stages, choices, microbatches, costs, **options)

    with pytest.MonkeyPatch.context() as patch, cpu.ranks():
        patch.setattr(bubbles, "shortest", planned)
        with colocc.process_groups(layouts) as groups:
            model: Any = mimo.build(groups, layouts)
            with colocc.compile(model, layouts, groups=groups, schedule="filled=1") as program:
                for learns in (True, False):
                    model.modality_submodules["images"].requires_grad_(learns)
                    for _step in range(2):
                        model.zero_grad_buffer()
                        program.forward_backward(
                            batches(3), num_microbatches=3, loss_func=mimo.loss_func
                        )
    return found


def test_a_plan_reckons_with_the_backward_that_runs(processes: ProcessPool) -> None:
    one, other = processes.run(2, partial(planned_on_rank, layouts=layouts_of(*TWO)))
    assert one == other
    trained, frozen = one
    assert trained.encode_backward == 2 * trained.encode > 0
    assert trained.portion_backward == 2 * trained.portion > 0
    assert frozen == replace(trained, encode_backward=0.0, portion_backward=0.0)


def reckoned_on_rank(_: int, layouts: dict[str, Layout]) -> tuple[list[Work], Work, dict[str, Any]]:
    """What a plan asks for the costs of, beside the weights and matrices of the modules here."""
    found: list[Any] = []

    def recorded(stages: list[Work], encoder: Work, **given: Any) -> Costs:
        found.append((stages, encoder, given))
        return costs_of(stages, encoder, **given)

    with pytest.MonkeyPatch.context() as patch, cpu.ranks():
        patch.setattr(bubbles, "costs_of", recorded)
        with colocc.process_groups(layouts) as groups:
            model: Any = mimo.build(groups, layouts)
            with colocc.compile(model, layouts, groups=groups, schedule="filled") as program:
                model.zero_grad_buffer()
                program.forward_backward(batches(2), num_microbatches=2, loss_func=mimo.loss_func)
                ((stages, encoder, given),) = found
                weights = list(program.encoder_module.parameters())
                matrices = [weight for weight in weights if weight.dim() > 1]
                assert encoder == (sum(map(torch.numel, weights)), len(matrices))
                assert len(matrices) < len(weights)
    return stages, encoder, given


def test_a_plan_reckons_with_what_one_rank_does(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 4), (1, 2, 2), ORDERS[0])
    one, *others = processes.run(4, partial(reckoned_on_rank, layouts=layouts))
    assert others == [one] * 3
    stages, _, given = one
    # The second stage has the logits, the first one's table of words is looked up.
    assert 0 < stages[0].products < stages[1].products
    assert 0 < stages[0].weights < stages[1].weights
    # Two replicas have half of the samples each, and so has each of a stage's two slots.
    assert given == {
        "tokens": BATCH // 2 * mimo.LENGTH,
        "rows": BATCH // 2 * mimo.ROWS,
        "captured": False,
        "learns": True,
    }

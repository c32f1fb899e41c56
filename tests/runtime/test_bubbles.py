"""Covers runtime/bubbles.py: what the plan of a step reckons with, and what is tried before it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import colocc
from colocc import Layout, LayoutError
from colocc.passes.fill import shortest
from colocc.passes.timeline import Costs, Timeline
from colocc.runtime import bubbles, cpu
from colocc.runtime.costs import Work, costs_of
from tests import mimo, ragged
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


def kinds_on_rank(_: int, layouts: dict[str, Layout]) -> tuple[list[str], list[list[float]]]:
    """What ``filled`` says of steps with microbatches of several kinds, and the losses of the good
    ones with it and in three phases."""

    def images(each: int) -> list[dict[str, Any]]:
        return [ragged.batch([each] * BATCH, seed=seed) for seed in range(2)]

    good = [images(1), images(3), images(2), images(1)]
    bad = [images(1), images(1), images(1)]
    x, y, z = (step[1]["modality_inputs"]["images"]["vit"] for step in bad)
    x["x"] = torch.nn.functional.pad(x["x"], (0, 0, 0, 1))
    y["y"] = y["x"]
    z["x"] = torch.nn.functional.pad(z["x"], (0, 1))
    said: list[str] = []
    losses: list[list[float]] = []
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        for schedule in ("filled", "three_phase"):
            losses.append([])
            with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
                run = partial(program.forward_backward, num_microbatches=2)
                for step in good:
                    logs = run(step, loss_func=mimo.loss_func)
                    losses[-1] += [log["loss"][0] for log in logs]
                for step in bad if schedule == "filled" else ():
                    with pytest.raises((LayoutError, RuntimeError, TypeError)) as error:
                        run(step, loss_func=mimo.loss_func)
                    said.append(str(error.value))
                for log in run(good[1], loss_func=mimo.loss_func):
                    losses[-1].append(log["loss"][0])
    return said, losses


def test_each_kind_of_microbatch_is_tried_on_all_ranks(processes: ProcessPool) -> None:
    # More stages than microbatches: some encode nothing, and would wait for those that do.
    layouts = layouts_of((1, 4), (1, 4, 1), ORDERS[0])
    ranks = processes.run(4, partial(kinds_on_rank, layouts=layouts))
    for said, (filled, phases) in ranks:
        assert said == ranks[0][0]
        assert filled == pytest.approx(phases)
    (taller, another, wider), (losses, _) = ranks[-1]
    assert len(losses) == 10
    assert "images made 4 rows of sample 0 of microbatch 1, which has 3 placeholders" in taller
    assert "unexpected keyword argument 'y'" in another
    assert "mat1 and mat2 shapes cannot be multiplied" in wider

"""Covers colocc/program.py: a plain module trained on its layouts."""

import copy
import gc
import itertools
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import DebugLevel, get_debug_level, set_debug_level
from torch.nn.parallel import DistributedDataParallel

import colocc
from colocc import Layout, LayoutError
from colocc.testing import relative_l2
from tests.harness import run_threads
from tests.plain import (
    BATCH,
    LAYOUTS,
    MODULES,
    ORDERS,
    Model,
    batch,
    layouts_of,
    model,
    replica,
)

EXACT = 1e-12


def loss_of(output: Tensor) -> Tensor:
    return (output * output.detach().cos()).square().mean()


def train_alone(
    steps: int, frozen: tuple[str, ...]
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Outputs by step, and the gradients of each step, of the model in one process."""
    whole = model()
    freeze(whole, frozen)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    outputs, gradients = [], []
    for step in range(steps):
        optimizer.zero_grad()
        output = whole(**batch(step))
        loss_of(output).backward()
        outputs.append(output.detach())
        gradients.append(grads(whole))
        optimizer.step()
    return outputs, gradients


def freeze(whole: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        whole.get_submodule(name).requires_grad_(False)


def grads(whole: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".module.", "."): p.grad.clone()
        for name, p in whole.named_parameters()
        if p.grad is not None
    }


def wrap(whole: Model, groups: colocc.ProcessGroups, frozen: tuple[str, ...] = ()) -> None:
    for name in set(MODULES) - set(frozen):
        wrapped = DistributedDataParallel(whole.get_submodule(name), process_group=groups[name].dp)
        setattr(whole, name, wrapped)


def train_on_rank(
    _: int, layouts: dict[str, Layout], steps: int, frozen: tuple[str, ...], wrap_first: bool
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """As ``train_alone``, compiled, each module in torch's DDP on its own dp group."""
    mine, outputs, gradients = model(), [], []
    freeze(mine, frozen)
    with colocc.process_groups(layouts) as groups:
        if wrap_first:
            wrap(mine, groups, frozen)
        with colocc.compile(mine, layouts, groups=groups, example_inputs=batch()) as program:
            if not wrap_first:
                wrap(mine, groups, frozen)
            optimizer = torch.optim.SGD(mine.parameters(), lr=0.5)
            for step in range(steps):
                optimizer.zero_grad()
                output = program(**batch(step))
                loss_of(output).backward()
                outputs.append(output.detach())
                gradients.append(grads(mine))
                optimizer.step()
    return outputs, gradients


@pytest.fixture
def unwatched() -> Iterator[None]:
    """Groups that torch's DDP takes: on those that DETAIL watches its logger is a segfault."""
    level = get_debug_level()
    set_debug_level(DebugLevel.OFF)
    yield
    set_debug_level(level)


def check(
    layouts: dict[str, Layout],
    steps: int = 1,
    *,
    frozen: tuple[str, ...] = (),
    wrap_first: bool = False,
) -> None:
    outputs, gradients = train_alone(steps, frozen)
    work = partial(
        train_on_rank, layouts=layouts, steps=steps, frozen=frozen, wrap_first=wrap_first
    )
    for rank, (got, grown) in enumerate(run_threads(8, work)):
        for step in range(steps):
            wanted = replica(outputs[step], layouts["decoder"], rank)
            assert relative_l2(got[step], wanted) < EXACT
            assert grown[step].keys() == gradients[step].keys()
            for name, gradient in gradients[step].items():
                assert relative_l2(grown[step][name], gradient) < EXACT, (rank, step, name)


# ---------------------------------------------------------------- training


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "sizes",
    [
        ((2, 4), (8, 1), (4, 2)),
        ((4, 2), (1, 8), (2, 4)),
        ((8, 1), (2, 4), (1, 8)),
        ((1, 8), (4, 2), (8, 1)),
    ],
)
def test_gradients_equal_the_oracle_s(order: str, sizes: Any) -> None:
    check(layouts_of(order, *sizes))


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("wrap_first", [False, True])
def test_three_steps_of_sgd(wrap_first: bool) -> None:
    check(LAYOUTS, 3, wrap_first=wrap_first)


@pytest.mark.usefixtures("unwatched")
def test_a_frozen_encoder() -> None:
    check(LAYOUTS, 2, frozen=("vision",))


@pytest.mark.usefixtures("unwatched")
def test_equal_layouts_need_no_step() -> None:
    layouts = layouts_of(ORDERS[0], (4, 2), (4, 2), (4, 2))
    program = colocc.compile(model(), layouts, example_inputs=batch())
    assert not program.graph.plans
    check(layouts)


def test_reductions_that_sum_get_no_mean() -> None:
    """A module whose gradients are summed over dp, not averaged, gets a dp-th of what it would."""
    base = model()
    _, (wanted,) = train_alone(1, ())

    def main(rank: int) -> dict[str, Tensor]:
        mine = copy.deepcopy(base)
        with (
            colocc.process_groups(LAYOUTS) as groups,
            colocc.compile(
                mine, LAYOUTS, example_inputs=batch(), reductions={"vision": "sum"}
            ) as program,
        ):
            loss_of(program(**batch())).backward()
            for weight in mine.vision.parameters():
                dist.all_reduce(weight.grad, group=groups["vision"].dp)
            return grads(mine.vision)

    for found in run_threads(8, main):
        for name, gradient in found.items():
            assert relative_l2(gradient, wanted[f"vision.{name}"]) < EXACT


def test_a_rank_with_one_sample_keeps_its_dim() -> None:
    class Squeezed(Model):
        def forward(self, images: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
            both = (self.vision(images) + self.audio(clips))[:, :1]
            out: Tensor = self.decoder(both.squeeze())
            return out

    base, given = Squeezed().double(), batch(size=8)
    wanted = base(**given).detach()
    layouts = {name: Layout(dp=8) for name in MODULES}

    def main(rank: int) -> Tensor:
        made = copy.deepcopy(base)
        with colocc.compile(made, layouts, example_inputs=batch()) as program:
            out: Tensor = program(**given).detach()
            return out

    for rank, output in enumerate(run_threads(8, main)):
        assert output.shape == (1, 3)
        assert relative_l2(output, replica(wanted, layouts["decoder"], rank)) < EXACT


def test_the_batch_dim_may_be_another() -> None:
    class Transposed(Model):
        def forward(self, images: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
            seen, heard = self.vision(images.transpose(0, 1)).transpose(0, 1), self.audio(clips)
            out: Tensor = self.decoder(torch.where(mask.unsqueeze(-1), seen, heard))
            return out

    base = Transposed().double()
    given = {name: value.transpose(0, 1).contiguous() for name, value in batch().items()}
    wanted = base(**given)
    loss_of(wanted).backward()
    gradients = grads(base)
    base.zero_grad()

    def main(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        mine = copy.deepcopy(base)
        dims = dict.fromkeys(given, 1)
        with (
            colocc.process_groups(LAYOUTS) as groups,
            colocc.compile(mine, LAYOUTS, example_inputs=given, batch_dims=dims) as program,
        ):
            output = program(**given)
            loss_of(output).backward()
            for name, module in mine.named_children():
                for weight in module.parameters():
                    assert weight.grad is not None
                    dist.all_reduce(weight.grad, group=groups[name].dp)
                    weight.grad /= LAYOUTS[name].dp
            return output.detach(), grads(mine)

    for rank, (output, found) in enumerate(run_threads(8, main)):
        part = replica(wanted.detach().transpose(0, 1), LAYOUTS["decoder"], rank)
        assert relative_l2(output.transpose(0, 1), part) < EXACT
        for name, gradient in gradients.items():
            assert relative_l2(found[name], gradient) < EXACT, name


def test_no_grad_and_what_stays_after_a_step() -> None:
    base = model()

    def main(rank: int) -> tuple[bool, bool]:
        mine = copy.deepcopy(base)
        with colocc.compile(mine, LAYOUTS, example_inputs=batch()) as program:
            with torch.no_grad():
                silent = program(**batch()).requires_grad
            seen: list[weakref.ref[Tensor]] = []
            hook = mine.vision.register_forward_hook(
                lambda module, args, output: seen.append(weakref.ref(output))
            )
            output = program(**batch())
            loss_of(output).backward()
            hook.remove()
            del output
            return silent, seen[0]() is None

    assert run_threads(8, main) == [(False, True)] * 8


def test_compile_again_destroy_twice_and_a_new_world() -> None:
    base = model()

    def main(rank: int) -> list[Tensor]:
        mine, found = copy.deepcopy(base), []
        first = colocc.compile(mine, LAYOUTS, example_inputs=batch())
        second = colocc.compile(mine, LAYOUTS, example_inputs=batch())
        found.append(first(**batch()).detach())
        first.destroy()
        first.destroy()
        found.append(second(**batch()).detach())
        second.destroy()
        # A trace sees the modules of all threads: none may still run one.
        dist.barrier()
        with colocc.compile(mine, LAYOUTS, example_inputs=batch()) as third:
            found.append(third(**batch()).detach())
        return found

    worlds = [run_threads(8, main) for _ in range(2)]
    for found in itertools.chain(*worlds):
        assert all(torch.equal(output, found[0]) for output in found)


def test_a_model_that_is_let_go_is_freed() -> None:
    """Its groups go with it: torch's caches keep nothing of a compiled model."""
    made = model()
    gone = weakref.ref(made)
    colocc.compile(made, LAYOUTS, example_inputs=batch()).destroy()
    del made
    gc.collect()
    assert gone() is None


def test_without_ranks_it_prints_and_does_not_run() -> None:
    program = colocc.compile(model(), LAYOUTS, example_inputs=batch())
    assert "phase 1  encode" in str(program)
    with pytest.raises(LayoutError, match="Call init_process_group before compile"):
        program(**batch())
    program.destroy()
    sampled = program.samples(num_microbatches=1, batch_size=BATCH, rank=7)
    assert sampled["decoder"] == [(0, sample) for sample in range(8, 16)]
    assert len(sampled["vision"]) == 4 and len(sampled["audio"]) == 16
    with pytest.raises(LayoutError, match="needs a rank"):
        program.samples(num_microbatches=1, batch_size=BATCH)

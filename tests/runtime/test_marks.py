"""Covers runtime/marks.py and when reductions and gathers start where encoders are CUDA graphs: on
recorded operations with marks among them. On real graphs: tests/gpus."""

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import colocc
from colocc import Layout
from colocc.runtime import cpu, megatron
from tests import mimo
from tests.harness import ProcessPool
from tests.runtime.recorded import (
    Held,
    Mark,
    captured,
    close,
    gradients,
    plain,
    recorded_graphs,
    started_early,
    wanted,
    xs,
)


class Bucket:
    """A stand-in for a group of DDP's buckets: notes what it is to reduce."""

    grad_reduce_finished, is_first_batch = False, True

    def __init__(self, name: str, params: list[Any], started: list[str]) -> None:
        self.name, self.params, self.started = name, params, started
        self.grad_reduce_handle: str | None = None

    def start_grad_sync(self, *, force_all_reduce: bool) -> None:
        assert force_all_reduce
        assert self.grad_reduce_handle is None
        self.grad_reduce_handle = self.name
        self.started.append(self.name)


def bucketed(module: Held, started: list[str]) -> list[Bucket]:
    """The weights of the last layer, then those of the first: the order of a backward."""
    layers: Any = module.module
    found = [
        Bucket(name, list(layers[place].parameters()), started)
        for name, place in (("last", 2), ("first", 0))
    ]
    module.bucket_groups, module.expert_parallel_bucket_groups = found, []  # type: ignore[assignment]
    settings = {"overlap_grad_reduce": True, "num_distributed_optimizer_instances": 1}
    module.ddp_config = type("Config", (), {"overlap_param_gather": False} | settings)
    return found


def test_buckets_are_reduced_where_they_are_complete() -> None:
    module, started, seen = Held(plain()), list[str](), list[list[torch.Tensor]]()
    buckets, inputs = bucketed(module, started), xs(2)
    call = captured(module)

    def watch(mark: Mark) -> None:
        seen.append([p.main_grad.clone() for p in module.parameters()])  # type: ignore[attr-defined]

    with cpu.ranks(), recorded_graphs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mark, "watch", staticmethod(watch))
        one, other = (call(x).square().sum() for x in inputs)
        one.backward()
        # Not the last of the step.
        assert (started, len(seen)) == ([], 2)
        with call.last_backward([], force_all_reduce=True):
            third = call(inputs[0]).square().sum()
            third.backward()
            # Another is under way, which adds to the same gradients.
            assert started == []
            seen.clear()
            other.backward()
        assert started == ["last", "first"]
        found = gradients(module)
    close(found, wanted(module.module, [*inputs, inputs[0]]))
    first, last = seen
    names = [name for name, _ in module.named_parameters()]
    for name, there in zip(names, first, strict=True):
        # At the first mark the last layer is complete, and the first has yet to come.
        assert torch.equal(there, found[name]) == name.startswith("module.2"), name
    assert all(torch.equal(there, found[name]) for name, there in zip(names, last, strict=True))
    assert [bucket.grad_reduce_handle for bucket in buckets] == ["last", "first"]


def test_a_bucket_that_no_graph_completes_holds_back_those_behind_it() -> None:
    module, started = Held(plain()), list[str]()
    bucketed(module, started)
    module.module[2].bias.requires_grad_(False)  # type: ignore[index]
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs(), call.last_backward([], force_all_reduce=True):
        call(x).square().sum().backward()
        assert started == []
        megatron.start_reductions(module, force_all_reduce=True)
    assert started == ["last", "first"]


def test_of_several_instances_of_the_optimizer_none_is_started_early() -> None:
    module, started = Held(plain()), list[str]()
    bucketed(module, started)
    module.ddp_config.num_distributed_optimizer_instances = 2
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs(), call.last_backward([], force_all_reduce=True):
        call(x).square().sum().backward()
        megatron.start_reductions(module, force_all_reduce=True)
    assert started == []


def test_several_instances_reduce_behind_the_last_backward_once_ddp_waits_for_one() -> None:
    module, started = Held(plain()), list[str]()
    buckets = bucketed(module, started)
    module.ddp_config.num_distributed_optimizer_instances = 2
    call, (x,) = captured(module), xs(1)
    # A program without graphs has trained it before.
    buckets[0].is_first_batch = buckets[1].is_first_batch = False
    with cpu.ranks(), recorded_graphs(), call.last_backward([], force_all_reduce=True):
        call(x).square().sum().backward()
        assert started == []
        assert not megatron.has_started_reductions(module)
        megatron.start_reductions(module, force_all_reduce=True)
    assert started == ["last", "first"]


def test_what_ddp_reduces_now_counts_and_not_when_it_was_captured() -> None:
    module, started = Held(plain()), list[str]()
    bucketed(module, started)
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs():
        call(x).square().sum().backward()
        module.ddp_config.overlap_grad_reduce = False
        with call.last_backward([], force_all_reduce=True):
            call(x).square().sum().backward()
        assert started == []
        module.ddp_config.overlap_grad_reduce = True
        bucketed(module, started)
        with call.last_backward([], force_all_reduce=True):
            call(x).square().sum().backward()
    # Groups that the marks of the graph know nothing of.
    assert (started, call.captured()) == ([], 1)


class Inside(torch.autograd.Function):
    """Runs a module with a backward inside its backward, as a recomputation does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.x, ctx.module = x, module
        # A recomputation runs with the parameters of the forward.
        ctx.weights = dict(module.named_parameters())
        with torch.no_grad():
            out: torch.Tensor = module(x)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            out = torch.func.functional_call(ctx.module, ctx.weights, (x,))
        torch.autograd.backward(out, gradient)
        return x.grad, None


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)]).double()

    def __getitem__(self, place: int) -> nn.Module:
        return self.layers[place]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, bend, last = self.layers
        # The last layer comes in the middle, too: only there its gradient is complete.
        middle = Inside.apply(first(x), last)  # type: ignore[no-untyped-call]
        out: torch.Tensor = Inside.apply(bend(first(middle)), last)  # type: ignore[no-untyped-call]
        return out


def test_a_weight_that_is_added_to_twice_has_no_mark() -> None:
    module, started = Held(Twice()), list[str]()
    bucketed(module, started)
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs(), call.last_backward([], force_all_reduce=True):
        call(x).square().sum().backward()
        assert started == []
    close(gradients(module), wanted(module.module, [x]))


def test_a_group_whose_gradients_are_made_on_two_streams_has_no_mark() -> None:
    module, started = Held(plain()), list[str]()
    bucketed(module, started)
    call, (x,) = captured(module), xs(1)
    with cpu.ranks(), recorded_graphs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda *unused: torch.cuda.Stream())
        with call.last_backward([], force_all_reduce=True):
            call(x).square().sum().backward()
    assert started == []


class Gathered:
    """A stand-in for a group of DDP's buckets: notes what is done with its parameters."""

    param_gather_dispatched = False

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def start_param_sync(self) -> None:
        self.param_gather_dispatched = True
        self.done.append(f"start {self.name}")

    def finish_param_sync(self, *, skip_next_bucket_dispatch: bool) -> None:
        assert skip_next_bucket_dispatch
        self.done.append(f"finish {self.name}")


@pytest.mark.parametrize("grad", [False, True])
def test_weights_are_gathered_in_one_order_also_where_the_module_runs_as_it_is(grad: bool) -> None:
    module, done = Held(plain()), list[str]()
    module.bucket_groups = [Gathered("last", done), Gathered("first", done)]  # type: ignore[assignment]
    module.expert_parallel_bucket_groups = []  # type: ignore[assignment]
    settings = {"overlap_grad_reduce": False, "overlap_param_gather": True}
    module.ddp_config = type("Config", (), settings)
    call, (x,) = captured(module), xs(1)
    if grad:
        call.reason = "it ran out of memory"
    with cpu.ranks(), recorded_graphs(), torch.set_grad_enabled(grad):
        call(x)
    assert (done[:2], call.captured()) == (["start first", "start last"], 0)
    assert sorted(done[2:]) == ["finish first", "finish last"]


# ---------------------------------------------------------------- the whole step


TWO = {"images": Layout(dp=2), "audio": Layout(dp=2), "language": Layout(tp=2)}


def two_encoders_on_rank(rank: int, graphs: bool, refused: str | None) -> dict[str, torch.Tensor]:
    """Gradients of two encoders over the same ranks; rank 1 cannot capture ``refused``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(TWO))
        model = mimo.build(groups, TWO, overlap=True, bucket_size=100)
        program = stack.enter_context(colocc.compile(model, TWO, groups=groups, cuda_graphs=graphs))
        if graphs:
            stack.enter_context(recorded_graphs())
        early = stack.enter_context(started_early())
        for call in program.captured.values():
            if rank == 1 and call.name == refused:
                call.reason = "it ran out of memory"
        for step in range(2):
            model.zero_grad_buffer()
            program.forward_backward(
                [mimo.batch(8, ("images", "audio"), seed=2 * step + i) for i in range(2)],
                num_microbatches=2,
                loss_func=mimo.loss_func,
                force_all_reduce=True,
            )
        encoders: list[Any] = program.trainable_encoders()
        buckets = sum(len(encoder.bucket_groups) for encoder in encoders)
        if rank == 0 or refused is None:
            assert len(early) == (2 * buckets if graphs else 0)
        return {
            f"{owner}.{name}": megatron.main_gradient(weight).clone()
            for owner, module in program.trainable().items()
            for name, weight in module.named_parameters()
        }


@pytest.mark.parametrize("refused", [None, "images", "audio"])
def test_encoders_that_share_a_communicator_reduce_in_one_order(
    processes: ProcessPool, refused: str | None
) -> None:
    without = processes.run(2, partial(two_encoders_on_rank, graphs=False, refused=None))
    graphs = processes.run(2, partial(two_encoders_on_rank, graphs=True, refused=refused))
    for one, other in zip(without, graphs, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-6, atol=1e-6)


def after_a_failure_on_rank(_: int, schedule: str, fails: bool) -> dict[str, torch.Tensor]:
    """The gradients of a step behind one that failed with its reductions under way."""
    layouts = {"images": Layout(dp=2), "language": Layout(pp=2)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts, overlap=True, bucket_size=100)
        program = stack.enter_context(
            colocc.compile(model, layouts, groups=groups, schedule=schedule, cuda_graphs=True)
        )
        stack.enter_context(recorded_graphs())

        def step(seed: int) -> None:
            model.zero_grad_buffer()
            program.forward_backward(
                [mimo.batch(8, seed=seed + index) for index in range(3)],
                num_microbatches=3,
                loss_func=mimo.loss_func,
                force_all_reduce=True,
            )

        def broken(*unused: Any, **others: Any) -> None:
            raise FloatingPointError("there is a NaN")

        if fails:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("colocc.runtime.schedule.finalize", broken)
                with pytest.raises(FloatingPointError):
                    step(0)
        step(3)
        encoder = program.trainable()["images"]
        return {
            name: megatron.main_gradient(weight).clone()
            for name, weight in encoder.named_parameters()
        }


@pytest.mark.parametrize("schedule", ["three_phase", "filled=2"])
def test_what_a_failed_step_has_started_is_not_taken_for_the_next(
    processes: ProcessPool, schedule: str
) -> None:
    without, behind = (
        processes.run(2, partial(after_a_failure_on_rank, schedule=schedule, fails=fails))
        for fails in (False, True)
    )
    for one, other in zip(without, behind, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            assert torch.equal(other[name], gradient), name


def gathered_on_rank(_: int, schedule: str) -> None:
    from megatron.core.optimizer import OptimizerConfig

    layouts = {"images": Layout(dp=2), "language": Layout(pp=2)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(
            groups, layouts, distributed_optimizer=True, overlap=True, bucket_size=100, gather=True
        )
        program = stack.enter_context(
            colocc.compile(model, layouts, groups=groups, schedule=schedule, cuda_graphs=True)
        )
        stack.enter_context(recorded_graphs())
        optimizer = program.optimizer(OptimizerConfig(optimizer="adam", lr=1e-2))
        step = partial(
            program.forward_backward, num_microbatches=3, loss_func=mimo.loss_func, seq_length=None
        )
        batches = [mimo.batch(8, seed=index) for index in range(3)]
        encoder: Any = model.modality_submodules["images"]
        for _ in range(2):
            optimizer.zero_grad()
            model.zero_grad_buffer()
            step(batches)
            optimizer.step()
        assert not any(group.param_gather_dispatched for group in encoder.bucket_groups)
        with pytest.raises(colocc.LayoutError, match="ended after 2 of 3"):
            step(batches[:2])
        # What the user does next may move weights, and no one waits for the refused step.
        assert all(group.param_gather_handle is None for group in encoder.bucket_groups)
        model.zero_grad_buffer()
        step(batches)
        optimizer.step()
        pending: list[Any] = []

        def look(*unused: Any) -> None:
            pending.extend(group.param_gather_handle for group in encoder.bucket_groups)

        encoder.register_forward_pre_hook(look)
        step(batches, forward_only=True)
        # Megatron's hooks would warn of groups that are under way.
        assert pending
        assert not any(pending)


@pytest.mark.parametrize("schedule", ["three_phase", "filled=2"])
def test_weights_are_gathered_though_the_step_is_refused(
    processes: ProcessPool, schedule: str
) -> None:
    processes.run(2, partial(gathered_on_rank, schedule=schedule))

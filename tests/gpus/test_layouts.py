"""Layouts on GPUs and NCCL against the float64 oracle, in fp32 and bf16.

    export CUDA_DEVICE_MAX_CONNECTIONS=32      # for filled
    torchrun --nproc-per-node 8 --local-ranks-filter 0 -m pytest tests/gpus

On 8 ranks the tuples are those of tests/oracle.py; on 4 and 2 those that fit.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

import colocc
from colocc import Layout
from colocc.runtime.marks import sees_marks
from colocc.testing import Run, check_identity, compare, observed, watch_input
from tests import mimo
from tests.oracle import (
    BATCH,
    ORDERS,
    TUPLES,
    Oracle,
    batches,
    check_loss,
    encoders,
    layouts_of,
)

FEWER = {
    4: [
        ((2, 2), (4, 1, 1)),
        ((1, 4), (4, 1, 1)),
        ((1, 4), (2, 1, 2)),
        ((4, 1), (2, 1, 2)),
        ((4, 1), (1, 1, 4)),
        ((2, 2), (2, 2, 1)),
        ((1, 4), (2, 2, 1)),
        ((4, 1), (2, 2, 1)),
        ((2, 2), (1, 2, 2)),
        ((1, 4), (1, 4, 1)),
    ],
    2: [((1, 2), (2, 1, 1)), ((2, 1), (1, 1, 2)), ((1, 2), (1, 2, 1)), ((2, 1), (1, 2, 1))],
}
# Here the ranks are pytest's own processes, where Megatron and torch warn of what they please.
pytestmark = pytest.mark.filterwarnings("default")

WORLD = int(os.environ.get("WORLD_SIZE", "8"))
HERE = TUPLES if WORLD == 8 else FEWER.get(WORLD, [])
# DDP's options for many small buckets, reduced beside the backward.
BUCKETS: dict[str, Any] = {"overlap": True, "bucket_size": 100}
Keep = Callable[[dict[str, Layout]], None]
# Half a percent of rounding in each of a few dozen matrix products; what a factor of two, a swapped
# sample or a lost microbatch does is above one half.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
NOISE = {torch.float32: 1e-8, torch.bfloat16: 1e-5}


@contextlib.contextmanager
def of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, models and batches are made in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def on_gpu(value: Any) -> Any:
    """A tree of tensors on this rank's GPU, or back on the host if it is there."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), value)


def on_every_rank[R](work: Callable[[], R]) -> list[R]:
    """What ``work`` makes on each rank, on all of them. Raises: the first error of any rank."""
    made: tuple[R | None, str | None]
    try:
        made = work(), None
    except Exception as error:  # noqa: BLE001 - raised below, on every rank
        made = None, f"{type(error).__name__}: {error}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, made)
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
    assert not errors, errors[0]
    return [value for value, _ in found]


def run(
    layouts: dict[str, Layout],
    counts: tuple[int, ...],
    dtype: torch.dtype,
    schedule: str,
    *,
    cuda_graphs: bool = False,
    **options: Any,
) -> list[Run]:
    """A step of each number of microbatches on this rank, of a model built with ``options``."""
    with of(dtype), contextlib.ExitStack() as stack:
        groups = stack.enter_context(colocc.process_groups(layouts))
        layers = max(2, layouts["language"].pp)
        model = mimo.build(groups, layouts, layers=layers, **options)
        program = stack.enter_context(
            colocc.compile(
                model, layouts, groups=groups, schedule=schedule, cuda_graphs=cuda_graphs
            )
        )
        runs = []
        for count in counts:
            seen: list[torch.Tensor] = []
            model.zero_grad_buffer()
            with watch_input(model.language_model, seen):
                logs = program.forward_backward(
                    [on_gpu(batch) for batch in batches(count, encoders(layouts))],
                    num_microbatches=count,
                    loss_func=mimo.loss_func,
                    force_all_reduce=True,
                )
            found = observed(program, [log["loss"] for log in logs], seen, microbatches=count)
            found.inputs = {place: value.cpu() for place, value in found.inputs.items()}
            found.gradients = {name: value.cpu() for name, value in found.gradients.items()}
            runs.append(found)
        if cuda_graphs:
            assert len(program.captured) == len(encoders(layouts))
            for module in program.captured.values():
                assert module.reason is None
                assert module.captured()
        return runs


def check(
    reference: Oracle,
    layouts: dict[str, Layout],
    counts: tuple[int, ...],
    dtype: torch.dtype,
    schedule: str = "three_phase",
    *,
    cuda_graphs: bool = False,
    **options: Any,
) -> None:
    """Every rank's runs against the oracle."""
    ranks = on_every_rank(
        lambda: run(layouts, counts, dtype, schedule, cuda_graphs=cuda_graphs, **options)
    )
    language = layouts["language"]
    sizes = (("layers", max(2, language.pp)),)
    wanted = reference.get(counts, language.dp, encoders(layouts), BATCH, sizes)
    for index, (count, one) in enumerate(zip(counts, wanted, strict=True)):
        seen = [rank[index] for rank in ranks]
        compare(seen, one, tolerance=TOLERANCE[dtype], noise=NOISE[dtype])
        assert {place for rank in seen for place in rank.inputs} == one.inputs.keys()
        rel = 1e-5 if dtype is torch.float32 else 1e-2
        check_loss(seen, one, language, batches(count), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("encoder", "language"), HERE)
def test_layouts_equal_the_oracle(
    reference: Oracle,
    keep_open: Keep,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
    dtype: torch.dtype,
) -> None:
    pp, layouts = language[1], layouts_of(encoder, language, order)
    counts = {1, pp, pp + 1, 6} if order == ORDERS[0] else {1, pp + 1}
    keep_open(layouts)
    check(reference, layouts, tuple(sorted(counts)), dtype)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("schedule", ["lookahead=1", "lookahead=2", "three_phase", "filled"])
@pytest.mark.parametrize(("encoder", "language"), [t for t in HERE if t[0][0] == 1])
def test_schedules_with_and_without_graphs(
    reference: Oracle,
    keep_open: Keep,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    schedule: str,
    cuda_graphs: bool,
) -> None:
    pp = language[1]
    if schedule.startswith("lookahead") == (pp > 1) and schedule != "three_phase":
        pytest.skip("lookahead is for pp1, filled for pipelines")
    layouts = layouts_of(encoder, language, ORDERS[0])
    keep_open(layouts)
    # A step of each kind twice: the first is careful with its messages and captures.
    counts = (pp + 1, 6, 6, pp + 1)
    check(reference, layouts, counts, torch.float32, schedule, cuda_graphs=cuda_graphs)


def test_an_event_inside_a_graph_is_seen_outside(world: int) -> None:
    assert on_every_rank(lambda: sees_marks(torch.cuda.current_device())) == [True] * world


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("schedule", ["lookahead=2", "three_phase", "filled"])
@pytest.mark.parametrize(("encoder", "language"), [t for t in HERE if t[0][0] == 1])
def test_buckets_that_are_reduced_beside_the_last_backward(
    reference: Oracle,
    keep_open: Keep,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    schedule: str,
    cuda_graphs: bool,
) -> None:
    pp = language[1]
    if schedule == ("lookahead=2" if pp > 1 else "filled"):
        pytest.skip("lookahead is for pp1, filled for pipelines")
    layouts = layouts_of(encoder, language, ORDERS[0])
    keep_open(layouts)
    counts = (pp + 1, 6, 6, pp + 1)
    check(
        *(reference, layouts, counts, torch.float32, schedule), cuda_graphs=cuda_graphs, **BUCKETS
    )


def test_two_encoders_whose_reductions_share_a_communicator(
    reference: Oracle, keep_open: Keep
) -> None:
    apart = Layout(dp=WORLD)
    layouts = {"images": apart, "audio": apart, "language": Layout(tp=2, dp=WORLD // 2)}
    keep_open(layouts)
    counts = (2, 6, 6, 2)
    check(*(reference, layouts, counts, torch.float32, "three_phase"), cuda_graphs=True, **BUCKETS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("encoder", "language"), HERE)
def test_identity_coded_rows_arrive(
    keep_open: Keep, encoder: tuple[int, int], language: tuple[int, int, int], order: str
) -> None:
    layouts = layouts_of(encoder, language, order)
    keep_open(layouts)

    def work() -> None:
        with colocc.process_groups(layouts) as groups:
            model = mimo.build(groups, layouts)
            with colocc.compile(model, layouts, groups=groups) as program:
                check_identity(program, num_microbatches=3, batch_size=BATCH)

    on_every_rank(work)


def test_a_dropout_encoder_runs_without_graphs(reference: Oracle) -> None:
    layouts = {"images": Layout(dp=WORLD), "language": Layout(dp=WORLD)}

    def work() -> str | None:
        with colocc.process_groups(layouts) as groups:
            model = mimo.build(groups, layouts)
            encoder: Any = model.modality_submodules["images"]
            encoder.module.encoders["vit"].drop = torch.nn.Dropout(0.1)
            with (
                colocc.compile(model, layouts, groups=groups, cuda_graphs=True) as program,
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", UserWarning)
                model.zero_grad_buffer()
                program.forward_backward(
                    [on_gpu(batch) for batch in batches(2)],
                    num_microbatches=2,
                    loss_func=mimo.loss_func,
                )
            (module,) = program.captured.values()
            return module.reason

    assert on_every_rank(work) == ["it drops out at random"] * WORLD

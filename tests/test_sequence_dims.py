"""Covers compile(sequence_dims=): readers that hold a part of the sequence, against one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import colocc
from colocc import Layout
from colocc.runtime.data import cut_sequence
from colocc.testing import check_identity, relative_l2
from tests.harness import run_threads
from tests.plain import MODULES, Model, contains, model, refused

EXACT = 1e-12
LENGTH = 8
DIMS = {"vision": 1, "audio": 1, "mask": 1, "decoder": 1}
ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-pp-dp", "dp-cp-tp-pp"]


def batch(length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "images": random(24, length, 4, 4),
        "clips": random(24, length, 4),
        "mask": random(24, length) > 0,
    }


def loss_of(output: Tensor) -> Tensor:
    return (output * output.detach().cos()).square().mean()


def gradients_of(whole: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".module.", "."): weight.grad.clone()
        for name, weight in whole.named_parameters()
        if weight.grad is not None
    }


def train_alone() -> tuple[Tensor, dict[str, Tensor]]:
    whole = model()
    output = whole(**batch())
    loss_of(output).backward()
    return output.detach(), gradients_of(whole)


def wrap(whole: Model, groups: colocc.ProcessGroups) -> None:
    for name in MODULES:
        wrapped = DistributedDataParallel(
            whole.get_submodule(name), process_group=groups[name].dp_cp
        )
        setattr(whole, name, wrapped)


def train_on_rank(
    rank: int, layouts: dict[str, Layout], known: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the output, and the gradients; a reader of the whole sequence computes
    the loss of its own part alone."""
    mine, reader = model(), layouts["decoder"]
    with colocc.process_groups(layouts) as groups:
        wrap(mine, groups)
        program = colocc.compile(
            mine,
            layouts,
            groups=groups,
            example_inputs=batch(),
            sequence_dims=DIMS if known else None,
        )
        with program:
            check_identity(program, num_microbatches=1, batch_size=24)
            output = program(**batch())
            part = output if known else cut_sequence(output, 1, reader, rank)
            loss_of(part).backward()
    return part.detach(), gradients_of(mine)


def layouts_of(vision: Layout, audio: Layout, decoder: Layout) -> dict[str, Layout]:
    return {"vision": vision, "audio": audio, "decoder": decoder}


def check(layouts: dict[str, Layout], *, known: bool) -> None:
    output, gradients = train_alone()
    reader = layouts["decoder"]
    work = partial(train_on_rank, layouts=layouts, known=known)
    for rank, (part, found) in enumerate(run_threads(reader.size, work, timeout=60)):
        wanted = output.chunk(reader.dp)[int(reader.coordinates("dp")[rank])]
        assert relative_l2(part, cut_sequence(wanted, 1, reader, rank)) <= EXACT
        assert found.keys() == gradients.keys()
        for name, gradient in found.items():
            assert relative_l2(gradient, gradients[name]) <= EXACT, (rank, name)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_a_reader_with_cp_is_the_model_on_one_process(
    order: str, zigzag: bool, known: bool
) -> None:
    reader = Layout(tp=2, cp=2, dp=2, order=order, zigzag=zigzag)
    sources = Layout(tp=2, dp=4, order=order), Layout(tp=8, order=order)
    check(layouts_of(*sources, reader), known=known)


@pytest.mark.parametrize("known", [True, False])
def test_sources_with_cp(known: bool) -> None:
    reader = Layout(cp=2, dp=3, zigzag=True)
    sources = Layout(cp=2, dp=3, zigzag=True), Layout(tp=2, dp=3)
    if not known:
        check(layouts_of(*sources, reader), known=False)
        return
    # A source that is cut reads its part of its input.
    output, gradients = train_alone()
    assert gradients and output.shape[1] == LENGTH
    check_inputs(layouts_of(*sources, reader))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.decoder = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, clips: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.vision(clips))
        return out


@pytest.mark.parametrize("decoder", [Layout(dp=4), Layout(cp=2, dp=2)], ids=str)
@pytest.mark.parametrize(
    ("left_out", "made"),
    [
        ("vision", "made 4 positions in dim 1 of vision, of 8 a rank has 8"),
        ("clips", "made 8 positions in dim 1 of vision, of 8 a rank has 4"),
    ],
)
def test_a_cut_that_is_named_on_one_side_of_a_module_is_refused(
    left_out: str, made: str, decoder: Layout
) -> None:
    layouts = {"vision": Layout(cp=2, dp=2), "decoder": decoder}
    dims = {name: 1 for name in ("clips", "vision", "decoder") if name != left_out}

    def clips(length: int) -> dict[str, Tensor]:
        return {"clips": batch(length)["clips"]}

    def work(_: int) -> None:
        chain = Chain().double()
        with colocc.compile(
            chain, layouts, example_inputs=clips(12), sequence_dims=dims
        ) as program:
            program(**clips(LENGTH))

    text = refused(4, work)
    contains(text, f"LayoutError: vision (tp1 cp2 dp2) {made}")
    contains(text, "both the inputs that vision reads and vision itself, or neither")


def check_inputs(layouts: dict[str, Layout]) -> None:
    """As ``check``, with the inputs of cut sources named, too."""
    dims = DIMS | {"images": 1, "clips": 1}
    output, gradients = train_alone()

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        mine = model()
        with colocc.process_groups(layouts) as groups:
            wrap(mine, groups)
            with colocc.compile(
                mine, layouts, groups=groups, example_inputs=batch(), sequence_dims=dims
            ) as program:
                part = program(**batch())
                loss_of(part).backward()
        return part.detach(), gradients_of(mine)

    reader = layouts["decoder"]
    for rank, (part, found) in enumerate(run_threads(reader.size, work, timeout=60)):
        wanted = output.chunk(reader.dp)[int(reader.coordinates("dp")[rank])]
        assert relative_l2(part, cut_sequence(wanted, 1, reader, rank)) <= EXACT
        for name, gradient in found.items():
            assert relative_l2(gradient, gradients[name]) <= EXACT, (rank, name)


@pytest.mark.parametrize("sizes", [((2, 3), (3, 2)), ((3, 2), (2, 3))])
def test_dp_that_do_not_divide(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (tp, dp), (reader_tp, reader_dp) = sizes
    source, reader = Layout(tp=tp, dp=dp), Layout(tp=reader_tp, dp=reader_dp)
    check(layouts_of(source, Layout(dp=6), reader), known=False)


CUT = layouts_of(Layout(tp=2, dp=4), Layout(tp=8), Layout(tp=2, cp=2, dp=2, zigzag=True))


def test_a_batch_whose_sequence_cannot_be_cut_is_refused_by_all() -> None:
    def work(rank: int) -> None:
        with colocc.compile(model(), CUT, example_inputs=batch(), sequence_dims=DIMS) as program:
            program(**batch(length=6))

    contains(refused(8, work), "mask of microbatch 0 has a sequence of 6", "6 % 4 = 2")


@pytest.mark.parametrize(
    ("dims", "parts"),
    [
        ({"nobody": 1}, ("sequence_dims has 'nobody': 1", "vision, audio, decoder")),
        ({"vision": -1}, ("sequence_dims has 'vision': -1",)),
        ({"vision": 1, "audio": 1}, ("mask", "may mix positions", "sequence_dims")),
    ],
)
def test_sequence_dims_that_cannot_be_are_refused_by_all(
    dims: dict[str, int], parts: tuple[str, ...]
) -> None:
    def work(rank: int) -> None:
        colocc.compile(model(), CUT, example_inputs=batch(), sequence_dims=dims)

    contains(refused(8, work), *parts)


def test_a_sequence_where_the_samples_are_is_refused_by_all() -> None:
    def work(rank: int) -> None:
        colocc.compile(model(), CUT, example_inputs=batch(), sequence_dims={"mask": 0})

    contains(refused(8, work), "sequence_dims has 'mask': 0", "the dim that holds its samples")

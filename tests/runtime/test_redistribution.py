"""Covers runtime/redistribution.py: rows that name their sample, moved and compared exactly."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.solve.plan import Holding, Plan
from colocc.passes.solve.solver import solve
from colocc.runtime.groups import close_groups, open_groups
from colocc.runtime.holdings import sample_runs
from colocc.runtime.redistribution import Redistribution
from tests.harness import run_threads
from tests.passes.solve.pairs import TUPLES

ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-pp-dp"]
WORLD, COLUMNS = 8, 3
# (rows per unit, batch dim)
CASES = [(1, 0), (5, 0), (4, 1)]

tuples = pytest.mark.parametrize(("encoder", "language"), TUPLES)
orders = pytest.mark.parametrize("order", ORDERS)


def plan_of(
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
    scale: Fraction = Fraction(1),
) -> Plan:
    tp, pp, dp = language
    src = Layout(tp=encoder[0], dp=encoder[1], order=order)
    return solve(
        ("images", src), ("language", Layout(tp=tp, pp=pp, dp=dp, order=order)), scale=scale
    )


def place(language: tuple[int, int, int], order: str, rank: int) -> dict[str, int]:
    """The coordinates of ``rank`` by division, without Layout."""
    sizes, found = dict(zip(("tp", "pp", "dp"), language, strict=True)), {}
    for axis in order.split("-"):
        if axis in sizes:
            rank, found[axis] = divmod(rank, sizes[axis])
    return found


def coded(units: list[int], rows: int, dim: int) -> Tensor:
    """Row r of unit u holds u * rows + r + 1, times the column."""
    codes = torch.tensor([u * rows + r + 1 for u in units for r in range(rows)], dtype=torch.int64)
    value = codes.reshape(-1, 1) * torch.arange(1, COLUMNS + 1)
    return value if dim == 0 else value.t().contiguous()


def held_by(plan: Plan, rank: int) -> list[int]:
    return [u for start, stop in plan.src.units()[rank] for u in range(start, stop)]


def read_by(plan: Plan, language: tuple[int, int, int], order: str, rank: int) -> list[int]:
    """The units of the rank's replica, in order, for a rank of the first stage."""
    at, part = place(language, order, rank), plan.units // language[2]
    return list(range(at["dp"] * part, (at["dp"] + 1) * part)) if at["pp"] == 0 else []


def on_ranks[R](plan: Plan, work: Callable[[Redistribution, int], R]) -> list[R]:
    """``work`` on every rank, with the plan bound to groups of its own."""

    def main(rank: int) -> R:
        opened = open_groups(plan.member_lists())
        result = work(Redistribution(plan, opened, rank), rank)
        close_groups(plan.member_lists())
        return result

    return run_threads(WORLD, main, timeout=30)


@orders
@tuples
def test_slots_hold_each_unit_once(
    encoder: tuple[int, int], language: tuple[int, int, int], order: str
) -> None:
    plan = plan_of(encoder, language, order)
    slots = [u for slot in plan.src.slots for start, stop in slot for u in range(start, stop)]
    assert sorted(slots) == list(range(plan.units))
    assert len(plan.src.slots) == encoder[1]


@orders
@tuples
def test_rows_arrive_and_gradients_return(
    encoder: tuple[int, int], language: tuple[int, int, int], order: str
) -> None:
    plan = plan_of(encoder, language, order)

    def work(move: Redistribution, rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for rows, dim in CASES:
            move.dims = (dim,)
            whole = coded(held_by(plan, rank), rows, dim)
            integers = move(whole)
            value = whole.double().requires_grad_()
            moved = move(value)
            (7 * moved * moved.detach()).sum().backward()
            assert value.grad is not None
            assert torch.equal(moved.detach(), integers.double())
            found.append((integers, value.detach(), value.grad))
        return found

    for rank, found in enumerate(on_ranks(plan, work)):
        for (rows, dim), (integers, value, gradient) in zip(CASES, found, strict=True):
            assert torch.equal(integers, coded(read_by(plan, language, order, rank), rows, dim))
            assert torch.equal(gradient, 7 * value)


@tuples
def test_zero_rows_take_part(encoder: tuple[int, int], language: tuple[int, int, int]) -> None:
    plan = plan_of(encoder, language, ORDERS[1])

    def work(move: Redistribution, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        value = torch.zeros(0, COLUMNS, requires_grad=True)
        moved = move(value)
        moved.sum().backward()
        assert value.grad is not None
        return tuple(moved.shape), tuple(value.grad.shape)

    assert on_ranks(plan, work) == [((0, COLUMNS), (0, COLUMNS))] * WORLD


def test_the_scale_multiplies_the_gradient_once() -> None:
    plan = plan_of((2, 4), (2, 2, 2), ORDERS[0], scale=Fraction(1, 2))

    def work(move: Redistribution, rank: int) -> bool:
        value = coded(held_by(plan, rank), 2, 0).double().requires_grad_()
        moved = move(value)
        moved.backward(6 * moved.detach())
        assert value.grad is not None
        return torch.equal(value.grad, 3 * value.detach())

    assert all(on_ranks(plan, work))


@pytest.mark.parametrize("language", [(4, 1, 2), (1, 2, 4), (2, 1, 4)])
def test_views_expanded_gradients_and_half_precision(language: tuple[int, int, int]) -> None:
    plan = plan_of((4, 2), language, ORDERS[0])

    def work(move: Redistribution, rank: int) -> tuple[Tensor, Tensor | None]:
        # Columns of a wider tensor: not contiguous; the gradient of a sum is one element, expanded.
        wide = coded(held_by(plan, rank), 2, 0).repeat(1, 2).to(torch.bfloat16).requires_grad_()
        moved = move(wide[:, :COLUMNS])
        moved.sum().backward()
        return moved.detach(), wide.grad

    for rank, (moved, gradient) in enumerate(on_ranks(plan, work)):
        wanted = coded(read_by(plan, language, ORDERS[0], rank), 2, 0)
        assert torch.equal(moved, wanted.to(torch.bfloat16))
        assert gradient is not None
        assert torch.equal(gradient[:, :COLUMNS], torch.ones_like(gradient[:, :COLUMNS]))
        assert not gradient[:, COLUMNS:].any()


@tuples
def test_the_result_is_a_tensor_of_its_own(
    encoder: tuple[int, int], language: tuple[int, int, int]
) -> None:
    plan = plan_of(encoder, language, ORDERS[0])

    def work(move: Redistribution, rank: int) -> bool:
        value = coded(held_by(plan, rank), 2, 0)
        before = value.clone()
        move(value).zero_()
        return torch.equal(value, before)

    assert all(on_ranks(plan, work))


def test_a_frozen_source_stays_without_gradient() -> None:
    plan = plan_of((2, 4), (2, 2, 2), ORDERS[0])

    def work(move: Redistribution, rank: int) -> tuple[bool, bool]:
        frozen = move(torch.ones(plan.units // 4, 1))
        with torch.no_grad():
            silent = move(torch.ones(plan.units // 4, 1, requires_grad=True))
        return frozen.requires_grad, silent.requires_grad

    assert on_ranks(plan, work) == [(False, False)] * WORLD


def test_two_values_return_in_one_order_on_all_ranks() -> None:
    plan = plan_of((1, 8), (2, 2, 2), ORDERS[1])

    def work(move: Redistribution, rank: int) -> list[bool]:
        first = coded(held_by(plan, rank), 3, 0).double().requires_grad_()
        second = (first.detach() + 1000).requires_grad_()
        left, right = move(first), move(second)
        loss = (left * left.detach()).sum() + (right * right.detach()).sum()
        loss.backward()
        assert first.grad is not None and second.grad is not None
        return [torch.equal(first.grad, first), torch.equal(second.grad, second)]

    assert on_ranks(plan, work) == [[True, True]] * WORLD


def test_rows_that_do_not_divide_are_refused() -> None:
    plan = plan_of((4, 2), (1, 2, 4), ORDERS[0])
    held = len(held_by(plan, 0))
    assert held > 1

    def work(move: Redistribution, rank: int) -> str:
        with pytest.raises(LayoutError) as caught:
            move(torch.zeros(held + 1, 1))
        return str(caught.value)

    (text,) = set(on_ranks(plan, work))
    assert "images (tp4 dp2) made" in text
    assert "must be a multiple of 4" in text
    assert f"{held + 1} % {held} = 1" in text


# ---------------------------------------------------------------- the sequence, and dims of tensors

ZIGZAG = Layout(tp=2, cp=2, dp=2, zigzag=True, sp=True)
SEQUENCE = ("sample", "sequence")


def parts_of(plan: Plan, value: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The boxes of ``rank`` at the source and at the reader, of [samples, sequence, columns]."""

    def cut(holding: Holding) -> Tensor:
        found = value
        for dim, (runs, cells) in enumerate(zip(holding.box(rank), plan.grid, strict=True)):
            size = value.shape[dim] // cells
            parts = [found.narrow(dim, a * size, (b - a) * size) for a, b in runs]
            found = torch.cat(parts, dim)
        return found

    return cut(plan.src), cut(plan.dst)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 2), (2, 1), (0, 0), (1, 1)])
def test_the_samples_and_the_sequence_in_any_dims(dims: tuple[int, int]) -> None:
    plan = solve(("images", Layout(tp=2, dp=4)), ("language", ZIGZAG), dims=SEQUENCE)
    value = torch.arange(1.0, 8 * 16 * 3 + 1).reshape(8, 16, 3).double()

    def shaped(part: Tensor) -> Tensor:
        if dims[0] == dims[1]:
            return part.flatten(0, 1).movedim(0, dims[0]).contiguous()
        return part.movedim((0, 1), dims).contiguous()

    def work(move: Redistribution, rank: int) -> bool:
        move.dims = dims
        held, wanted = map(shaped, parts_of(plan, value, rank))
        moved = move(held.requires_grad_(), samples=8)
        moved.backward(3 * moved.detach())
        assert held.grad is not None and moved.is_contiguous() and held.grad.is_contiguous()
        return torch.equal(moved, wanted) and torch.equal(held.grad, 3 * held)

    assert all(on_ranks(plan, work))


def test_zero_samples_of_a_sequence_take_part() -> None:
    plan = solve(("images", Layout(tp=2, dp=4)), ("language", ZIGZAG), dims=SEQUENCE)

    def work(move: Redistribution, rank: int) -> tuple[int, ...]:
        value = torch.zeros(0, 16, COLUMNS, requires_grad=True)
        moved = move(value)
        moved.sum().backward()
        assert value.grad is not None and value.grad.shape == value.shape
        return tuple(moved.shape)

    assert on_ranks(plan, work) == [(0, 4, COLUMNS)] * WORLD


BAD: list[tuple[tuple[int, ...], tuple[int, ...], int | None, str]] = [
    ((0, 1), (2, 10, 3), None, "a sequence of 10, which cp2 and tp2 sp"),
    ((0, 1), (2,), None, r"a value of shape \[2\] has no dim 1: images -> language cuts the dims"),
    ((0, 0), (32, 3), None, "and their number is None: it must be given"),
    ((0, 0), (32, 3), 6, "and their number is 6: it must be given, as a multiple of 4"),
    ((0, 0), (33, 3), 8, "made 33 rows for 2 samples: 33 % 2 = 1"),
    ((0, 0), (20, 3), 8, "a sequence of 10, which cp2 and tp2 sp"),
]


@pytest.mark.parametrize(("dims", "shape", "samples", "message"), BAD)
def test_a_value_that_cannot_be_cut_is_refused(
    dims: tuple[int, ...], shape: tuple[int, ...], samples: int | None, message: str
) -> None:
    plan = solve(("images", Layout(tp=2, dp=4)), ("language", ZIGZAG), dims=SEQUENCE)

    def work(move: Redistribution, rank: int) -> str:
        move.dims = dims
        with pytest.raises(LayoutError, match=message) as caught:
            move(torch.zeros(shape), samples=samples)
        return str(caught.value)

    assert len(set(on_ranks(plan, work))) == 1


def test_a_last_dim_that_no_slices_fit_is_refused() -> None:
    plan = solve(("images", Layout(tp=4, dp=2)), ("language", Layout(tp=8)), ranks_per_node=4)
    assert plan.dims == ("sample", "slice") and plan.grid[1] == 4

    def work(move: Redistribution, rank: int) -> str:
        with pytest.raises(LayoutError, match="6 % 4 = 2") as caught:
            move(torch.zeros(2, 6))
        return str(caught.value)

    assert len(set(on_ranks(plan, work))) == 1


# ---------------------------------------------------------------- what peers get wrong silently


def pairing(src: Layout, dst: Layout, microbatches: int) -> None:
    """Encoders' values of a step, cut by microbatch, are of the samples that the replica reads."""
    sink = ("language", dst)
    plan = solve(("images", src), sink)
    size = 2 * plan.units

    def work(move: Redistribution, rank: int) -> bool:
        runs = sample_runs(plan.src, dst.dp, microbatches, size, rank)
        ids = [(m, s) for m, start, stop in runs for s in range(start, stop)]
        encoded = torch.tensor(ids, dtype=torch.float64).requires_grad_()
        parts = move(encoded).chunk(microbatches)
        at = place((dst.tp, dst.pp, dst.dp), dst.order, rank)
        part = size // dst.dp
        text = range(at["dp"] * part, (at["dp"] + 1) * part)
        wanted = [torch.tensor([(m, s) for s in text]).double() for m in range(microbatches)]
        if at["pp"] > 0:
            return all(len(part) == 0 for part in parts)
        return all(map(torch.equal, parts, wanted))

    assert all(on_ranks(plan, work))


@pytest.mark.parametrize("microbatches", [2, 3])
def test_fan_out_with_several_microbatches_pairs_images_with_their_own_text(
    microbatches: int,
) -> None:
    pairing(Layout(tp=8), Layout(tp=2, dp=4), microbatches)
    pairing(Layout(tp=4, dp=2), Layout(tp=2, pp=2, dp=2), microbatches)


@pytest.mark.parametrize("order", ["tp-cp-dp-pp", "tp-cp-pp-dp"])
def test_the_order_of_the_language_axes_does_not_exchange_replicas(order: str) -> None:
    pairing(Layout(tp=2, dp=4), Layout(tp=2, pp=2, dp=2, order=order), 2)
    pairing(Layout(dp=8), Layout(tp=2, pp=2, dp=2, order=order), 1)

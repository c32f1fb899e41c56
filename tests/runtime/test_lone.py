"""Covers runtime/lone.py: every collective of torch.distributed over one rank is a copy."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.nn.parallel import DistributedDataParallel

from colocc.runtime.lone import BACKEND, open_lone
from tests.harness import run_threads

WORLD = 2


def alone[R](work: Callable[[dist.ProcessGroup, int], R]) -> list[R]:
    """``work(group, rank)`` on each of two ranks, each with a group of its own."""

    def main(rank: int) -> R:
        group = open_lone(timedelta(seconds=20))
        result = work(group, rank)
        dist.destroy_process_group(group)
        return result

    return run_threads(WORLD, main, timeout=30)


def code(rank: int) -> Tensor:
    return torch.tensor([[10.0 + rank, 1.0], [2.0, 3.0]])


def all_reduce(group: Any, value: Tensor) -> Tensor:
    dist.all_reduce(value, group=group)
    return value


def all_reduce_mean(group: Any, value: Tensor) -> Tensor:
    work = dist.all_reduce(value, op=dist.ReduceOp.AVG, group=group, async_op=True)
    assert work is not None
    work.wait()
    assert work.is_completed()
    return value


def reduce(group: Any, value: Tensor) -> Tensor:
    dist.reduce(value, dst=dist.get_rank(), op=dist.ReduceOp.MAX, group=group)
    return value


def broadcast(group: Any, value: Tensor) -> Tensor:
    dist.broadcast(value, src=dist.get_rank(), group=group)
    return value


def all_gather(group: Any, value: Tensor) -> Tensor:
    out = [torch.zeros_like(value)]
    dist.all_gather(out, value, group=group)
    return out[0]


def all_gather_into_tensor(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    dist.all_gather_into_tensor(out, value, group=group)
    return out


def gather(group: Any, value: Tensor) -> Tensor:
    out = [torch.zeros_like(value)]
    dist.gather(value, out, dst=dist.get_rank(), group=group)
    return out[0]


def scatter(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    dist.scatter(out, [value], src=dist.get_rank(), group=group)
    return out


def reduce_scatter(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    dist.reduce_scatter(out, [value], group=group)
    return out


def reduce_scatter_tensor(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    dist.reduce_scatter_tensor(out, value, group=group)
    return out


def all_to_all(group: Any, value: Tensor) -> Tensor:
    out = [torch.zeros_like(value)]
    dist.all_to_all(out, [value], group=group)
    return out[0]


def all_to_all_single(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    dist.all_to_all_single(out, value, [2], [2], group=group)
    return out


def barrier(group: Any, value: Tensor) -> Tensor:
    dist.barrier(group=group)
    return value


def coalesced_all_reduce(group: Any, value: Tensor) -> Tensor:
    with _coalescing_manager(group=group):
        for part in value:
            dist.all_reduce(part, group=group)
    return value


def coalesced_all_reduce_later(group: Any, value: Tensor) -> Tensor:
    with _coalescing_manager(group=group, async_ops=True) as works:
        for part in value:
            dist.all_reduce(part, group=group)
    works.wait()
    return value


def coalesced_all_gather(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    with _coalescing_manager(group=group):
        for to, part in zip(out, value, strict=True):
            dist.all_gather_into_tensor(to, part, group=group)
    return out


def coalesced_reduce_scatter(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    with _coalescing_manager(group=group, async_ops=True) as works:
        for to, part in zip(out, value, strict=True):
            dist.reduce_scatter_tensor(to, part, group=group)
    works.wait()
    return out


def coalesced_on_a_device(group: Any, value: Tensor) -> Tensor:
    """With a device named, the group itself is asked to coalesce."""
    with _coalescing_manager(group=group, device=value.device, async_ops=True) as works:
        for part in value:
            dist.all_reduce(part, group=group)
    works.wait()
    return value


def all_reduce_coalesced(group: Any, value: Tensor) -> Tensor:
    dist.all_reduce_coalesced(list(value), group=group)
    return value


def all_gather_coalesced(group: Any, value: Tensor) -> Tensor:
    out = torch.zeros_like(value)
    dist.all_gather_coalesced([list(out)], list(value), group=group)
    return out


def objects(group: Any, value: Tensor) -> Tensor:
    rank = dist.get_rank()
    gathered: list[Any] = [None]
    dist.all_gather_object(gathered, {"rank": rank}, group=group)
    sent: list[Any] = [f"from {rank}"]
    dist.broadcast_object_list(sent, src=rank, group=group)
    received: list[Any] = [None]
    dist.scatter_object_list(received, [rank], src=rank, group=group)
    assert (gathered, sent, received) == ([{"rank": rank}], [f"from {rank}"], [rank])
    return value


def functional_all_reduce(group: Any, value: Tensor) -> Tensor:
    out: Tensor = functional.all_reduce(value, "sum", group).clone()
    return out


def functional_all_gather(group: Any, value: Tensor) -> Tensor:
    out: Tensor = functional.all_gather_tensor(value, 0, group).clone()
    return out


def functional_reduce_scatter(group: Any, value: Tensor) -> Tensor:
    out: Tensor = functional.reduce_scatter_tensor(value, "sum", 0, group).clone()
    return out


def functional_all_to_all(group: Any, value: Tensor) -> Tensor:
    out: Tensor = functional.all_to_all_single(value, [2], [2], group).clone()
    return out


def functional_broadcast(group: Any, value: Tensor) -> Tensor:
    out: Tensor = functional.broadcast(value, 0, group).clone()
    return out


def functional_coalesced(group: Any, value: Tensor) -> Tensor:
    left, right = functional.all_reduce_coalesced(list(value), "sum", group)
    more = functional.all_gather_into_tensor_coalesced([left, right], group)
    rest = functional.reduce_scatter_tensor_coalesced(more, "sum", [0, 0], group)
    return torch.stack([part.clone() for part in rest])


COLLECTIVES = [
    all_reduce,
    all_reduce_mean,
    reduce,
    broadcast,
    barrier,
    all_gather,
    all_gather_into_tensor,
    gather,
    scatter,
    reduce_scatter,
    reduce_scatter_tensor,
    all_to_all,
    all_to_all_single,
    coalesced_all_reduce,
    coalesced_all_reduce_later,
    coalesced_all_gather,
    coalesced_reduce_scatter,
    coalesced_on_a_device,
    all_reduce_coalesced,
    all_gather_coalesced,
    objects,
    functional_all_reduce,
    functional_all_gather,
    functional_reduce_scatter,
    functional_all_to_all,
    functional_broadcast,
    functional_coalesced,
]


@pytest.mark.filterwarnings("ignore:.*coalesced.* will be deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.distributed.*coalesced` will be deprecated")
@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda fn: fn.__name__)
def test_a_collective_over_one_rank_copies(collective: Callable[[Any, Tensor], Tensor]) -> None:
    found = alone(lambda group, rank: collective(group, code(rank)))
    for rank, value in enumerate(found):
        assert torch.equal(value, code(rank))


def test_it_knows_its_rank() -> None:
    def work(group: dist.ProcessGroup, rank: int) -> tuple[Any, ...]:
        return (
            dist.get_process_group_ranks(group),
            (group.rank(), group.size(), dist.get_rank(group), dist.get_world_size(group)),
            (dist.get_global_rank(group, 0), dist.get_group_rank(group, rank)),
            dist.get_backend(group),
        )

    assert alone(work) == [([r], (0, 1, 0, 1), (r, 0), BACKEND) for r in range(WORLD)]


def test_sending_to_oneself_is_refused() -> None:
    def work(group: dist.ProcessGroup, rank: int) -> str:
        with pytest.raises((RuntimeError, ValueError)) as caught:
            dist.send(torch.zeros(1), dst=rank, group=group)
        return str(caught.value)

    assert all(alone(work))


def test_a_gradient_passes_and_the_copy_has_none() -> None:
    def work(group: dist.ProcessGroup, rank: int) -> tuple[Tensor | None, bool]:
        value = code(rank).requires_grad_()
        moved = functional.all_gather_tensor_autograd(value, 0, group)
        (2 * moved).sum().backward()
        return value.grad, all_gather_into_tensor(group, value).requires_grad

    for gradient, copy_needs in alone(work):
        assert gradient is not None
        assert torch.equal(gradient, torch.full((2, 2), 2.0))
        assert not copy_needs


def test_groups_open_and_close_in_any_number() -> None:
    def main(rank: int) -> list[str]:
        groups = [open_lone(timedelta(seconds=5)) for _ in range(3)]
        names: list[str] = [group.group_name for group in groups]
        for group in reversed(groups):
            dist.destroy_process_group(group)
        again = open_lone(timedelta(seconds=5))
        # A group of both must still match: lone ones do not count in the world's names.
        if rank == 0:
            open_lone(timedelta(seconds=5))
        both = dist.new_group([0, 1])
        total = torch.ones(1)
        dist.all_reduce(total, group=both)
        assert total.item() == WORLD
        assert torch.equal(all_reduce(again, code(rank)), code(rank))
        return names

    for names in run_threads(WORLD, main, timeout=30):
        assert len(set(names)) == 3


def test_torch_ddp_over_one_rank() -> None:
    def work(group: dist.ProcessGroup, rank: int) -> bool:
        torch.manual_seed(rank)
        plain = nn.Linear(2, 2)
        wrapped = DistributedDataParallel(plain, process_group=group)
        wrapped(code(rank)).square().sum().backward()
        reduced = [parameter.grad for parameter in plain.parameters()]
        wanted = torch.autograd.grad(plain(code(rank)).square().sum(), list(plain.parameters()))
        return all(
            have is not None and torch.equal(have, want)
            for have, want in zip(reduced, wanted, strict=True)
        )

    assert all(alone(work))


def test_a_world_that_is_bound_to_a_device() -> None:
    # As init_process_group(device_id=...) binds it: torch then opens what it can split ahead.
    def main(rank: int) -> tuple[Any, Tensor]:
        world: Any = dist.group.WORLD
        world.bound_device_id = torch.device("cuda:0")
        group: Any = open_lone(timedelta(seconds=20))
        value = code(rank)
        dist.all_reduce(value, group=group)
        size = dist.get_world_size(group)
        dist.destroy_process_group(group)
        return size, value

    for rank, (size, value) in enumerate(run_threads(WORLD, main, timeout=30)):
        assert size == 1
        assert torch.equal(value, code(rank))

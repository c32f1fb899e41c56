"""Covers: the group of one rank that runtime/groups.py opens (runtime/lone.py), between ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from colocc.runtime.groups import close_groups, open_groups
from tests.harness import run_threads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about torch's own code
    import torch.distributed._functional_collectives as funcol

TIMEOUT = timedelta(seconds=20)


def lone(fn: Callable[[dist.ProcessGroup], None]) -> None:
    """Run ``fn`` on the group of one rank, on both ranks of a world."""

    def on_rank(rank: int) -> None:
        fn(open_groups([(0,), (1,)], timeout=TIMEOUT)[(rank,)])
        close_groups([(0,), (1,)])

    run_threads(2, on_rank)


def test_lone_group_is_a_world_of_one_without_a_communicator() -> None:
    def fn(group: dist.ProcessGroup) -> None:
        assert group.size() == dist.get_world_size(group) == 1
        assert group.rank() == dist.get_rank(group) == 0
        assert dist.get_process_group_ranks(group) == [dist.get_rank()]
        assert "lone" in dist.get_backend(group)

    lone(fn)


DATA = torch.arange(6.0).reshape(2, 3)


def _in_place(group: Any, **kw: Any) -> tuple[Any, Any]:
    value = DATA.clone()
    return dist.all_reduce(value, group=group, **kw), value


def _reduce(group: Any, **kw: Any) -> tuple[Any, Any]:
    value = DATA.clone()
    return dist.reduce(value, dist.get_rank(), group=group, **kw), value


def _broadcast(group: Any, **kw: Any) -> tuple[Any, Any]:
    value = DATA.clone()
    return dist.broadcast(value, dist.get_rank(), group=group, **kw), value


def _all_gather(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = [torch.empty(2, 3)]
    return dist.all_gather(out, DATA, group=group, **kw), out[0]


def _all_gather_into(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = torch.empty(2, 3)
    return dist.all_gather_into_tensor(out, DATA, group=group, **kw), out


def _reduce_scatter(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = torch.empty(2, 3)
    return dist.reduce_scatter(out, [DATA], group=group, **kw), out


def _reduce_scatter_tensor(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = torch.empty(2, 3)
    average = dist.ReduceOp.AVG
    return dist.reduce_scatter_tensor(out, DATA, op=average, group=group, **kw), out


def _all_to_all(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = [torch.empty(2, 3)]
    return dist.all_to_all(out, [DATA], group=group, **kw), out[0]


def _all_to_all_single(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = torch.empty(2, 3)
    return dist.all_to_all_single(out, DATA, [2], [2], group=group, **kw), out


def _gather(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = [torch.empty(2, 3)]
    return dist.gather(DATA, out, dist.get_rank(), group=group, **kw), out[0]


def _scatter(group: Any, **kw: Any) -> tuple[Any, Any]:
    out = torch.empty(2, 3)
    return dist.scatter(out, [DATA], dist.get_rank(), group=group, **kw), out


def _barrier(group: Any, **kw: Any) -> tuple[Any, Any]:
    return dist.barrier(group=group, **kw), DATA


OPS = [
    _in_place,
    _reduce,
    _broadcast,
    _all_gather,
    _all_gather_into,
    _reduce_scatter,
    _reduce_scatter_tensor,
    _all_to_all,
    _all_to_all_single,
    _gather,
    _scatter,
    _barrier,
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__.strip("_"))
@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_collectives_of_a_lone_group_are_copies(op: Any, async_op: bool) -> None:
    def fn(group: dist.ProcessGroup) -> None:
        work, value = op(group, async_op=async_op)
        if async_op:
            assert work.wait()
            assert work.is_completed()
        assert torch.equal(value, DATA)

    lone(fn)


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lone_group_in_the_coalescing_manager_of_megatrons_ddp(async_op: bool) -> None:
    def fn(group: dist.ProcessGroup) -> None:
        outs = [torch.empty(2, 3), torch.empty(2, 3), DATA.clone()]
        calls: list[Callable[[], Any]] = [
            lambda: dist.all_gather_into_tensor(outs[0], DATA, group=group),
            lambda: dist.reduce_scatter_tensor(outs[1], DATA, group=group),
            lambda: dist.all_reduce(outs[2], group=group),
        ]
        for call in calls:
            with dist.distributed_c10d._coalescing_manager(group, async_ops=async_op) as manager:
                call()
            if async_op:
                manager.wait()
        assert all(torch.equal(o, DATA) for o in outs)

    lone(fn)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lone_group_in_functional_collectives() -> None:
    def fn(group: dist.ProcessGroup) -> None:
        source = DATA.clone().requires_grad_()
        found = [
            funcol.all_reduce(DATA, "sum", group),
            funcol.all_gather_tensor(DATA, 0, group),
            funcol.reduce_scatter_tensor(DATA, "sum", 0, group),
            funcol.all_to_all_single(DATA, None, None, group),
            funcol.all_gather_tensor_autograd(source, 0, group),
        ]
        assert all(torch.equal(funcol.wait_tensor(f), DATA) for f in found)
        found[-1].square().sum().backward()
        assert torch.equal(cast(torch.Tensor, source.grad), 2 * DATA)

    lone(fn)


def test_lone_group_carries_objects() -> None:
    def fn(group: dist.ProcessGroup) -> None:
        gathered: list[Any] = [None]
        dist.all_gather_object(gathered, {"a": 1}, group=group)
        assert gathered == [{"a": 1}]

    lone(fn)


def test_lone_group_opens_while_other_ranks_do_something_else() -> None:
    def fn(rank: int) -> int:
        if rank == 0:
            for _ in range(20):
                open_groups([(0,)], timeout=TIMEOUT)
                close_groups([(0,)])
        total = torch.ones(1)
        dist.all_reduce(total)
        return int(total)

    assert run_threads(2, fn) == [2, 2]

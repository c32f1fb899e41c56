"""Covers: runtime/groups.py."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import DebugLevel, get_debug_level, set_debug_level
from torch.testing._internal.distributed.fake_pg import FakeStore

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.runtime.groups import close_groups, open_groups, process_groups
from colocc.runtime.texts import agree
from tests.harness import run_threads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about Megatron's and torch's own code
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

TIMEOUT = timedelta(seconds=20)
ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-pp-dp")
PAIRS = [
    (Layout(tp=2, dp=4), Layout(tp=2, pp=2, dp=2)),
    (Layout(dp=8), Layout(tp=2, pp=2, dp=2)),
    (Layout(tp=4, dp=2), Layout(pp=4, dp=2)),
    (Layout(tp=8), Layout(tp=4, pp=2)),
]
FIELDS = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"),
    "dp_cp": ("dp", "cp"),
    "dp_cp_gtp_remat": ("dp", "cp"),
    "intra_dp_cp": ("dp", "cp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
    "expt_tp": ("tp",),
    "tp_ep_pp": ("tp", "pp"),
    "expt_dp": ("dp", "cp"),
}


def members_of(group: Any) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def peers(layout: Layout, rank: int, axes: tuple[str, ...]) -> list[int]:
    """The ranks whose coordinates are those of ``rank`` on every other axis."""
    rest = [layout.coordinates(axis) for axis in layout.sizes if axis not in axes]
    return [r for r in range(layout.size) if all(c[r] == c[rank] for c in rest)]


def raised(fn: Callable[[], object]) -> str:
    with pytest.raises(LayoutError) as caught:
        fn()
    return str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("images", "language"), PAIRS, ids=str)
def test_every_field_has_the_ranks_of_its_axes(
    images: Layout, language: Layout, order: str
) -> None:
    given = {
        name: Layout(tp=x.tp, pp=x.pp, dp=x.dp, order=order)
        for name, x in {"images": images, "language": language}.items()
    }

    def ranks(rank: int) -> dict[tuple[str, str], list[int] | None]:
        with process_groups(given, timeout=TIMEOUT) as groups:
            return {(m, f): members_of(getattr(groups[m], f)) for m in given for f in FIELDS}

    for rank, found in enumerate(run_threads(8, ranks)):
        for name, layout in given.items():
            for title, axes in FIELDS.items():
                assert found[name, title] == peers(layout, rank, axes), (rank, name, title)


def test_expert_fields() -> None:
    layout = Layout(tp=2, cp=2, dp=2, ep=2)

    def ranks(rank: int) -> list[list[int] | None]:
        with process_groups({"language": layout}, timeout=TIMEOUT) as groups:
            found = groups["language"]
            return [members_of(g) for g in (found.ep, found.tp_ep, found.expt_dp)]

    for rank, found in enumerate(run_threads(8, ranks)):
        axes = [("ep",), ("expt_tp", "ep"), ("expt_dp",)]
        own = [next(g for g in layout.expert_groups(*a) if rank in g) for a in axes]
        assert found == [list(g) for g in own]


@pytest.mark.parametrize("order", ORDERS)
def test_embedding_groups_join_the_ends_of_each_pipeline(order: str) -> None:
    layout = Layout(tp=2, pp=4, order=order)

    def ranks(rank: int) -> tuple[list[int] | None, list[int] | None]:
        with process_groups({"language": layout}, timeout=TIMEOUT) as groups:
            return members_of(groups["language"].embd), members_of(groups["language"].pos_embd)

    for rank, (embd, pos_embd) in enumerate(run_threads(8, ranks)):
        stage, pipeline = layout.coordinates("pp")[rank], peers(layout, rank, ("pp",))
        assert embd == ([pipeline[0], pipeline[-1]] if stage in (0, 3) else None)
        assert pos_embd == ([pipeline[0]] if stage == 0 else None)


def test_equal_groups_are_one_group_and_the_world_is_the_default_group() -> None:
    layouts = {"images": Layout(tp=2, dp=4), "language": Layout(tp=2, pp=2, dp=2)}

    def fn(rank: int) -> tuple[int, int]:
        with process_groups(layouts, timeout=TIMEOUT) as groups:
            images, language = groups["images"], groups["language"]
            assert images.tp is language.tp
            assert images.dp is images.dp_cp is images.intra_dp_cp
            assert images.intra_dist_opt is language.intra_dist_opt is dist.group.WORLD
            assert images.pp is images.cp is language.cp
            again = process_groups({"audio": Layout(tp=2, dp=4)}, timeout=TIMEOUT)
            assert again["audio"].tp is images.tp
            again.destroy()
            total = torch.ones(1)
            dist.all_reduce(total, group=images.tp)
            return int(total), groups.communicators()

    found = run_threads(8, fn)
    assert {total for total, _ in found} == {2}
    # tp; images.dp; language.dp, .embd, .mp and tp_dp_cp; and language.pp, shared with nobody
    assert {count for _, count in found} == {7}


def test_group_by_its_ranks() -> None:
    layouts = {"images": Layout(tp=2, dp=2)}

    def fn(rank: int) -> str:
        with process_groups(layouts, timeout=TIMEOUT) as groups:
            pair = [0, 1] if rank < 2 else [2, 3]
            assert groups.group(pair) is groups["images"].tp
            assert groups.group(pair[::-1]) is groups["images"].tp
            return raised(lambda: groups.group([0, 3]))

    assert "no group of ranks [0, 3] is open on rank 0" in run_threads(4, fn)[0]


def test_destroyed_groups_are_gone_and_open_anew() -> None:
    layouts = {"images": Layout(tp=2, dp=2)}

    def fn(rank: int) -> tuple[int, int, int]:
        before = len(dist.distributed_c10d._world.pg_map)
        sums = 0
        for _ in range(3):
            groups = process_groups(layouts, timeout=TIMEOUT)
            total = torch.ones(1)
            dist.all_reduce(total, group=groups["images"].dp)
            sums += int(total)
            groups.destroy()
            groups.destroy()
        return before, len(dist.distributed_c10d._world.pg_map), sums

    assert run_threads(4, fn) == [(1, 1, 6)] * 4


def test_a_shared_group_closes_with_its_last_user() -> None:
    lists = [(0, 1), (2, 3)]

    def fn(rank: int) -> float:
        mine = lists[rank // 2]
        first = open_groups(lists, timeout=TIMEOUT)
        assert open_groups([(0, 1), (2, 3), (0, 1)], timeout=TIMEOUT)[mine] is first[mine]
        close_groups(lists)
        total = torch.ones(1)
        dist.all_reduce(total, group=first[mine])
        close_groups(lists)
        assert first[mine] not in dist.distributed_c10d._world.pg_map
        return total.item()

    assert run_threads(4, fn) == [2.0] * 4


def test_groups_are_opened_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, list[list[int]]] = {}
    new_group = dist.new_group

    def record(ranks: list[int], **options: Any) -> Any:
        if len(ranks) > 1:
            assert options["timeout"] == TIMEOUT
            opened.setdefault(threading.current_thread().name, []).append(ranks)
        return new_group(ranks, **options)

    monkeypatch.setattr(dist, "new_group", record)
    layouts = {"images": Layout(tp=2, dp=2), "language": Layout(pp=2, dp=2)}
    run_threads(4, lambda rank: process_groups(layouts, timeout=TIMEOUT).destroy())
    assert len(opened) == 4
    assert len({str(order) for order in opened.values()}) == 1
    order = next(iter(opened.values()))
    # images.tp is language.dp, images.dp is language's embd; its pipelines come last, on their own
    assert order == [[0, 1], [2, 3], [0, 2], [1, 3], [0, 2], [1, 3]]


def one_message(world: int, fn: Callable[[int], str]) -> str:
    start = time.monotonic()
    messages = set(run_threads(world, fn, timeout=30))
    assert len(messages) == 1, messages
    assert time.monotonic() - start < 15, "the ranks waited for a group that never came"
    return messages.pop()


def test_another_layout_on_one_rank_is_named_on_every_rank() -> None:
    def fn(rank: int) -> str:
        language = Layout(tp=4, dp=2) if rank == 5 else Layout(tp=2, pp=2, dp=2)
        return raised(lambda: process_groups({"language": language}, timeout=TIMEOUT))

    message = one_message(8, fn)
    assert "rank 0 has language tp2 pp2 dp2" in message
    assert "rank 5 has language tp4 dp2" in message


def test_another_order_on_one_rank_is_named_on_every_rank() -> None:
    def fn(rank: int) -> str:
        language = Layout(tp=2, pp=2, order=ORDERS[0] if rank else "pp-tp")
        return raised(lambda: process_groups({"language": language}, timeout=TIMEOUT))

    assert "rank 0 has language tp2 pp2 dp1 order=pp-tp" in one_message(4, fn)


def test_a_world_of_another_size_is_refused_with_the_arithmetic() -> None:
    def fn(rank: int) -> str:
        layouts = {"images": Layout(dp=4), "language": Layout(tp=2, pp=2, dp=2)}
        return raised(lambda: process_groups(layouts, timeout=TIMEOUT))

    message = one_message(4, fn)
    assert "language (tp2 pp2 dp2) has 2*1*2*2 = 8 ranks, the world has 4" in message


@pytest.mark.parametrize("bad", [Layout(dp=2), "tp2 dp2", None], ids=str)
def test_an_error_on_one_rank_is_raised_on_every_rank(bad: Any) -> None:
    def fn(rank: int) -> str:
        layout = bad if rank == 2 else Layout(tp=2, dp=2)
        return raised(lambda: process_groups({"images": layout}, timeout=TIMEOUT))

    message = one_message(4, fn)
    assert message.startswith("rank 2: images")


def test_agree() -> None:
    def fn(rank: int) -> str:
        agree("the weather", "rain")
        return raised(lambda: agree("the weather", "sun \u2600" if rank in (1, 3) else "rain"))

    message = one_message(4, fn)
    assert "do not agree on the weather: rank 0 has rain" in message
    assert "ranks 1, 3" in message


def test_no_world() -> None:
    with pytest.raises(LayoutError, match="call init_process_group first"):
        process_groups({"images": Layout(dp=2)})


def test_the_groups_of_a_grid_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")

    def fn(rank: int) -> float:
        grid = HyperCommGrid([2, 2], ["tp", "dp"])
        tp = grid.create_pg("tp", timeout=TIMEOUT)
        layouts = {"images": grid, "language": Layout(tp=2, dp=2)}
        with process_groups(layouts, timeout=TIMEOUT) as groups:
            assert groups["images"].tp is tp is groups["language"].tp
            assert str(groups.layouts["images"]) == "tp2 dp2"
        total = torch.ones(1)
        dist.all_reduce(total, group=tp)
        return total.item()

    assert run_threads(4, fn) == [2.0] * 4


def test_fake_backend() -> None:
    level = get_debug_level()
    set_debug_level(DebugLevel.OFF)  # DETAIL would connect real gloo ranks
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=16)
    try:
        layouts = {"images": Layout(tp=2, dp=8), "language": Layout(tp=2, pp=4, dp=2)}
        with process_groups(layouts) as groups:
            for name, layout in layouts.items():
                assert members_of(groups[name].dp) == peers(layout, 5, ("dp",))
    finally:
        dist.destroy_process_group()
        set_debug_level(level)


def test_collection_is_megatrons_and_every_field_is_set() -> None:
    def fn(rank: int) -> set[str]:
        with process_groups({"images": Layout(dp=2)}, timeout=TIMEOUT) as groups:
            assert isinstance(groups["images"], ProcessGroupCollection)
            assert list(groups) == ["images"]
            assert len(groups) == 1
            return set(vars(groups["images"]))

    assert {*FIELDS, "ep", "embd", "pos_embd", "hcp"} <= run_threads(2, fn)[0]

"""The canaries of the harness: it must notice what it is there to notice."""

import functools
import os
import signal
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from colocc.errors import LayoutError
from tests.harness import ProcessPool, RankDied, _Outcomes, run_threads


def collectives(rank: int) -> list[float]:
    """A collective on a subgroup, then a ring of sends; what the ranks must see is arithmetic."""
    halves = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine = halves[rank % 2]
    total = torch.tensor([float(rank)], requires_grad=False)
    dist.all_reduce(total, group=mine)
    received = torch.empty(1)
    sends = dist.P2POp(dist.isend, torch.tensor([10.0 + rank]), (rank + 1) % 4)
    receives = dist.P2POp(dist.irecv, received, (rank - 1) % 4)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()
    return [total.item(), received.item()]


def mismatch(rank: int) -> None:
    dist.all_reduce(torch.zeros(2, dtype=torch.float32 if rank else torch.int32))


def fail_on_one(rank: int, culprit: int) -> None:
    if rank == culprit:
        raise LayoutError("the culprit's words")
    dist.all_reduce(torch.zeros(1))


def hang_on_one(rank: int, culprit: int) -> int:
    if rank == culprit:
        time.sleep(20)
    return rank


def die(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def seeded(rank: int) -> float:
    torch.manual_seed(rank)
    dist.barrier()
    return torch.rand(1).item()


def whereabouts(rank: int) -> tuple[int, int, int]:
    return os.getpid(), dist.get_world_size(), psutil.Process(os.getppid()).num_threads()


EXPECTED = [[2.0, 13.0], [4.0, 10.0], [2.0, 11.0], [4.0, 12.0]]


def test_threads_collectives_and_sends() -> None:
    assert run_threads(4, collectives) == EXPECTED


def test_threads_leave_nothing_behind() -> None:
    before = threading.active_count(), psutil.Process().num_fds()
    for _ in range(3):
        run_threads(4, collectives)
    assert threading.active_count() <= before[0]
    assert psutil.Process().num_fds() <= before[1]
    assert not dist.is_initialized()


def test_threads_name_the_failed_rank_and_free_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(LayoutError, match="the culprit's words") as caught:
        run_threads(4, functools.partial(fail_on_one, culprit=2), timeout=60)
    assert caught.value.__notes__[0] == "raised by rank 2 of 4"
    assert time.monotonic() - start < 30, "the peers waited for their timeout"
    assert run_threads(4, collectives) == EXPECTED


def test_threads_name_the_hung_rank() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 3"):
        run_threads(3, functools.partial(hang_on_one, culprit=1), timeout=1)
    assert run_threads(4, collectives) == EXPECTED


def test_threads_refuse_mismatched_types() -> None:
    with pytest.raises(RuntimeError, match="mismatch"):
        run_threads(2, mismatch, timeout=10, detail=True)


def test_processes_collectives_and_sends(processes: ProcessPool) -> None:
    assert processes.run(4, collectives) == EXPECTED


def test_processes_refuse_mismatched_types(processes: ProcessPool) -> None:
    with pytest.raises(RuntimeError, match=r"call 0 is gloo:all_reduce\(Int\[2\]\) on rank 0"):
        processes.run(2, mismatch, timeout=10)
    with pytest.raises(RuntimeError, match="Detected mismatch"):
        processes.run(2, mismatch, timeout=10, detail=True)
    assert processes.run(4, collectives) == EXPECTED


def test_processes_are_kept_and_the_server_has_one_thread(processes: ProcessPool) -> None:
    first = processes.run(8, whereabouts)
    second = processes.run(2, whereabouts)
    assert [x[0] for x in second] == [x[0] for x in first[:2]]
    assert len({x[0] for x in first}) == 8
    assert {x[1:] for x in first} == {(8, 1)}
    assert {x[1:] for x in second} == {(2, 1)}


def test_processes_have_generators_of_their_own(processes: ProcessPool) -> None:
    values = processes.run(4, seeded)
    expected = [torch.rand(1, generator=torch.Generator().manual_seed(r)).item() for r in range(4)]
    assert values == expected


def test_processes_name_the_failed_rank_and_recover(processes: ProcessPool) -> None:
    with pytest.raises(LayoutError, match="the culprit's words") as caught:
        processes.run(4, functools.partial(fail_on_one, culprit=3))
    notes = caught.value.__notes__
    assert "fail_on_one" in notes[0]
    assert notes[1] == "raised by rank 3 of 4"
    assert processes.run(4, collectives) == EXPECTED


def test_processes_name_the_hung_rank(processes: ProcessPool) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 3"):
        processes.run(3, functools.partial(hang_on_one, culprit=1), timeout=2)
    assert processes.run(4, collectives) == EXPECTED


def test_processes_report_a_dead_rank(processes: ProcessPool) -> None:
    with pytest.raises(RankDied, match="exit code -9") as caught:
        processes.run(3, die)
    assert "raised by rank 1 of 3" in caught.value.__notes__
    assert processes.run(4, collectives) == EXPECTED


def test_a_death_is_reported_before_what_peers_say_of_it() -> None:
    outcomes = _Outcomes(3)
    outcomes.errors[0] = RuntimeError("Ranks 1 failed to pass monitoredBarrier")
    outcomes.errors[1] = RankDied("exit code -9")
    with pytest.raises(RankDied, match="exit code -9") as caught:
        outcomes.finish(1)
    assert caught.value.__notes__ == ["raised by rank 1 of 3", "ranks [2] had not returned"]


def test_a_pool_refuses_more_ranks_than_it_has(processes: ProcessPool) -> None:
    with pytest.raises(ValueError, match="9 ranks in a pool of 8"):
        processes.run(9, collectives)

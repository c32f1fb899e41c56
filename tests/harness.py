"""Many ranks in one test: real gloo in threads of this process, or in a pool of processes.

Threads are the default: a world of eight costs a tenth of a second, and a test may read what its
ranks leave behind. Processes are for what threads share: Megatron's globals, random generators, a
rank that dies. Both return one result per rank, raise the first rank's error with its rank in a
note, and raise TimeoutError naming the ranks that hang.
"""

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    DebugLevel,
    FileStore,
    HashStore,
    Store,
    get_debug_level,
    set_debug_level,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d

from tests import flight

PRELOAD = (
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed._functional_collectives",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.mimo",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
)
# How long the peers of a failed rank may take to notice.
GRACE = 0.5
# How long destroying the groups may take, on a crowded machine.
LEAVE = 60.0
# A rank's groups run some threads; groups in cycles of garbage keep theirs.
CROWD = 64

_one_world = threading.Lock()


class RankDied(RuntimeError):
    """A process of the pool ended in the middle of a run."""


class _Outcomes:
    """What each rank returned or raised, in the order of time."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.values: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.calls: dict[int, list[flight.Collective]] = {}

    def missing(self) -> list[int]:
        return [r for r in range(self.world) if r not in self.values and r not in self.errors]

    def finish(self, timeout: float) -> list[Any]:
        missing = self.missing()
        if self.errors:
            # Peers may notice a death, and say so, before the death itself is seen.
            dead = [rank for rank, error in self.errors.items() if isinstance(error, RankDied)]
            rank = (dead or list(self.errors))[0]
            error = self.errors[rank]
            error.add_note(f"raised by rank {rank} of {self.world}")
            if missing:
                error.add_note(f"ranks {missing} had not returned")
            raise error
        if missing:
            raise TimeoutError(f"ranks {missing} of {self.world} still run after {timeout:g} s")
        flight.compare([self.calls.get(rank, []) for rank in range(self.world)])
        return [self.values[rank] for rank in range(self.world)]


def run_threads[R](
    world: int, fn: Callable[[int], R], *, timeout: float = 60.0, detail: bool = False
) -> list[R]:
    """``fn(rank)`` of every rank, each a thread with a gloo world of its own.

    The ranks share torch's random generator. A rank that hangs stays behind as a daemon thread.
    """
    outcomes = _Outcomes(world)
    store = HashStore()
    done = threading.Barrier(world)

    def rank_main(rank: int) -> None:
        try:
            _open_world(store, rank, world, timeout)
            outcomes.values[rank] = fn(rank)
        except BaseException as error:  # noqa: BLE001
            outcomes.errors[rank] = error
            done.abort()
        else:
            # A rank that leaves early closes the connections of one that still receives; the
            # barrier breaks when a peer failed, and the peer's error is the one to report.
            with contextlib.suppress(threading.BrokenBarrierError):
                done.wait(timeout)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    with _one_world, _worlds_per_thread(detail):
        threads = [
            threading.Thread(target=rank_main, args=(rank,), name=f"rank{rank}", daemon=True)
            for rank in range(world)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        while any(t.is_alive() for t in threads) and time.monotonic() < deadline:
            if outcomes.errors:
                deadline = min(deadline, time.monotonic() + GRACE)
            for thread in threads:
                thread.join(0.005)
    if len(os.listdir("/proc/self/task")) > CROWD:
        gc.collect()
    return cast(list[R], outcomes.finish(timeout))


class _WorldOfThread(threading.local):
    """What c10d keeps of its groups; __init__ runs once in each thread that looks."""

    pg_config_info = distributed_c10d._World.pg_config_info

    def __init__(self) -> None:
        self.default_pg: dist.ProcessGroup | None = None
        self.group_count = 0
        self.comms: list[Any] = []
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, Any] = {}
        self.pg_group_ranks: dict[Any, Any] = {}
        self.pg_backend_config: dict[Any, Any] = {}
        self.tags_to_pg: dict[Any, Any] = {}
        self.pg_to_tag: dict[Any, Any] = {}
        self.pg_coalesce_state: dict[Any, Any] = {}


@contextlib.contextmanager
def _worlds_per_thread(detail: bool) -> Iterator[None]:
    """Inside, each thread has its own c10d world and registry of group names."""
    world, threads = distributed_c10d._world, torch.get_num_threads()
    torch.set_num_threads(1)
    # A rank may close a group at once, which a peer that still connects takes for a failure.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    # Without a GPU, the first thread to enter this mode lends the process a device guard of its own
    # storage: it must be one that does not end, or the next to enter is a segfault.
    with FakeTensorMode():
        pass
    isolate: Callable[[bool], None] = vars(torch._C._distributed_c10d)["_set_thread_isolation_mode"]
    isolate(True)
    distributed_c10d._world = cast(Any, _WorldOfThread())
    # torch 2.11's wrapper for DETAIL crashes natively now and then where ranks are threads.
    level = get_debug_level()
    set_debug_level(DebugLevel.DETAIL if detail else DebugLevel.OFF)
    try:
        yield
    finally:
        del os.environ["TORCH_DIST_INIT_BARRIER"]
        set_debug_level(level)
        distributed_c10d._world = world
        isolate(False)
        torch.set_num_threads(threads)


def _open_world(store: Store, rank: int, world: int, timeout: float) -> None:
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


class ProcessPool:
    """Up to ``size`` processes that wait for work, forked from a server that has Megatron loaded.

    A failed run leaves its ranks out of step, so it ends them all; the next run starts new ones.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run[R](
        self, world: int, fn: Callable[[int], R], *, timeout: float = 120.0, detail: bool = False
    ) -> list[R]:
        """``fn(rank)`` of every rank, each in a process with a fresh gloo world.

        ``fn`` is a function of a module, or a functools.partial of one; results come back pickled.
        The ranks' collectives are compared at the end; with ``detail``, by torch before each one.
        Raises: RankDied if a process ends; RuntimeError for collectives that do not match.
        """
        if world > self.size:
            raise ValueError(f"{world} ranks in a pool of {self.size}: ask for at most {self.size}")
        task = pickle.dumps(fn)
        self._start(world)
        outcomes = _Outcomes(world)
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, connection) in enumerate(self._workers[:world]):
                connection.send((task, os.path.join(folder, "store"), rank, world, timeout, detail))
            self._collect(outcomes, timeout)
            if outcomes.errors or outcomes.missing():
                self.close()
            else:
                self._leave(world)
        return cast(list[R], outcomes.finish(timeout))

    def close(self) -> None:
        """End every process of the pool."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def _start(self, world: int) -> None:
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()
        while len(self._workers) < world:
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_worker, args=(theirs,))
            process.start()
            theirs.close()
            self._workers.append((process, mine))

    def _leave(self, world: int) -> None:
        """Have the ranks destroy their groups together; those of a rank that cannot end with it."""
        for _, connection in self._workers[:world]:
            connection.send("leave")
        for rank, (_, connection) in enumerate(self._workers[:world]):
            if not connection.poll(LEAVE):
                self.close()
                raise TimeoutError(f"rank {rank} of {world} cannot destroy its groups")
            connection.recv()

    def _collect(self, outcomes: _Outcomes, timeout: float) -> None:
        """Fill ``outcomes`` until every rank has answered, or no more are to be expected."""
        ranks: dict[Any, int] = {c: r for r, (_, c) in enumerate(self._workers[: outcomes.world])}
        deadline = time.monotonic() + timeout
        while ranks and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(ranks), left):
                rank = ranks.pop(connection)
                try:
                    value, error, calls = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]  # noqa: S301
                    outcomes.calls[rank] = calls
                except (EOFError, ConnectionError):
                    process = self._workers[rank][0]
                    process.join(GRACE)
                    value, error = None, RankDied(f"exit code {process.exitcode}")
                if error is None:
                    outcomes.values[rank] = value
                else:
                    outcomes.errors[rank] = error
                    deadline = min(deadline, time.monotonic() + GRACE)


def _worker(connection: Connection) -> None:
    # Torch reads it when the first group opens.
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(flight.BUFFER)
    torch.set_num_threads(1)
    # What every run reads stays: the collections between runs need not walk it.
    importlib.import_module("colocc.testing")
    gc.collect()
    gc.freeze()
    with contextlib.suppress(EOFError):  # the pool was closed
        while True:
            connection.send_bytes(_answer(*connection.recv()))
            connection.recv()
            _leave_world()
            connection.send("left")


def _answer(task: bytes, store: str, rank: int, world: int, timeout: float, detail: bool) -> bytes:
    set_debug_level(DebugLevel.DETAIL if detail else DebugLevel.OFF)
    try:
        torch.manual_seed(0)
        _open_world(FileStore(store, world), rank, world, timeout)
        value = pickle.loads(task)(rank)  # noqa: S301
        calls = flight.RECORDER.skip() if detail else flight.RECORDER.take()
        return _dumps((value, None, calls))
    except BaseException as error:  # noqa: BLE001
        trace = "".join(traceback.format_exception(error))
        error.add_note(trace)
        try:
            answer = pickle.dumps((None, error.with_traceback(None), []))
            pickle.loads(answer)  # noqa: S301
        except Exception:  # noqa: BLE001
            answer = pickle.dumps((None, RuntimeError(trace), []))
        return answer


class _Pickler(pickle.Pickler):
    """Tensors by way of numpy: torch writes a file for each, which costs as much as the step."""

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is torch.Tensor and not value.requires_grad
        if plain and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _leave_world() -> None:
    """Destroy the default group and what Megatron keeps in its modules.

    Models and their groups go in cycles; groups that are left over keep their threads.
    """
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator
    from megatron.core.tensor_parallel import random

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    BridgeCommunicator._broadcast_pg_cache.clear()
    BridgeCommunicator._bridge_pg_cache.clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()

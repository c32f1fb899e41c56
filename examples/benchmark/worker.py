"""One rank of the benchmark: runs the cases of a plan and writes a line of JSON for each."""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed import distributed_c10d

from colocc.runtime import cpu
from examples.benchmark.arms import Arm, Colocc, loss_per_token, opened
from examples.benchmark.cases import Case, family
from examples.benchmark.multi_tensor import use_multi_tensor
from examples.benchmark.profiled import profiled

GIB = 1 << 30


@contextmanager
def ranks(local: int, *, eager: bool) -> Iterator[None]:
    """An initialised torch.distributed, on GPUs where there are any.

    ``eager`` opens every communicator when its group is made, as device_id does.
    """
    use_multi_tensor()
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    store = FileStore(os.environ["BENCHMARK_STORE"], world)
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device = torch.device("cuda", local) if eager else None
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
    else:
        cpu.enable()
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        yield
        # Not after an error, which is to be seen whatever state the groups are in.
        dist.destroy_process_group()
    finally:
        cpu.disable()


class Clock:
    """Steps of arms, timed; memory and losses with them."""

    def __init__(self, note: Callable[[str], object]) -> None:
        self.note = note
        self.seconds: dict[str, list[float]] = {}
        self.peak: dict[str, int] = {}
        self.logs: dict[str, tuple[list[Any], float | None]] = {}

    def run(self, name: str, arm: Arm, *, counts: bool) -> None:
        """One step of ``arm``, on the clock if it ``counts``."""
        self.note(name)
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        logs, norm = arm.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if gpu:
            self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated())
        self.logs[name] = logs, norm
        if counts:
            self.seconds.setdefault(name, []).append(seconds)


def run_case(case: Case, plan: dict[str, Any], note: Callable[[str], object]) -> dict[str, Any]:
    """What each arm of ``case`` took; the same on every rank. ``note`` gets the arm at hand."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(map(family, case.arms)):
        names = [arm for arm in case.arms if family(arm) == kind]
        found |= _run_family(case, names, plan, dtype, note)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "case": case.to_json(),
        "arms": found,
        "device": _device(),
        "world": dist.get_world_size(),
    }


def _run_family(
    case: Case,
    names: list[str],
    plan: dict[str, Any],
    dtype: torch.dtype,
    note: Callable[[str], object],
) -> dict[str, Any]:
    """The arms that share a model, which is gone when this returns."""
    clock, found = Clock(note), {}
    start = time.perf_counter()
    with opened(case, names, dtype, plan["overlap"], note) as arms, _collected_apart():
        collection, built = _collection(arms), time.perf_counter() - start
        ends = time.perf_counter() + plan["seconds"] * len(names) / len(case.arms)
        for turn in range(plan["warmup"] + plan["steps"]):
            if turn >= plan["warmup"] + 3 and _agree(time.perf_counter() > ends):
                break
            gc.collect()
            for name, arm in arms.items():
                clock.run(name, arm, counts=turn >= plan["warmup"])
        outside, communicators = _outside(), _communicators()
        for name in names:
            found[name] = _measured(clock, name, collection) | {
                "outside_gib": outside,
                "communicators": communicators,
                "built_seconds": built,
            }
            arm = arms[name]
            if plan["traces"] is not None and isinstance(arm, Colocc):
                with arm.program.trace(Path(plan["traces"]) / case.file_of(name)):
                    arm.step()
            if plan["profile"]:
                found[name] |= profiled(arm)
    return found


@contextmanager
def _collected_apart() -> Iterator[None]:
    """Inside, Python collects garbage only when told to, and never looks at the models."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _agree(question: bool) -> bool:
    """Whether any rank says so."""
    answer = torch.tensor([question], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer.item())


def _collection(arms: dict[str, Arm]) -> Any:
    arm: Any = next(iter(arms.values()))
    return arm.shared.groups["language"] if hasattr(arm, "shared") else arm.groups


def _measured(clock: Clock, name: str, collection: Any) -> dict[str, Any]:
    device = torch.cuda.current_device()
    seconds = torch.tensor(clock.seconds[name], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    peak = torch.tensor([clock.peak.get(name, 0)], device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    logs, norm = clock.logs[name]
    alone = name.startswith(("language_only", "encoder_only"))
    return {
        "seconds": seconds.tolist(),
        "peak_gib": int(peak) / GIB,
        "loss": None if alone else loss_per_token(logs, collection),
        "norm": None if alone else float(norm or 0.0),
    }


def _outside() -> float:
    """GiB of this GPU in use that torch's allocator does not hold; the most of all ranks."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    used = torch.tensor([total - free - torch.cuda.memory_reserved()], device="cuda")
    dist.all_reduce(used, dist.ReduceOp.MAX)
    return int(used) / GIB


def _communicators() -> int:
    """The process groups of this rank that hold more than it alone."""
    return sum(1 for group in distributed_c10d._world.pg_map if dist.get_world_size(group) > 1)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main(path: Path) -> None:
    """Run the plan in ``path``; lines go to results.jsonl beside it, the arm at hand to arm.txt."""
    faulthandler.register(signal.SIGUSR1)  # where a rank that hangs is
    plan = json.loads(path.read_text())
    with ranks(int(os.environ["LOCAL_RANK"]), eager=plan["eager"]):
        first = dist.get_rank() == 0
        arm = path.with_name("arm.txt")
        for found in plan["cases"]:
            note = arm.write_text if first else len
            line = json.dumps(run_case(Case.from_json(found), plan, note))
            if first:
                with path.with_name("results.jsonl").open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

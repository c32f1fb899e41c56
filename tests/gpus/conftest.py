"""One NCCL world for all tests of this folder, and the oracle in a process of its own."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import colocc
from colocc import Layout
from tests.harness import ProcessPool
from tests.oracle import Oracle

# A rank that fails leaves its peers waiting; they end with this.
TIMEOUT = timedelta(seconds=120)


@pytest.fixture(scope="session")
def world() -> Iterator[int]:
    """The number of ranks that torchrun started, one on each GPU."""
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        pytest.skip(
            "needs GPUs and a process for each: torchrun --nproc-per-node 8 -m pytest tests/gpus"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=TIMEOUT)
    yield dist.get_world_size()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def keep_open(world: int) -> Iterator[Callable[[dict[str, Layout]], None]]:
    """Keeps the groups of layouts for the tests that follow: NCCL takes seconds to open them, and
    equal ones are shared."""
    with contextlib.ExitStack() as stack:
        seen = set[tuple[tuple[str, Layout], ...]]()

        def keep(layouts: dict[str, Layout]) -> None:
            key = tuple(layouts.items())
            if key not in seen:
                seen.add(key)
                stack.enter_context(colocc.process_groups(layouts))

        yield keep


@pytest.fixture(scope="session")
def reference(world: int) -> Iterator[Oracle]:
    """The float64 oracle, on one CPU of each rank."""
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}), ProcessPool(1) as pool:
        pool.run(1, abs)
        yield Oracle(pool)

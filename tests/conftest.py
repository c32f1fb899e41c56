"""The environment that every test runs in, and the pool that they share."""

import os

# Before torch starts: without DETAIL, gloo returns wrong numbers where dtypes or shapes differ. It
# holds for commands that tests start; the pool compares by itself (tests/flight.py).
os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
# Torch's flight recorder is one for a process, whose ranks may be threads: the pool turns it on.
os.environ["TORCH_FR_BUFFER_SIZE"] = "0"
# But for the tests that torchrun starts, one on each GPU.
if "LOCAL_RANK" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import gc
from collections.abc import Iterator

import pytest

from tests.harness import ProcessPool


@pytest.fixture(scope="session")
def processes() -> Iterator[ProcessPool]:
    """Eight processes for what threads share: Megatron's globals, random generators, dying."""
    with ProcessPool(8) as pool:
        yield pool


def pytest_collection_finish() -> None:
    """What is loaded stays: the collections after a run of threads need not walk it."""
    gc.collect()
    gc.freeze()

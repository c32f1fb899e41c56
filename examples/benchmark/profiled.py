"""What a step costs the host and the GPU: kernels, waits, and the time that the GPU is busy."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from examples.benchmark.arms import Arm

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def profiled(arm: Arm) -> dict[str, Any]:
    """One step of ``arm`` under torch's profiler: how many kernels the host launched, how often it
    waited for the GPU, and for how many seconds the GPU ran any kernel, or any but NCCL's."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        arm.step()
        torch.cuda.synchronize()
    counts = {"launches": 0, "waits": 0}
    kernels: list[tuple[float, float, bool]] = []
    # The raw events: torch's own list of them takes longer to build than the step.
    for event in seen.profiler.kineto_results.events():
        name = event.name()
        if event.device_type().name == "CUDA":
            start = event.start_ns()
            kernels.append((start, start + event.duration_ns(), "nccl" in name))
        elif name in LAUNCHES:
            counts["launches"] += 1
        elif name in WAITS:
            counts["waits"] += 1
    return counts | {
        "busy": covered([(start, end) for start, end, _ in kernels]) / 1e9,
        "computing": covered([(start, end) for start, end, nccl in kernels if not nccl]) / 1e9,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of ``spans``."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total

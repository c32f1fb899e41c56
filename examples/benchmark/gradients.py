"""Every arm's gradients against three_phase without CUDA graphs, tensor by tensor.

``python -m examples.benchmark.gradients`` runs the tiny model on two ranks, in fp32 and, on GPUs,
in bf16: the largest relative L2 difference of a gradient in the same precision, and of bf16 from
fp32. It fails above 1e-5 in fp32.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from examples.benchmark.__main__ import MANY_QUEUES, SETTINGS, launch
from examples.benchmark.arms import loss_per_token, opened
from examples.benchmark.cases import Case
from examples.benchmark.worker import ranks

TOLERANCE = 1e-5
STEPS = 3
AT_ONCE = ("three_phase", "lookahead=1", "lookahead=2")
BUBBLES = ("three_phase", "filled=1", "filled=2", "filled")


def graphs(arms: tuple[str, ...]) -> tuple[str, ...]:
    """The arms, and each with CUDA graphs."""
    return tuple(arm + suffix for arm in arms for suffix in ("", "+graphs"))


CASES = (
    Case("tiny", "tp1 dp2", "tp2", 8, 4, (*graphs(AT_ONCE), "megatron")),
    Case("tiny", "tp2", "tp1 dp2", 8, 4, (*graphs(AT_ONCE), "megatron")),
    Case("tiny", "tp1 dp2", "tp1 pp2", 16, 4, graphs(BUBBLES)),
)
Gradients = dict[str, torch.Tensor]


def gradients_of(case: Case, dtype: torch.dtype) -> dict[str, tuple[float, Gradients]]:
    """Of each arm, the loss and this rank's reduced gradients, after the last of some steps."""
    found = {}
    with opened(case, list(case.arms), dtype, False, len, distributed=False) as arms:
        for name, arm in arms.items():
            for _ in range(STEPS):
                for module in arm.modules:
                    module.zero_grad_buffer()
                logs = arm.forward_backward()
            held: Any = arm
            groups = held.shared.groups["language"]
            found[name] = (
                loss_per_token(logs, groups),
                {
                    f"{place}.{title}": weight.main_grad.detach().double().cpu()
                    for place, module in enumerate(arm.modules)
                    for title, weight in module.named_parameters()
                },
            )
    return found


def difference(found: Gradients, wanted: Gradients) -> tuple[float, str]:
    """The largest relative L2 difference of a tensor, and whose it is. Raises: ValueError if one
    has a gradient that the other lacks."""
    if found.keys() != wanted.keys():
        raise ValueError(f"gradients of different weights: {sorted(found.keys() ^ wanted.keys())}")
    each = [
        (float((found[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)), name)
        for name in wanted
        if wanted[name].norm() > 0 or found[name].norm() > 0
    ]
    return max(each)


def worker(out: Path) -> None:
    """One rank: lines of (case, dtype, arm, loss, difference, of which weight) to ``out``."""
    lines = []
    with ranks(int(os.environ["LOCAL_RANK"]), eager=False):
        dtypes = [torch.float32] + ([torch.bfloat16] if torch.cuda.is_available() else [])
        for case in CASES:
            exact: Gradients = {}
            for dtype in dtypes:
                found = gradients_of(case, dtype)
                _, wanted = found["three_phase"]
                exact = exact or wanted
                for arm, (loss, gradients) in found.items():
                    worst, name = difference(gradients, wanted)
                    from_exact, _ = difference(gradients, exact)
                    both = torch.tensor([worst, from_exact], device=torch.cuda.current_device())
                    dist.all_reduce(both, dist.ReduceOp.MAX)
                    line = [str(case), str(dtype).removeprefix("torch."), arm, loss, *both.tolist()]
                    lines.append([*line, name])
        if dist.get_rank() == 0:
            out.write_text("\n".join(json.dumps(line) for line in lines))


def main() -> int:
    """Print a line for each arm; 1 if one is above the tolerance in fp32."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.gradients")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "found.jsonl"), Path(folder, "ranks.log")
        command = [sys.executable, "-m", "examples.benchmark.gradients", "--worker", str(out)]
        with log.open("w") as file:
            code = launch(command, options.ranks, file, SETTINGS | MANY_QUEUES)
        if code:
            sys.stderr.write(log.read_text())
            return code
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    wrong = 0
    for case, dtype, arm, loss, worst, from_exact, name in lines:
        bad = dtype == "float32" and not worst <= TOLERANCE
        wrong += bad
        print(
            f"{case} {dtype} {arm:24} loss {loss:.6f} differs {worst:.1e} from fp32 "
            f"{from_exact:.1e} {name if bad else ''}"
        )
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

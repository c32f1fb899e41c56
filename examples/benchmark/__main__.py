"""The command: runs sets of cases on all ranks, and writes results.json, results.md, steps.png.

A rank that runs out of memory takes its peers down with it, so the ranks are processes apart: the
arm that failed is noted, and the rest of its case runs again without it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from examples.benchmark import report
from examples.benchmark.cases import MODELS, SETS, Case

# Segments that can grow.
SETTINGS = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# One hardware queue, as Megatron wants it to overlap communication; messages that wait for each
# other, as filled sends them, would deadlock in it.
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
MANY_QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
# How long the peers of a failed rank have to say what they saw.
GRACE = 2.0
Failed = dict[str, dict[str, str]]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.results:
        lines = [line for path in options.results for line in path.read_text().splitlines()]
        return write([json.loads(line) for line in lines], options)
    cases = [case for name in options.sets for case in SETS[name]]
    if options.arms:
        cases = [replace(case, arms=tuple(options.arms)) for case in cases]
    if options.cases:
        cases = [cases[index] for index in options.cases]
    if options.model:
        cases = [replace(case, model=options.model) for case in cases]
    return write(measure(cases, options), options)


def write(results: list[report.Result], options: argparse.Namespace) -> int:
    """Write the files; return 1 if arms differ in loss or norm, which is printed."""
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    (options.out / "results.md").write_text(report.markdown(results))
    report.plot(results, options.out / "steps.png")
    if options.page is not None:
        options.page.write_text(report.page(results))
    sys.stdout.write(report.markdown(results))
    tolerance = 2e-2 if torch.cuda.is_available() else 1e-5
    problems = [line for result in results for line in report.differing(result, tolerance)]
    for line in problems:
        sys.stderr.write(line + "\n")
    return 1 if problems else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark", description=__doc__)
    parser.add_argument("sets", nargs="*", metavar="set", help=", ".join(SETS))
    parser.add_argument("--page", type=Path, help="write the results there too, as RESULTS.md")
    parser.add_argument(
        "--results", type=Path, nargs="+", help="run nothing: only write what these lines say"
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"))
    parser.add_argument("--cases", type=int, nargs="*", help="only these, by place in the sets")
    parser.add_argument("--arms", nargs="*", help="instead of those of the cases; see cases.py")
    parser.add_argument("--model", choices=MODELS, help="instead of those of the cases")
    parser.add_argument("--steps", type=int, default=10, help="of each arm")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these, not counted")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of steps in a case; each arm runs at least 3"
    )
    parser.add_argument("--ranks", type=int, default=2, help="4 for the set four, 8 for eight")
    parser.add_argument("--overlap", action="store_true", help="DDP's overlap_grad_reduce")
    parser.add_argument("--profile", action="store_true", help="a step of each arm, profiled")
    parser.add_argument("--trace", action="store_true", help="a step of each program, in traces/")
    parser.add_argument("--eager", action="store_true", help="init_process_group(device_id=...)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.sets if name not in SETS]:
        parser.error(f"no such set: {', '.join(unknown)}; there are {', '.join(SETS)}")
    if not options.sets and not options.results:
        parser.error("give a set of cases, or --results")
    return options


def measure(cases: list[Case], options: argparse.Namespace) -> list[report.Result]:
    """The results of ``cases``, in their order, with what failed among their arms."""
    lines = options.out / "results.jsonl"
    lines.unlink(missing_ok=True)
    done: list[report.Result] = []
    failed: list[Failed] = [{} for _ in cases]
    todo = list(cases)
    while todo:
        reason = run(todo, options)
        found = (
            [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        )
        for result in found[len(done) :]:
            result["arms"] |= failed[len(done)]
            done.append(result)
            todo.pop(0)
        if reason is None:
            break
        arm = (options.out / "arm.txt").read_text() if (options.out / "arm.txt").exists() else ""
        sys.stderr.write(f"{todo[0]}: {arm}: {reason}\n")
        if arm not in todo[0].arms:
            raise RuntimeError(f"the ranks failed before any arm ran: {reason}")
        failed[len(done)][arm] = {"failed": reason}
        left = tuple(name for name in todo[0].arms if name != arm)
        todo[0] = replace(todo[0], arms=left)
        if not left:
            raise RuntimeError(f"{todo[0]}: every arm failed, the last one with {reason}")
    return done


def run(cases: list[Case], options: argparse.Namespace) -> str | None:
    """Run the ranks over ``cases``; return what ended them early, None if nothing did."""
    plan: dict[str, Any] = {
        "cases": [case.to_json() for case in cases],
        "steps": options.steps,
        "warmup": options.warmup,
        "overlap": options.overlap,
        "seconds": options.seconds,
        "eager": options.eager,
        "profile": options.profile,
        "traces": str(options.out / "traces") if options.trace else None,
    }
    path = options.out / "plan.json"
    path.write_text(json.dumps(plan))
    (options.out / "arm.txt").unlink(missing_ok=True)
    log = options.out / "ranks.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "examples.benchmark.worker", str(path)]
        filled = any(arm.startswith("filled") for case in cases for arm in case.arms)
        settings = SETTINGS | (MANY_QUEUES if filled else ONE_QUEUE)
        code = launch(command, options.ranks, file, settings)
    return None if code == 0 else reason_of(log.read_text(), code)


def launch(command: list[str], ranks: int, log: IO[str], settings: dict[str, str]) -> int:
    """Run ``command`` on every rank; return 0, or what the first rank to fail exits with.

    One rank's failure ends the others, which would wait for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A file, not a port: one that is free now may be taken when rank 0 listens.
        world = {"BENCHMARK_STORE": str(Path(folder) / "store"), "WORLD_SIZE": str(ranks)}
        started = []
        for rank in range(ranks):
            place = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            env = settings | os.environ | place
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
        try:
            return _wait(started)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    """0 when all have ended well, else what the first to fail exits with."""
    while True:
        codes = [process.poll() for process in started]
        if failed := next((code for code in codes if code), None):
            time.sleep(GRACE)
            return failed
        if None not in codes:
            return 0
        time.sleep(0.1)


def reason_of(text: str, code: int) -> str:
    """Why ranks that wrote ``text`` ended: the error that is not about a peer's end."""
    if "OutOfMemoryError" in text:
        return "out of memory"
    errors = [line for line in text.splitlines() if re.search(r"\b\w+(Error|Exception): ", line)]
    own = [line for line in errors if "closed by peer" not in line and "ChildFailed" not in line]
    found = (own or errors or [f"exit code {code}"])[0]
    return found.strip()[:200]


if __name__ == "__main__":
    sys.exit(main())

"""Covers runtime/trace.py and program.trace: what is noted of a step, in order, for every rank."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import colocc
from colocc import Layout
from colocc.passes.timeline import one_f_one_b
from colocc.runtime import cpu
from colocc.runtime.trace import Span, chrome, from_text, to_text, with_idle
from tests import mimo
from tests.harness import ProcessPool


def test_gaps_are_idle() -> None:
    work = [Span("encode", 0, 1.0, 3.0), Span("redistribute", -1, 2.0, 3.0)]
    later = Span("forward", 0, 4.0, 5.0)
    assert with_idle([*work, later]) == [
        Span("idle", -1, 0.0, 1.0),
        *work,
        Span("idle", -1, 3.0, 4.0),
        later,
    ]


def test_spans_survive_text() -> None:
    spans = [Span("encode", 3, 0.1, 0.25), Span("reduce", -1, 1.0, 2.0)]
    assert from_text(to_text(spans)) == spans


def test_chrome_counts_in_microseconds() -> None:
    events = json.loads(chrome([[], [Span("forward", 2, 0.5, 0.75)]]))["traceEvents"]
    (event,) = (event for event in events if event["ph"] == "X")
    assert (event["name"], event["pid"]) == ("forward 2", 1)
    assert (event["ts"], event["dur"]) == (5e5, 2.5e5)


def test_encoders_have_a_lane_of_their_own() -> None:
    """What overlaps in one of Chrome's threads is taken for a call inside the other."""
    spans = [Span("forward", 0, 0.0, 2.0), Span("encode_backward", 0, 1.0, 3.0)]
    events = json.loads(chrome([spans]))["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert lanes == {0: "language", 1: "encoders"}
    assert [e["tid"] for e in events if e["ph"] == "X"] == [0, 1]


def traced_on_rank(_: int, layouts: dict[str, Layout], schedule: str, path: str) -> None:
    with cpu.ranks(), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
            with program.trace(path):
                program.forward_backward(
                    [mimo.batch(4, seed=index) for index in range(3)],
                    num_microbatches=3,
                    loss_func=mimo.loss_func,
                )
            assert program.recorder is None


@pytest.mark.parametrize("schedule", ["three_phase", "filled"])
def test_a_traced_step(processes: ProcessPool, tmp_path: Path, schedule: str) -> None:
    layouts = {"images": Layout(dp=2), "language": Layout(pp=2)}
    path = tmp_path / "traces" / "step.json"
    work = partial(traced_on_rank, layouts=layouts, schedule=schedule, path=str(path))
    processes.run(2, work)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    for stage in range(2):
        mine = [e for e in events if e["ph"] == "X" and e["pid"] == stage]
        language = [e["name"] for e in mine if e["cat"] in ("forward", "backward")]
        wanted = [f"{task.kind} {task.microbatch}" for task in one_f_one_b(stage, 2, 3)]
        assert language == wanted
        kinds = [e["cat"] for e in mine]
        assert {"encode", "encode_backward", "reduce", "idle"} <= set(kinds)
        assert ("redistribute" in kinds) == (schedule == "three_phase")
        assert all(e["dur"] >= 0 for e in mine)

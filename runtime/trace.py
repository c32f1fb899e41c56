"""What every rank did in a step, as a trace for Chrome or Perfetto and as a picture.

On a GPU the times are those of its stream, by events that nobody waits for before the step is over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colocc.runtime.texts import gather_texts

COLORS = {
    "encode": "#4c78a8",
    "redistribute": "#f58518",
    "forward": "#54a24b",
    "backward": "#88d27a",
    "encode_backward": "#9ecae9",
    "reduce": "#b279a2",
    "idle": "#dddddd",
}
# The work of encoders, which may run beside the language module's; each has a lane of its own.
ENCODERS = ("encode", "redistribute", "encode_backward")
LANES = ("language", "encoders")


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds from the start of the step, of one kind of work; ``microbatch`` -1: of all."""

    kind: str
    microbatch: int
    start: float
    end: float


class Recorder:
    """Marks the work of one step on this rank."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self._marks: list[tuple[str, int, Any, Any]] = []
        if self.gpu:
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        self._zero = self.mark()

    def mark(self) -> Any:
        """This point in time, of the stream that is current."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, kind: str, microbatch: int, start: Any, end: Any) -> None:
        """Note work between two marks."""
        self._marks.append((kind, microbatch, start, end))

    @contextlib.contextmanager
    def span(self, kind: str, microbatch: int = -1) -> Iterator[None]:
        """Note what runs inside."""
        start = self.mark()
        yield
        self.add(kind, microbatch, start, self.mark())

    def watch_backward(self, output: torch.Tensor, microbatch: int) -> None:
        """Note the backward that starts at ``output``."""
        if not output.requires_grad:
            return

        def started(_: torch.Tensor) -> None:
            start = self.mark()
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: self.add("backward", microbatch, start, self.mark())
            )

        output.register_hook(started)

    def spans(self) -> list[Span]:
        """What was noted, by time, with the idle time between; waits for the GPU."""
        if self.gpu:
            torch.cuda.synchronize()
        found = [
            Span(kind, microbatch, self._seconds(start), self._seconds(end))
            for kind, microbatch, start, end in self._marks
        ]
        return with_idle(sorted(found, key=lambda span: span.start))

    def _seconds(self, mark: Any) -> float:
        if not self.gpu:
            return float(mark - self._zero)
        return float(self._zero.elapsed_time(mark)) / 1e3


def with_idle(spans: list[Span]) -> list[Span]:
    """``spans``, which ascend, with an idle one in every gap."""
    found, reached = [], 0.0
    for span in spans:
        if span.start > reached:
            found.append(Span("idle", -1, reached, span.start))
        found.append(span)
        reached = max(reached, span.end)
    return found


def chrome(ranks: list[list[Span]]) -> str:
    """The spans of all ranks in Chrome's trace format: a process for each rank, with two threads,
    the encoders' below."""
    events = [
        {
            "name": span.kind if span.microbatch < 0 else f"{span.kind} {span.microbatch}",
            "cat": span.kind,
            "ph": "X",
            "ts": span.start * 1e6,
            "dur": (span.end - span.start) * 1e6,
            "pid": rank,
            "tid": int(span.kind in ENCODERS),
        }
        for rank, spans in enumerate(ranks)
        for span in spans
    ]
    names = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(ranks))
    ]
    lanes = [
        {"name": "thread_name", "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}
        for rank in range(len(ranks))
        for lane, name in enumerate(LANES)
    ]
    return json.dumps({"traceEvents": names + lanes + events})


def picture(ranks: list[list[Span]], path: Path) -> None:
    """A PNG with a row for each rank, its lower half the encoders'; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import patches, pyplot

    figure, axis = pyplot.subplots(figsize=(12, 1.2 + 0.5 * len(ranks)), layout="constrained")
    for rank, spans in enumerate(ranks):
        for span in spans:
            below = 0.4 if span.kind in ENCODERS else 0.0
            axis.broken_barh(
                [(span.start, span.end - span.start)],
                (rank - 0.4 + below, 0.8 if span.kind == "idle" else 0.4),
                color=COLORS[span.kind],
                edgecolor="white",
                linewidth=0.3,
            )
    axis.invert_yaxis()
    axis.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
    axis.set_xlabel("seconds")
    axis.spines[["top", "right"]].set_visible(False)
    seen = {span.kind for spans in ranks for span in spans}
    handles = [patches.Patch(color=COLORS[kind], label=kind) for kind in COLORS if kind in seen]
    axis.legend(handles=handles, ncols=len(handles), loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def to_text(spans: list[Span]) -> str:
    """``spans`` as one line, for ``from_text``."""
    return json.dumps([[s.kind, s.microbatch, s.start, s.end] for s in spans])


def from_text(text: str) -> list[Span]:
    """The spans of ``to_text``."""
    return [Span(*fields) for fields in json.loads(text)]


class Traced:
    """A program whose steps can be traced."""

    rank: int | None
    recorder: Recorder | None = None

    @contextlib.contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Inside, note what every rank does in a step; rank 0 then writes it to ``path`` for Chrome
        or Perfetto, and as a PNG beside it if matplotlib is at hand.

        Collective; one ``forward_backward`` goes inside. Idle time is what lies between.
        """
        self.recorder = Recorder()
        try:
            yield
            spans = self.recorder.spans()
        finally:
            self.recorder = None
        ranks = [from_text(text) for text in gather_texts(to_text(spans))]
        if self.rank == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(chrome(ranks))
            if importlib.util.find_spec("matplotlib") is not None:
                picture(ranks, Path(path).with_suffix(".png"))

    def noted(self, kind: str, microbatch: int = -1) -> contextlib.AbstractContextManager[None]:
        """Inside, this rank does ``kind`` of work: noted if the step is traced."""
        if self.recorder is None:
            return contextlib.nullcontext()
        return self.recorder.span(kind, microbatch)

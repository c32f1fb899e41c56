"""What a run of the digits example leaves behind: loss.json, loss.png, and a closing line."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """A finished run. ``losses`` are per token, one a step."""

    losses: list[float]
    accuracy: float
    ranks: int
    layouts: dict[str, str]


def write(run: Run, folder: Path) -> None:
    """Write ``folder/loss.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.json").write_text(json.dumps(asdict(run)) + "\n")


def read(folder: Path) -> Run:
    """The run that ``write`` left in ``folder``."""
    return Run(**json.loads((folder / "loss.json").read_text()))


def arrow(run: Run) -> str:
    """``images tp1 dp8 -> language tp2 pp2 dp2``."""
    return f"images {run.layouts['images']} -> language {run.layouts['language']}"


def closing_line(run: Run) -> str:
    """The one line that says how a run went."""
    return (
        f"digits: held-out accuracy {run.accuracy:.4f}, loss {run.losses[0]:.4f} -> "
        f"{run.losses[-1]:.4f}, {len(run.losses)} steps, {run.ranks} ranks, {arrow(run)}"
    )


def largest_difference(run: Run, reference: Run, steps: int = 20) -> float:
    """The largest relative difference of the losses of the first ``steps`` steps."""
    pairs = list(zip(run.losses[:steps], reference.losses[:steps], strict=True))
    return max(abs(mine - other) / abs(other) for mine, other in pairs)


def difference(run: Run, reference: Run) -> str:
    """``largest_difference`` in a sentence."""
    steps = min(20, len(run.losses))
    largest = largest_difference(run, reference)
    return f"largest relative loss difference to one process over {steps} steps: {largest:.1e}"


def plot(run: Run, reference: Run, path: Path) -> None:
    """Draw the loss of a run beside the same run on one process, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    everything, start = figure.subplots(1, 2)
    for axes, steps in ((everything, len(run.losses)), (start, 20)):
        axes.plot(reference.losses[:steps], color="0.6", linewidth=4, label="one process")
        axes.plot(run.losses[:steps], color="C0", linewidth=1, label=f"{run.ranks} ranks")
        axes.set(xlabel="step", ylabel="loss per token")
    everything.set(yscale="log", title=arrow(run))
    start.set(title=difference(run, reference).replace(" over", "\nover"))
    everything.legend()
    figure.savefig(path, dpi=120)

"""What filling the bubbles should gain over three phases, for pipelines larger than the machine.

python -m examples.benchmark.predicted      # a table in Markdown
"""

import sys

from colocc.passes.fill import fill
from colocc.passes.timeline import Costs, ideal_length, three_phase_length

SHARES = (0.026, 0.05, 0.1, 0.2, 0.4)
PIPELINES = tuple((stages, count) for stages in (4, 8, 16) for count in (16, 32, 64))


def costs_of(stages: int, share: float) -> Costs:
    """A stage's forward takes 1 and its backward 2; encoding a microbatch takes ``share`` of both,
    on every stage."""
    return Costs(1.0, 2.0, share * stages, 2.0 * share * stages)


def row(stages: int, microbatches: int, share: float) -> str:
    """Step lengths as multiples of the language model's own work, which has no bubble."""
    costs, portions = costs_of(stages, share), (2 * stages,) * microbatches
    work = microbatches * (costs.forward + costs.backward)
    phases, ideal = (
        length(stages, portions, costs) / work for length in (three_phase_length, ideal_length)
    )
    filled = fill(stages, portions, costs).length / work
    return (
        f"| {stages}, {microbatches} | {share:.1%} | {phases:.3f} | {filled:.3f} | {ideal:.3f} | "
        f"{phases / filled:.2f} |"
    )


def table() -> str:
    """A line for each pipeline and share of the encoder."""
    head = "| stages, microbatches | encoder / language | three_phase | filled | ideal | gain |"
    rows = [row(*pipeline, share) for pipeline in PIPELINES for share in SHARES]
    return "\n".join([head, "| --- " * 6 + "|", *rows]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())

"""Tables and a plot from what the ranks measured."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from examples.benchmark.cases import Case, family
from examples.benchmark.predicted import table as predicted

mpl.use("Agg")
from matplotlib import pyplot

Result = dict[str, Any]


def case_of(result: Result) -> Case:
    return Case.from_json(result["case"])


def median(result: Result, arm: str) -> float | None:
    """The median step of ``arm`` in seconds, None where it did not run."""
    found = result["arms"].get(arm, {})
    return statistics.median(found["seconds"]) if "seconds" in found else None


def ratio(result: Result, arm: str, base: str) -> tuple[float, float] | None:
    """The median of time ratios arm / base, and half of what the middle half spans.

    Step by step where both took turns; an arm with a model of its own ran at another time, and is
    compared with the median of ``base``.
    """
    if median(result, arm) is None or median(result, base) is None:
        return None
    ones, others = (result["arms"][name]["seconds"] for name in (arm, base))
    if family(arm) != family(base) or len(ones) != len(others):
        others = [statistics.median(others)] * len(ones)
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    return statistics.median(ratios), _half_spread(ratios)


def _half_spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / 2


def ideal(result: Result) -> float | None:
    """T*: the encoder beside the language module, hidden in the pipeline's bubbles where they
    suffice.

    With p stages and m microbatches the language module alone takes T_L, of which m / (m + p - 1)
    is work: T* = max(T_L, T_L * m / (m + p - 1) + T_E).
    """
    language, encoder = median(result, "language_only"), _encoder(result)
    if language is None or encoder is None:
        return None
    case = case_of(result)
    stages, count = case.layouts["language"].pp, case.microbatches
    return max(language, language * count / (count + stages - 1) + encoder)


def _encoder(result: Result) -> float | None:
    found = [median(result, arm) for arm in result["arms"] if arm.startswith("encoder_only")]
    return min((seconds for seconds in found if seconds is not None), default=None)


def differing(result: Result, tolerance: float) -> list[str]:
    """What is wrong with the losses and gradient norms, which all arms must share."""
    problems = []
    for what in ("loss", "norm"):
        seen = {
            arm: found[what] for arm, found in result["arms"].items() if found.get(what) is not None
        }
        first = next(iter(seen.values()), 0.0)
        # Written so that a NaN is a problem.
        if not all(abs(value - first) <= tolerance * abs(first) for value in seen.values()):
            problems.append(f"{case_of(result)}: {what} differs: {seen}")
    return problems


def table(result: Result) -> str:
    """The case in Markdown: a line for each arm."""
    case, best = case_of(result), ideal(result)
    language = median(result, "language_only")
    lines = [
        f"**{case}**, {result['world']} x {result['device']}",
        "",
        "| arm | step, s | +- | TFLOP/s per rank | tokens/s | T_language / T | T / T* | "
        "peak, GiB | outside, GiB | groups | loss | norm |",
        "| --- " * 12 + "|",
    ]
    for arm, found in result["arms"].items():
        seconds = median(result, arm)
        if seconds is None:
            lines.append(f"| {arm} | {found['failed']} " + "| " * 10 + "|")
            continue
        rate = case.flops(arm) / seconds / result["world"] / 1e12
        tokens = case.batch * case.sizes.length / seconds
        cells = [
            arm,
            f"{seconds:.3f}",
            f"{_half_spread(found['seconds']):.3f}",
            f"{rate:.3g}",
            f"{tokens:.0f}",
            "" if language is None else f"{language / seconds:.3f}",
            "" if best is None else f"{seconds / best:.3f}",
            f"{found['peak_gib']:.1f}",
            f"{found['outside_gib']:.1f}",
            str(found["communicators"]),
            "" if found["loss"] is None else f"{found['loss']:.5f}",
            "" if found["norm"] is None else f"{found['norm']:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    encoder = _encoder(result)
    if best is not None and language is not None and encoder is not None:
        lines += [
            "",
            f"Encoder {encoder / (encoder + language):.1%} of the time of both alone, "
            f"T* = {best:.3f} s.",
        ]
    everywhere = any(arm.partition("=")[0] == "homogeneous" for arm in result["arms"])
    if language is not None and encoder is not None and everywhere:
        # Each cp rank encodes every sample, each tp rank its part of all.
        copies = case.layouts["language"].cp
        predicted = (language + copies * encoder) / (language + encoder)
        lines.append(f"homogeneous / three_phase by the times of both alone: {predicted:.3f}.")
    lines += [
        f"{arm}: {found['launches']} kernels launched, {found['waits']} waits for the GPU, which "
        f"computed {found['computing']:.3f} s and was busy {found['busy']:.3f} s."
        for arm, found in result["arms"].items()
        if "launches" in found
    ]
    base = "megatron" if "megatron" in result["arms"] else "three_phase"
    for arm in result["arms"]:
        found_ratio = ratio(result, arm, base)
        if found_ratio is not None and arm != base and "only" not in arm:
            lines.append(f"{arm} / {base}: {found_ratio[0]:.3f} +- {found_ratio[1]:.3f}.")
    return "\n".join(lines)


def markdown(results: list[Result]) -> str:
    return "\n\n".join(table(result) for result in results) + "\n"


PAGE = """# Results

Written by `python -m examples.benchmark {sets}--page FILE`.

## Measured

Every arm of a case runs on the same weights, data and process groups; arms take turns, a step each.
A step is gradients to zero, forward, backward and optimizer, on all ranks; the table has the median
and half of what the middle half of the steps spans. FLOPs count 6 for each weight and token, and
12 * hidden * length^2 for each layer and sample of attention. T* is what the encoder and the
language module take alone, with the encoder in the pipeline's bubbles as far as it fits. A line
`arm / other` below a table is the median of that ratio step by step, not the quotient of two
medians; where the arms have models of their own (`homogeneous`, `first_stage`), they ran at other
times, and it is over the other's median.

{measured}
## Predicted

Lengths of a step as multiples of the language model's own work, by `passes/fill.py`; encoders
run in two portions for each stage and microbatch.

{predicted}"""


def page(results: list[Result]) -> str:
    """RESULTS.md: what was measured, and what filled should gain on larger pipelines."""
    measured = markdown(results) if results else "Nothing yet.\n"
    return PAGE.format(sets="... " if results else "", measured=measured, predicted=predicted())


def plot(results: list[Result], path: Path) -> None:
    """A PNG with a bar for the median step of every arm, T* as a line."""
    heights = [max(2, len(result["arms"])) for result in results]
    figure, axes = pyplot.subplots(
        len(results),
        1,
        figsize=(8, 0.35 * sum(heights) + 0.9 * len(results)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, result in zip(axes[:, 0], results, strict=True):
        arms = list(result["arms"])
        seconds = [median(result, arm) or 0.0 for arm in arms]
        spread = [_half_spread(result["arms"][arm].get("seconds", [])) for arm in arms]
        bars = axis.barh(arms, seconds, xerr=spread, color="#4c78a8", height=0.7)
        labels = [
            f"{value:.3f} s" if value else result["arms"][arm]["failed"][:40]
            for arm, value in zip(arms, seconds, strict=True)
        ]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(str(case_of(result)), fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        best = ideal(result)
        if best is not None:
            axis.axvline(best, color="#e45756", linestyle="--", linewidth=1)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

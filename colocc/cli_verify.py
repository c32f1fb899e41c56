"""verify: solve and prove every pair of layouts up to a number of ranks."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from colocc.errors import LayoutError
from colocc.passes.solve.enumerate import (
    AXES,
    USUAL,
    Pair,
    Verdict,
    is_another,
    judge,
    pairs,
    written,
)

MOST_RANKS = 4096
ALL_ORDERS_UP_TO = 16
CHUNK = 256
SHOWN = 5


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The parser of this command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify", help="solve and prove every pair of layouts up to a number of ranks"
    )
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--ranks", type=int, metavar="N", help="every world size from 1 to N")
    sizes.add_argument("--powers", type=int, metavar="N", help="every power of two from 1 to N")
    parser.add_argument(
        "--axes", default=",".join(AXES), metavar="tp,cp,pp,dp",
        help="the axes that layouts have; a source has no pp",
    )  # fmt: skip
    parser.add_argument(
        "--orders", choices=("all", "usual"),
        help=f"every order of the axes, or {' and '.join(USUAL)}; all up to "
        f"{ALL_ORDERS_UP_TO} ranks if not given",
    )  # fmt: skip
    parser.add_argument(
        "--part", default="1/1", metavar="I/N",
        help="the I-th of N parts, about equally long, of which all together are the whole",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", help="processes, one for each core")
    parser.add_argument("--json", action="store_true", help="one object instead of text")
    return parser


@dataclass
class Tally:
    """What all verdicts come to."""

    pairs: int = 0
    wrong: list[int] = field(default_factory=lambda: [0, 0])
    shown: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    worst: dict[str, tuple[Fraction, str]] = field(default_factory=dict)

    def add(self, pair: Pair, verdict: Verdict) -> None:
        """Count one pair."""
        self.pairs += 1
        for way, text in enumerate(verdict.wrong):
            self.wrong[way] += bool(text)
            if text and len(self.shown) < SHOWN:
                self.shown.append(text)
        for reason, ratio in verdict.above:
            kind = re.sub(r"[0-9]+", "n", reason)
            self.kinds[kind] += 1
            if ratio > self.worst.get(kind, (Fraction(0), ""))[0]:
                self.worst[kind] = (ratio, f"{pair[0]} -> {pair[1]}")

    def ratio(self) -> Fraction:
        """The worst received/bound ratio of any rank."""
        return max([Fraction(1), *(ratio for ratio, _ in self.worst.values())])


def run(options: argparse.Namespace) -> int:
    """Print the closing line; the exit status is 1 if any plan is wrong."""
    axes, worlds = read_axes(options.axes), read_worlds(options)
    orders = options.orders or ("all" if max(worlds) <= ALL_ORDERS_UP_TO else "usual")
    names = None if orders == "all" else USUAL
    part = read_part(options.part)
    started = time.perf_counter()
    tally = Tally()
    for pair, verdict in judged(worlds, axes, names, options.jobs or os.cpu_count() or 1, part):
        tally.add(pair, verdict)
    seconds = time.perf_counter() - started
    raw = sum(written(world, axes, names) for world in worlds)
    if options.json:
        found = as_json(tally, worlds, axes, orders, raw, seconds)
        print(json.dumps(found | {"part": list(part)}))
    else:
        of_part = [f"part {part[0]} of {part[1]}:"] if part[1] > 1 else []
        print("\n".join(of_part + as_text(tally, worlds, axes, orders, raw, seconds)))
    return int(any(tally.wrong))


def read_axes(text: str) -> tuple[str, ...]:
    """``tp,cp,pp,dp`` as names. Raises: LayoutError for anything else."""
    names = tuple(text.split(","))
    if not names or len(set(names)) != len(names) or not set(names) <= set(AXES):
        raise LayoutError(f"--axes is {text[:40]!a}: write some of {','.join(AXES)}, each once")
    return tuple(axis for axis in AXES if axis in names)


def read_part(text: str) -> tuple[int, int]:
    """``I/N`` as numbers. Raises: LayoutError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise LayoutError(f"--part is {text[:40]!a}: write 1/4 for the first of four parts")
    return int(found[1]), int(found[2])


def read_worlds(options: argparse.Namespace) -> list[int]:
    """The world sizes. Raises: LayoutError for a size out of range."""
    given = options.powers if options.ranks is None else options.ranks
    flag = "--powers" if options.ranks is None else "--ranks"
    if not 1 <= given <= MOST_RANKS:
        raise LayoutError(f"{flag} is {given}: write 1 to {MOST_RANKS}")
    if options.jobs is not None and options.jobs < 1:
        raise LayoutError(f"--jobs is {options.jobs}: give at least 1")
    if options.ranks is not None:
        return list(range(1, given + 1))
    return [1 << power for power in range(given.bit_length())]


def judged(
    worlds: list[int],
    axes: tuple[str, ...],
    orders: tuple[str, ...] | None,
    jobs: int,
    part: tuple[int, int] = (1, 1),
) -> Iterator[tuple[Pair, Verdict]]:
    """Every pair of a part and its verdict, from ``jobs`` processes."""
    # The largest worlds first: the last chunks are then small.
    every = (
        found[begin : begin + CHUNK]
        for world in reversed(worlds)
        for found in (pairs(world, axes, orders),)
        for begin in range(0, len(found), CHUNK)
    )
    chunks = itertools.islice(every, part[0] - 1, None, part[1])
    if jobs == 1:
        for chunk in chunks:
            yield from judge_all(chunk)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_settle) as pool:
        for results in pool.imap_unordered(judge_all, chunks):
            yield from results


def _settle() -> None:
    """Keep what importing made out of garbage collection: it is most of what there is."""
    gc.collect()
    gc.freeze()


def judge_all(chunk: list[Pair]) -> list[tuple[Pair, Verdict]]:
    """The verdict of each pair of a chunk that is a problem of its own."""
    return [(pair, judge(pair)) for pair in chunk if is_another(pair)]


def as_text(
    tally: Tally, worlds: list[int], axes: tuple[str, ...], orders: str, raw: int, seconds: float
) -> list[str]:
    """The lines that ``verify`` prints; the closing one first, then the kinds above 1.00."""
    places = f"1 to {worlds[-1]}" if len(worlds) == worlds[-1] else ", ".join(map(str, worlds))
    lines = [f"wrong: {text}" for text in tally.shown]
    lines += [
        f"worlds of {places} ranks; axes {','.join(axes)}; "
        + ("every order" if orders == "all" else f"orders {' and '.join(USUAL)}")
        + "; sp on and off; contiguous and zigzag",
        f"{raw} pairs of layouts; those that place ranks and cut alike once, each as its value is "
        "whole, cut by sequence, or by rows and positions:",
        f"{tally.pairs} pairs, {tally.wrong[0]} wrong forward, {tally.wrong[1]} wrong backward, "
        f"worst received/bound ratio {float(tally.ratio()):.2f}, {seconds:.1f} seconds",
    ]
    if not tally.kinds:
        return lines
    lines.append(f"above 1.00 ({tally.kinds.total()} directions; all others are at 1.00):")
    for kind, count in tally.kinds.most_common():
        ratio, example = tally.worst[kind]
        lines.append(f"  {count} times, up to {float(ratio):.2f} ({example}): {kind}")
    return lines


def as_json(
    tally: Tally, worlds: list[int], axes: tuple[str, ...], orders: str, raw: int, seconds: float
) -> dict[str, Any]:
    """The same as an object."""
    return {
        "worlds": worlds,
        "axes": list(axes),
        "orders": orders,
        "layout_pairs": raw,
        "pairs": tally.pairs,
        "wrong": {"forward": tally.wrong[0], "backward": tally.wrong[1], "shown": tally.shown},
        "worst_ratio": float(tally.ratio()),
        "seconds": round(seconds, 1),
        "above": [
            {
                "reason": kind,
                "count": count,
                "worst_ratio": float(tally.worst[kind][0]),
                "example": tally.worst[kind][1],
            }
            for kind, count in tally.kinds.most_common()
        ],
    }

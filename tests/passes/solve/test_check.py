"""The checker accepts every good plan and rejects every mutant of one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from colocc.errors import VerifyError
from colocc.layout import DEFAULT_ORDER, Layout
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Moves, Plan, Step
from colocc.passes.solve.solver import solve
from colocc.types import Type
from tests.passes.solve.mutants import mutants
from tests.passes.solve.pairs import OLD_ORDER, ROWS, SEQUENCE, TUPLES, WHOLE, tuple_pair

SCALE = Fraction(2)
MOST = 40
# images, language, dims, ranks per node
EDGES = (
    ("tp2 dp3", "tp3 dp2", WHOLE, None),
    ("tp3 dp2", "tp2 dp3", WHOLE, None),
    ("dp6", "tp2 pp3 dp1", WHOLE, None),
    ("tp2 dp6", "tp3 dp4 order=dp-tp", WHOLE, None),
    ("tp2 dp4", "tp2 cp2 dp2", WHOLE, None),
    ("tp4 cp2 dp1", "tp2 cp4 dp1", WHOLE, None),
    ("dp8", "tp2 cp2 pp2 dp1", WHOLE, None),
    ("tp2 dp4", "tp8 dp1 sp", SEQUENCE, None),
    ("tp2 dp4 sp", "tp8 dp1 sp", SEQUENCE, None),
    ("tp4 dp2 sp", "tp2 dp4", SEQUENCE, None),
    ("dp8", "tp2 cp2 dp2 zigzag", SEQUENCE, None),
    ("dp8", "tp2 cp2 dp2 sp zigzag", SEQUENCE, None),
    ("tp2 cp2 dp2 sp zigzag", "tp2 cp4 dp1 zigzag order=cp-tp", SEQUENCE, None),
    ("tp3 dp2 sp", "cp2 dp3 zigzag", SEQUENCE, None),
    ("tp2 dp4 sp", "tp2 cp2 dp2 sp zigzag", ROWS, None),
    ("cp2 dp3", "cp3 pp2 dp1 zigzag", ROWS, None),
    ("tp2 dp4", "tp8 dp1", WHOLE, 4),
    ("tp2 dp4", "tp2 pp2 dp2", WHOLE, 2),
    ("tp4 dp2", "tp2 cp2 pp2 dp1 zigzag", SEQUENCE, 4),
)


def edge(src: Layout, dst: Layout, dims: tuple[str, ...] = WHOLE, nodes: int | None = None) -> Plan:
    value = Type.parse("bf16[24@dp,24,16]", "images", src)
    return solve(
        ("images", src), ("language", dst), dims=dims, scale=SCALE, value=value,
        ranks_per_node=nodes,
    )  # fmt: skip


def plans() -> list[Plan]:
    found = [
        edge(*tuple_pair(index, order))
        for order in (DEFAULT_ORDER, OLD_ORDER)
        for index in range(len(TUPLES))
    ]
    for src, dst, dims, nodes in EDGES:
        found.append(edge(Layout.parse(src), Layout.parse(dst), dims, nodes))
    return found


def test_every_mutant_is_rejected() -> None:
    tried: Counter[str] = Counter()
    accepted = []
    for number, plan in enumerate(plans()):
        check(plan, scale=SCALE, value=plan.value)
        found = [(what, mutant) for what, mutant in mutants(plan) if mutant != plan]
        # The same share of every kind, so that plans of many moves do not drown the others.
        random.Random(number).shuffle(found)
        share: Counter[str] = Counter()
        for what, mutant in found:
            share[what] += 1
            if share[what] > MOST:
                continue
            tried[what] += 1
            try:
                check(mutant, scale=SCALE, value=plan.value)
            except VerifyError:
                continue
            accepted.append(f"{plan.src.layout} -> {plan.dst.layout}: {what}\n  {mutant}")
    assert not accepted, f"{len(accepted)} accepted:\n" + "\n".join(accepted[:5])
    assert tried.total() >= 10_000
    ways = {f"{way} {what}" for way in ("forward", "backward") for what in STEP_KINDS}
    ends = {f"{side} {what} of dim 0" for side in ("src", "dst") for what in CUT_KINDS}
    assert ways | ends | WORDS <= set(tried), sorted((ways | ends | WORDS) - set(tried))


STEP_KINDS = (
    *("groups swapped", "groups joined", "groups reordered", "group cut", "group dropped"),
    *("group reversed", "group doubled", "slice shifted", "peer", "move dropped", "move doubled"),
    *("moves reordered", "peers swapped", "step dropped", "step doubled", "steps reordered"),
    *("step added", "kind", "adds"),
)
CUT_KINDS = ("cuts swapped", "cut dropped", "cut shifted", "axes")
WORDS = {
    *("scale", "value", "kind of plan", "ratio", "grid", "dims", "form", "directions"),
    *("dst stage", "dst partial", "src partial", "dst cut shifted of dim 1", "dst axes of dim 1"),
}


def small() -> Plan:
    return edge(Layout(tp=2, dp=4), Layout(tp=4, dp=2))


def test_a_rejection_names_the_rank_and_what_it_ends_with() -> None:
    plan = small()
    step = replace(plan.forward[0], groups=((0, 4), (1, 5), (2, 6), (3, 7)))
    with pytest.raises(VerifyError) as info:
        check(replace(plan, forward=(step,)))
    assert str(info.value) == (
        "plan images (tp2 dp4) -> language (tp4 dp2) is wrong: forward, rank 0 ends with sample "
        "0:1, sample 2:3, it needs sample 0:2. This is a bug in colocc: please report it with the "
        "dump."
    )


def test_a_rejection_spells_dims_and_summands() -> None:
    plan = edge(Layout(dp=4), Layout(cp=2, dp=2), WHOLE)
    moves = plan.backward[0].moves
    assert plan.backward[0].adds
    lost = replace(plan.backward[0], moves=moves.select((moves.dst != 1) | (moves.src != 1)))
    with pytest.raises(VerifyError) as info:
        check(replace(plan, backward=(lost,)))
    assert "backward, rank 1 ends with sample 1:2 summand 0:1, it needs sample 1:2 summand 0:2" in (
        str(info.value)
    )


def test_the_scale_is_checked_only_where_one_is_given() -> None:
    plan = small()
    check(plan)
    check(plan, scale=SCALE)
    with pytest.raises(VerifyError, match="the gradient is scaled by 2, not by 1/2"):
        check(plan, scale=Fraction(1, 2))


def test_the_value_is_checked_where_one_is_given() -> None:
    plan = small()
    assert plan.value is not None
    check(plan, value=plan.value)
    with pytest.raises(VerifyError, match="it carries bf16"):
        check(plan, value=replace(plan.value, dtype="f32"))


def test_samples_are_in_the_order_of_the_sink() -> None:
    sink = ("language", Layout(tp=2, pp=2, dp=2))
    src, dst = Layout(dp=8), Layout(tp=2, dp=4)
    plan = solve(("images", src), ("fusion", dst), sink=sink)
    check(plan, sink=sink)
    # The fusion module holds what suits the language module, which is no order of its own.
    with pytest.raises(VerifyError, match=r"fusion .* orders the samples"):
        check(plan)


def test_bytes_above_the_bound_and_several_collectives_want_a_reason() -> None:
    plan = edge(Layout(tp=2, dp=4), Layout(cp=4, dp=2), WHOLE)
    with pytest.raises(VerifyError, match="backward, it is above its bound and gives no reason"):
        check(replace(plan, reasons=()))
    plan = edge(Layout(tp=2, dp=4), Layout(tp=8), WHOLE, nodes=4)
    with pytest.raises(VerifyError, match="forward, it takes several collectives and gives no"):
        check(replace(plan, reasons=()))


def test_a_redundant_byte_is_an_error() -> None:
    # Everybody gathers everything, and throws most of it away.
    layout = Layout(dp=4)
    plan = edge(layout, layout)
    gather = Step("all_gather", ((0, 1, 2, 3),))
    keep = Moves.make(*(np.arange(4),) * 2, np.arange(4)[:, None], np.arange(4)[:, None] + 1)
    with pytest.raises(VerifyError, match="rank 0 receives 3 cells and lacks 0"):
        check(replace(plan, forward=(gather, Step("narrow", moves=keep))))

"""Covers runtime/data.py, by brute force over ids, and runtime/checks.py."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from colocc import passes
from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.graph import Graph
from colocc.passes.solve.plan import Plan
from colocc.passes.solve.solver import solve
from colocc.runtime.checks import check_batches, check_divides
from colocc.runtime.data import Batches, cut_sequence
from colocc.runtime.holdings import holding_of, sample_runs

ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-pp-dp", "dp-pp-tp"]


def layouts(world: int, order: str, stages: tuple[int, ...]) -> list[Layout]:
    """Every tp, pp, dp with this product."""
    sizes = itertools.product([n for n in range(1, world + 1) if world % n == 0], stages)
    return [
        Layout(tp=world // (dp * pp), pp=pp, dp=dp, order=order)
        for dp, pp in sizes
        if world % (dp * pp) == 0
    ]


def pairs(world: int) -> Iterator[tuple[Layout, Layout]]:
    """Encoder and language layouts of ``world`` ranks that a plan covers."""
    for order in ORDERS:
        encoders, languages = layouts(world, order, (1,)), layouts(world, order, (1, 2, 4))
        yield from itertools.product(encoders, languages)


def follow(plan: Plan, encoded: list[list[Any]], per_unit: int) -> list[list[Any]]:
    """What each rank reads, if each holder's items go where the units of ``plan`` say."""
    where: dict[int, list[Any]] = {}
    for rank, intervals in enumerate(plan.src.units()):
        units = [u for start, stop in intervals for u in range(start, stop)]
        for place, unit in enumerate(units):
            items = encoded[rank][place * per_unit : (place + 1) * per_unit]
            assert where.setdefault(unit, items) == items
    return [
        [item for start, stop in intervals for u in range(start, stop) for item in where[u]]
        for intervals in plan.dst.units()
    ]


def ids(runs: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(mb, sample) for mb, start, stop in runs for sample in range(start, stop)]


@pytest.mark.parametrize("world", [1, 2, 4, 8, 12])
def test_every_pair_reads_its_own_text_s_images(world: int) -> None:
    seen = 0
    for src, dst in pairs(world):
        plan = solve(("images", src), ("language", dst))
        for microbatches, factor in itertools.product((1, 2, 3), (1, 2)):
            size = dst.dp * factor
            if microbatches * size % plan.units:
                continue
            seen += 1
            encoded: list[list[Any]] = [
                ids(sample_runs(plan.src, dst.dp, microbatches, size, rank))
                for rank in range(world)
            ]
            # Each sample is encoded by one slot.
            slots = {int(slot): encoded[r] for r, slot in enumerate(src.coordinates("dp"))}
            everything = [item for items in slots.values() for item in items]
            whole = [(m, s) for m in range(microbatches) for s in range(size)]
            assert sorted(everything) == whole
            got = follow(plan, encoded, microbatches * size // plan.units)
            for rank in range(world):
                replica = int(dst.coordinates("dp")[rank])
                part = range(replica * factor, (replica + 1) * factor)
                reads = [(m, s) for m in range(microbatches) for s in part]
                first = int(dst.coordinates("pp")[rank]) == 0
                assert got[rank] == (reads if first else [])
    assert seen > 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_large_worlds(data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([16, 24, 36, 64]))
    order = data.draw(st.sampled_from(ORDERS))
    src = data.draw(st.sampled_from(layouts(world, order, (1,))))
    dst = data.draw(st.sampled_from(layouts(world, order, (1, 2, 4))))
    plan = solve(("images", src), ("language", dst), scale=Fraction(1))
    microbatches = data.draw(st.integers(1, 5))
    size = plan.units * data.draw(st.integers(1, 2))
    encoded: list[list[Any]] = [
        ids(sample_runs(plan.src, dst.dp, microbatches, size, rank)) for rank in range(world)
    ]
    got = follow(plan, encoded, microbatches * size // plan.units)
    rank = data.draw(st.integers(0, world - 1))
    replica, part = int(dst.coordinates("dp")[rank]), size // dst.dp
    reads = [(m, replica * part + s) for m in range(microbatches) for s in range(part)]
    assert got[rank] == (reads if int(dst.coordinates("pp")[rank]) == 0 else [])


def test_runs_are_as_long_as_can_be() -> None:
    plan = solve(("images", Layout(tp=8)), ("language", Layout(dp=8)))
    assert sample_runs(plan.src, 8, 1, 8, 0) == [(0, 0, 8)]
    # Replica by replica, and within it microbatch by microbatch.
    assert sample_runs(plan.src, 8, 2, 8, 0)[:4] == [(0, 0, 1), (1, 0, 1), (0, 1, 2), (1, 1, 2)]


@pytest.mark.parametrize(("slots", "replicas"), [(3, 2), (2, 3), (8, 2), (5, 4), (6, 6), (1, 4)])
@pytest.mark.parametrize("part", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_slots_of_samples_that_do_not_divide(
    slots: int, replicas: int, part: int, microbatches: int
) -> None:
    src, dst = Layout(tp=replicas, dp=slots), Layout(tp=slots, dp=replicas)
    plan = solve(("images", src), ("language", dst))
    size = part * replicas
    held: list[list[tuple[int, int]]] = [[] for _ in range(slots)]
    for rank, slot in enumerate(src.coordinates("dp").tolist()):
        found = ids(sample_runs(plan.src, replicas, microbatches, size, rank))
        assert held[slot] in ([], found)
        held[slot] = found
    everything = [item for items in held for item in items]
    assert sorted(everything) == [(m, s) for m in range(microbatches) for s in range(size)]
    # Unit u of U holds the samples from floor(u * n / U) to floor((u + 1) * n / U) of a replica.
    count, inside = plan.units // replicas, microbatches * part
    for slot, runs in enumerate(plan.src.slots):
        wanted = [
            (place // part, unit // count * part + place % part)
            for start, stop in runs
            for unit in range(start, stop)
            for place in range(unit % count * inside // count, (unit % count + 1) * inside // count)
        ]
        assert held[slot] == wanted


# ---------------------------------------------------------------- Batches


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.language = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, pixels: Any, ids: Any) -> Any:
        return self.language(self.images(pixels["left"]) + ids)


def graph_of(src: Layout, dst: Layout, batch_dims: dict[str, int] | None = None) -> Graph:
    found = {"images": src, "language": dst}
    return passes.run(
        Model(),
        found,
        reductions=dict.fromkeys(found, "mean"),
        example_inputs=batch(8, 0, batch_dims or {}),
        batch_dims=batch_dims,
    )


def batch(size: int, microbatch: int, batch_dims: dict[str, int] | None = None) -> dict[str, Any]:
    """Both inputs say (microbatch, sample) in their last dim, three rows a sample."""
    codes = torch.tensor([[[float(microbatch), float(s)]] * 3 for s in range(size)])
    dims = batch_dims or {}
    return {
        "pixels": {"left": codes.movedim(0, dims.get("pixels", 0))},
        "ids": codes.movedim(0, dims.get("ids", 0)),
    }


@pytest.mark.parametrize("batch_dims", [{}, {"pixels": 1, "ids": 1}])
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_batches_cut_what_the_runs_say(
    order: str, microbatches: int, batch_dims: dict[str, int]
) -> None:
    src, dst = Layout(tp=2, dp=4, order=order), Layout(tp=4, dp=2, order=order)
    graph = graph_of(src, dst, batch_dims)
    size, dim = 8, 1 if batch_dims else 0
    steps = [batch(size, index, batch_dims) for index in range(microbatches)]
    pixels, text = (
        next(n for n in graph.placeholders() if n.meta["path"][0] == name)
        for name in ("pixels", "ids")
    )
    for rank in range(8):
        batches = Batches(graph, steps, rank, batch_dims)
        cut = batches.encoder_input(pixels).movedim(dim, 0)
        runs = sample_runs(holding_of(graph, "images"), 2, microbatches, size, rank)
        assert cut[:, 0].tolist() == [[float(m), float(s)] for m, s in ids(runs)]
        replica = int(dst.coordinates("dp")[rank])
        for index in range(microbatches):
            part = batches.sink_input(text, index).movedim(dim, 0)
            wanted = [[float(index), float(s)] for s in range(replica * 4, replica * 4 + 4)]
            assert part[:, 0].tolist() == wanted


def test_equal_layouts_read_their_own_replica() -> None:
    layout = Layout(tp=4, dp=2)
    graph = graph_of(layout, layout)
    assert not graph.plans
    assert ids(sample_runs(holding_of(graph, "images"), 2, 2, 4, 4)) == [
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
    ]


BAD: list[tuple[Any, str]] = [
    ({"pixels": {"left": torch.zeros(8, 3, 2)}}, "microbatch 0 lacks the input ids"),
    ({"ids": torch.zeros(8, 3, 2)}, r"microbatch 0 lacks the input pixels\.left"),
    ({**batch(8, 0), "pixels": {"lefty": torch.zeros(8, 3, 2)}}, r"lacks the input pixels\.left"),
    ({**batch(8, 0), "pixels": None}, r"lacks the input pixels\.left"),
    ({**batch(8, 0), "more": torch.zeros(8)}, "has 'more', which Model.forward does not read"),
    (
        {**batch(8, 0), "pixels": {"left": torch.zeros(8, 3, 2), "right": torch.zeros(8, 3, 2)}},
        r"has 'pixels\.right', which Model.forward does not read",
    ),
    ({**batch(8, 0), "ids": torch.zeros(6, 3, 2)}, "ids of microbatch 0 has 6 samples in dim 0, "),
    ({"pixels": {"left": 1}, "ids": 2}, "ids of microbatch 0 is a int: only a tensor is cut by"),
    ([1, 2], "microbatch 0 is a list: give a dict of the arguments of Model.forward"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_batches(bad: Any, message: str) -> None:
    graph = graph_of(Layout(tp=2, dp=4), Layout(tp=4, dp=2))
    with pytest.raises(LayoutError, match=message):
        check_batches(graph, [bad], {}, frozenset())


def test_microbatches_of_different_sizes() -> None:
    graph = graph_of(Layout(tp=2, dp=4), Layout(tp=4, dp=2))
    with pytest.raises(LayoutError, match=r"of microbatch 1 has 4 samples in dim 0, .* has 8"):
        check_batches(graph, [batch(8, 0), batch(4, 1)], {}, frozenset())


def test_none_is_an_input_left_out() -> None:
    graph = graph_of(Layout(tp=2, dp=4), Layout(tp=4, dp=2))
    assert check_batches(graph, [{**batch(8, 0), "more": None}], {}, frozenset()) == 8
    left_out = {"pixels": batch(8, 0)["pixels"]}
    assert check_batches(graph, [left_out], {}, frozenset({"ids"})) == 8
    with pytest.raises(LayoutError, match="the batch holds no tensor"):
        check_batches(graph, [{}], {}, frozenset({"ids", "pixels"}))


def test_a_microbatch_that_the_replicas_cannot_share() -> None:
    graph = graph_of(Layout(tp=2, dp=4), Layout(tp=4, dp=2))
    with pytest.raises(LayoutError, match=r"language \(tp4 dp2\) has 2 dp replicas: 7 % 2 = 1"):
        check_divides(graph, 1, 7)


def test_a_step_that_the_slots_cannot_share() -> None:
    graph = graph_of(Layout(dp=8), Layout(tp=4, dp=2))
    with pytest.raises(LayoutError, match=r"images \(tp1 dp8\) must cut into 4 .*: 6 % 4 = 2"):
        check_divides(graph, 3, 4)
    check_divides(graph, 2, 4)


def test_slots_that_do_not_divide_hold_more_than_others_or_nothing() -> None:
    """As rows need it; values of equally many rows in each slot are refused."""
    graph = graph_of(Layout(dp=8), Layout(tp=4, dp=2))
    pixels = next(n for n in graph.placeholders() if n.meta["path"][0] == "pixels")
    with pytest.raises(LayoutError, match="must cut into 4 equal parts"):
        Batches(graph, [batch(2, 0)], 0, {})
    holding = holding_of(graph, pixels.meta["module"])
    runs = [sample_runs(holding, 2, 1, 2, rank) for rank in range(8)]
    assert sorted(sum(stop - start for _, start, stop in run) for run in runs) == [0] * 6 + [1, 1]
    with pytest.raises(LayoutError, match="3 % 2 = 1"):
        Batches(graph, [batch(3, 0)], 0, {})


SEQUENCE = list(range(24))


@pytest.mark.parametrize(
    ("layout", "rank", "wanted"),
    [
        (Layout(cp=2, dp=4), 1, SEQUENCE[12:]),
        (Layout(cp=2, dp=4, zigzag=True), 0, SEQUENCE[:6] + SEQUENCE[18:]),
        (Layout(cp=2, dp=4, zigzag=True), 1, SEQUENCE[6:18]),
        (Layout(tp=2, cp=2, dp=2, zigzag=True, sp=True), 1, SEQUENCE[18:]),
        (Layout(tp=2, cp=2, dp=2, zigzag=True, sp=True), 2, SEQUENCE[6:12]),
        (Layout(tp=2, dp=4, sp=True), 1, SEQUENCE[12:]),
        (Layout(tp=2, dp=4), 1, SEQUENCE),
    ],
)
def test_the_part_of_a_sequence(layout: Layout, rank: int, wanted: list[int]) -> None:
    value = torch.tensor(SEQUENCE).expand(3, 24).clone()
    assert cut_sequence(value, 1, layout, rank).tolist() == [wanted] * 3
    assert cut_sequence(value.t(), 0, layout, rank).t().tolist() == [wanted] * 3

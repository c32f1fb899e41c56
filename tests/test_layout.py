"""Covers: colocc/layout.py."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from colocc.errors import LayoutError
from colocc.layout import AXES, DEFAULT_ORDER, Layout
from colocc.ranks import RANK, closed_form

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about Megatron's own code
    from megatron.core import parallel_state
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.parallel_state import RankGenerator

DENSE = ("tp", "cp", "dp", "pp")
THIRDS = {"colocc.layout": {"colocc", "numpy", "sympy"}, "colocc.ranks": {"numpy", "sympy"}}
ORDERS = tuple("-".join(axes) for axes in itertools.permutations(AXES))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def sizes_of(ranks: int) -> Iterator[dict[str, Any]]:
    for tp, cp, pp in itertools.product(divisors(ranks), repeat=3):
        if ranks % (tp * cp * pp) == 0:
            yield {"tp": tp, "cp": cp, "pp": pp, "dp": ranks // (tp * cp * pp)}


def subsets(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [s for k in range(len(axes) + 1) for s in itertools.combinations(axes, k)]


def brute_groups(sizes: dict[str, int], axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """``sizes`` fastest first, so the array has them reversed."""
    slow_first = list(sizes)[::-1]
    ranks = np.arange(int(np.prod(list(sizes.values())))).reshape([sizes[a] for a in slow_first])
    varying = [slow_first.index(axis) for axis in axes]
    rows = np.moveaxis(ranks, varying, range(-len(axes), 0)) if axes else ranks
    width = int(np.prod([sizes[axis] for axis in axes]))
    return tuple(sorted(tuple(sorted(row)) for row in rows.reshape(-1, width).tolist()))


@pytest.mark.parametrize("ranks", range(1, 17))
def test_coordinates_are_those_of_a_reshaped_array(ranks: int) -> None:
    for sizes, order in itertools.product(sizes_of(ranks), itertools.permutations(DENSE)):
        layout = Layout(**sizes, order="-".join(order))
        indices = np.indices([sizes[axis] for axis in order[::-1]]).reshape(len(order), -1)
        for axis, expected in zip(order[::-1], indices, strict=True):
            assert np.array_equal(layout.coordinates(axis), expected), (layout, axis)
        coordinates = {axis: layout.coordinates(axis) for axis in DENSE}
        assert np.array_equal(layout.rank(**coordinates), np.arange(ranks)), layout


@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 8, 12, 16])
def test_groups_are_those_of_a_reshaped_array(ranks: int) -> None:
    for sizes, order in itertools.product(sizes_of(ranks), itertools.permutations(DENSE)):
        layout = Layout(**sizes, order="-".join(order))
        ordered = {axis: sizes[axis] for axis in order}
        for axes in subsets(DENSE):
            assert layout.groups(*axes) == brute_groups(ordered, axes), (layout, axes)


def megatron_groups(layout: Layout, expert: bool, token: str) -> tuple[tuple[int, ...], ...]:
    dp = layout.cp * layout.dp // layout.ep if expert else layout.dp
    cp, ep = (1, layout.ep) if expert else (layout.cp, 1)
    generator = RankGenerator(tp=layout.tp, ep=ep, dp=dp, pp=layout.pp, cp=cp, order=layout.order)
    return tuple(sorted(tuple(sorted(group)) for group in generator.get_ranks(token)))


@pytest.mark.parametrize("ranks", [4, 8, 12])
def test_groups_are_those_of_megatrons_rank_generator(ranks: int) -> None:
    names = {"tp": "expt_tp", "ep": "ep", "dp": "expt_dp", "pp": "pp"}
    compared = 0
    for sizes, order in itertools.product(sizes_of(ranks), ORDERS[::5]):
        for ep in divisors(sizes["cp"] * sizes["dp"]):
            try:
                layout = Layout(**sizes, ep=ep, order=order)
            except LayoutError:
                continue
            for axes in [("tp",), ("cp",), ("dp",), ("pp",), ("tp", "pp"), ("tp", "dp", "cp")]:
                found = megatron_groups(layout, False, "-".join(axes))
                assert layout.groups(*axes) == found, (layout, axes)
            if megatron_groups(layout, True, "pp") != layout.groups("pp"):
                assert ep == 1 and layout.expert_groups("expt_dp") == layout.groups("cp", "dp")
                continue
            for axes in [("tp",), ("ep",), ("dp",), ("tp", "ep"), ("tp", "ep", "pp")]:
                found = megatron_groups(layout, True, "-".join(axes))
                assert layout.expert_groups(*(names[a] for a in axes)) == found, (layout, axes)
            compared += 1
    assert compared > 100


def test_refused_exactly_where_megatron_finds_two_kinds_of_pipeline() -> None:
    refused = 0
    for sizes, order in itertools.product(sizes_of(8), ORDERS):
        for ep in divisors(sizes["cp"] * sizes["dp"]):
            rest = sizes["cp"] * sizes["dp"] // ep
            dense = RankGenerator(ep=1, order=order, **sizes)
            expert = RankGenerator(sizes["tp"], ep, rest, sizes["pp"], 1, order)
            if ep == 1 or dense.get_ranks("pp") == expert.get_ranks("pp"):
                layout = Layout(**sizes, ep=ep, order=order)
                assert layout.expert_groups("pp") == layout.groups("pp")
            else:
                refused += 1
                with pytest.raises(LayoutError, match="Put pp last"):
                    Layout(**sizes, ep=ep, order=order)
    assert refused > 0


@pytest.mark.parametrize("order", ["tp-cp-dp-pp", "tp-cp-pp-dp", "pp-dp-tp-cp"])
def test_from_grid(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    sizes: dict[str, Any] = {"tp": 2, "cp": 2, "pp": 2, "dp": 2}
    names = order.split("-")
    grid = HyperCommGrid([sizes[name] for name in names], names)
    layout = Layout.from_grid(grid)
    assert layout.same_grid(Layout(**sizes, order=order))
    for axes in (["tp"], ["cp"], ["pp"], ["dp"], ["tp", "pp"], ["cp", "dp"]):
        found = sorted(tuple(sorted(group)) for group in grid.get_rank_enum(axes))
        assert layout.groups(*axes) == tuple(found)


def test_from_grid_with_an_expert_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    grid = HyperCommGrid([2, 1, 4, 2], ["tp", "cp", "dp", "pp"])
    grid.register_view("expert", [2, 2, 2, 2], ["expt_tp", "ep", "expt_dp", "pp"])
    layout = Layout.from_grid(grid)
    assert str(layout) == "tp2 pp2 dp4 ep2"
    found = sorted(tuple(sorted(group)) for group in grid.get_rank_enum("ep", view="expert"))
    assert layout.expert_groups("ep") == tuple(found)


def test_from_grid_refuses_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(LayoutError, match="starts at rank 4"):
        Layout.from_grid(HyperCommGrid([2, 2], ["tp", "dp"], rank_offset=4))


class Mesh:
    """The two attributes of a DeviceMesh that a layout reads; a real one opens groups."""

    def __init__(self, ranks: Any, names: tuple[str, ...] | None) -> None:
        self.mesh, self.mesh_dim_names = torch.tensor(ranks), names


def test_from_mesh() -> None:
    usual: Any = Mesh(np.arange(8).reshape(2, 2, 2).tolist(), ("pp", "dp", "tp"))
    assert str(Layout.from_mesh(usual)) == "tp2 pp2 dp2"
    other: Any = Mesh(np.arange(8).reshape(2, 2, 2).tolist(), ("dp", "pp", "tp"))
    assert Layout.from_mesh(other).same_grid(Layout(tp=2, pp=2, dp=2, order="tp-pp-dp"))
    transposed: Any = Mesh(np.arange(8).reshape(2, 4).T.tolist(), ("tp", "dp"))
    assert Layout.from_mesh(transposed).same_grid(Layout(tp=4, dp=2))


@pytest.mark.parametrize(
    ("ranks", "names", "text"),
    [
        ([[0, 1], [2, 3]], None, "no mesh_dim_names"),
        ([[0, 1], [2, 3]], ("fsdp", "tp"), "'fsdp'"),
        ([[0, 1], [3, 2]], ("dp", "tp"), "is no layout"),
        ([[4, 5], [6, 7]], ("dp", "tp"), "is no layout"),
    ],
)
def test_from_mesh_refuses(ranks: Any, names: tuple[str, ...] | None, text: str) -> None:
    mesh: Any = Mesh(ranks, names)
    with pytest.raises(LayoutError, match=text):
        Layout.from_mesh(mesh)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes: dict[str, Any] = {axis: draw(st.integers(1, 6)) for axis in DENSE}
    ep = draw(st.sampled_from(divisors(sizes["cp"] * sizes["dp"])))
    order = draw(st.sampled_from([o for o in ORDERS if o.endswith("pp")] if ep > 1 else ORDERS))
    return Layout(**sizes, ep=ep, order=order)


@given(layouts())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_parse_is_the_inverse_of_str(layout: Layout) -> None:
    again = Layout.parse(str(layout))
    assert again.same_grid(layout) and str(again) == str(layout)
    assert Layout.parse(str(layout).replace(" ", ",")) == again
    assert all(np.array_equal(again.coordinates(a), layout.coordinates(a)) for a in DENSE)


@given(layouts(), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_rank_is_the_inverse_of_coordinates(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.size - 1))
    found = {axis: int(layout.coordinates(axis)[rank]) for axis in DENSE}
    assert layout.rank(**found) == rank
    assert all(int(layout.coordinate(a).subs(RANK, rank)) == n for a, n in found.items())


WORDS = st.sampled_from(
    ["tp2", "dp", "pp0", "ep3", "order=", "order=tp-dp", "order=tp-tp", "-", ",", "tp-1", "tp02"]
)


@given(st.one_of(st.text(), st.lists(WORDS | st.text(max_size=5), max_size=6).map(" ".join)))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_parse_raises_nothing_but_layout_error(text: str) -> None:
    try:
        layout = Layout.parse(text)
    except LayoutError as problem:
        assert str(problem).isascii() and len(str(problem)) < 800
    else:
        assert layout.same_grid(Layout.parse(str(layout)))


def message(text: str) -> str:
    with pytest.raises(LayoutError) as caught:
        Layout.parse(text)
    return str(caught.value)


def test_messages_of_parse() -> None:
    bad = ["tp0", "tp2 tp4", "xx3", "tp", "", "order=tp-dp", "tp9999999999", "tp2 order=a order=b"]
    assert_expected_inline(
        "\n".join(map(message, bad)),
        """\
'tp0' in 'tp0' gives tp no positive size; write it like tp2.
'tp4' in 'tp2 tp4' gives tp twice; leave one out.
'xx3' in 'xx3' names no axis; write tp, cp, ep, dp, pp with a size: tp2.
'tp' in 'tp' gives tp no positive size; write it like tp2.
'' names no axis; write it like 'tp2 pp2 dp2'.
'order=tp-dp' names no axis; write it like 'tp2 pp2 dp2'.
'tp9999999999' in 'tp9999999999' gives tp 10 digits; sizes go up to 1048576.
'tp2 order=a order=b' gives the order twice; leave out 'order=b'.""",
    )


def test_messages_of_orders_and_experts() -> None:
    bad = [
        "tp2 order=dp",
        "tp2 order=tp-tp-dp",
        "tp2 order=tp-zz",
        "tp2 order=",
        "dp4 ep3",
        "dp4 ep2 pp2 order=tp-ep-pp-dp",
        "tp1048576 dp2",
    ]
    assert_expected_inline(
        "\n".join(map(message, bad)),
        """\
order 'dp' leaves out tp, and tp = 2; write it where its ranks belong, such as 'dp-tp-cp-ep-pp'.
order 'tp-tp-dp' names tp twice; write 'tp-dp'.
order 'tp-zz' names 'zz', which is no axis; write the axes fastest first, such as 'tp-cp-ep-dp-pp'.
order '' names '', which is no axis; write the axes fastest first, such as 'tp-cp-ep-dp-pp'.
ep3 does not divide cp1 * dp4 = 4 ranks (expt_dp = cp * dp / ep). Write ep1, ep2 or ep4.
order 'tp-ep-pp-dp-cp' with ep2: stages lie 1 ranks apart, experts' stages 2.
Put pp last, as in tp-cp-ep-dp-pp.
tp1048576 * cp1 * pp1 * dp2 = 2097152 ranks; a layout has at most 1048576.""",
    )


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, 10**30])
def test_sizes_are_positive_ints(value: Any) -> None:
    with pytest.raises(LayoutError, match=r"tp = .*write a positive int"):
        Layout(tp=value)


def test_rank_refuses_coordinates_outside_the_grid() -> None:
    with pytest.raises(LayoutError, match=r"dp = 4 is outside 0\.\.3 of tp2 dp4"):
        Layout(tp=2, dp=4).rank(dp=4)
    with pytest.raises(LayoutError, match="'ep' is not an axis here"):
        Layout(tp=2, dp=4).rank(ep=0)


def test_orders_that_make_no_difference_are_one_grid() -> None:
    usual = Layout(tp=2, dp=4)
    same = Layout(tp=2, dp=4, order="tp-pp-dp")
    other = Layout(tp=2, dp=4, order="dp-tp")
    assert usual.same_grid(same) and str(same) == "tp2 dp4"
    assert not usual.same_grid(other) and str(other) == "tp2 dp4 order=dp-tp"
    assert not usual.same_grid(Layout(tp=2, dp=2))
    assert not Layout(dp=4).same_grid(Layout(dp=4, ep=2))


def test_printed_as_in_the_dump() -> None:
    assert [str(Layout(dp=8)), str(Layout(tp=8)), str(Layout(tp=2, pp=2, dp=2))] == [
        "tp1 dp8",
        "tp8 dp1",
        "tp2 pp2 dp2",
    ]
    layout = Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp")
    assert str(layout) == "tp2 pp2 dp2 order=tp-cp-pp-dp"
    assert [closed_form(layout.coordinate(a)) for a in DENSE] == ["r%2", "0", "r//4", "r//2%2"]


def test_thousands_of_ranks_and_read_only() -> None:
    layout = Layout(tp=8, cp=2, pp=8, dp=64)
    ranks = layout.rank(**{axis: layout.coordinates(axis) for axis in DENSE})
    assert np.array_equal(ranks, np.arange(8192))
    assert layout.coordinates("dp") is layout.coordinates("dp")
    with pytest.raises(ValueError, match="read-only"):
        layout.coordinates("dp")[0] = 1


@pytest.mark.parametrize("room", THIRDS)
def test_imports_neither_torch_nor_megatron_at_module_level(room: str) -> None:
    body = ast.parse(inspect.getsource(importlib.import_module(room))).body
    plain = {a.name.split(".")[0] for n in body if isinstance(n, ast.Import) for a in n.names}
    froms = {str(n.module).split(".")[0] for n in body if isinstance(n, ast.ImportFrom)}
    assert (plain | froms) - sys.stdlib_module_names == THIRDS[room]


@pytest.mark.parametrize("room", THIRDS)
def test_no_text_is_evaluated(room: str) -> None:
    source = inspect.getsource(importlib.import_module(room))
    assert not any(word in source for word in ("sympify", "parse_expr", "eval(", "exec("))


def test_default_order_is_megatrons() -> None:
    order = inspect.signature(parallel_state.initialize_model_parallel).parameters["order"]
    assert order.default == DEFAULT_ORDER

"""explain: print the page of the edges from every encoder to the language module."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from typing import Any

from torch import fx

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.dump import page
from colocc.passes.graph import Graph
from colocc.passes.solve.check import check
from colocc.passes.solve.plan import Plan, Step
from colocc.passes.solve.solver import solve
from colocc.sequence import axes_of, form
from colocc.types import Dim, Type

SINK = "language"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,80}")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The parser of this command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain", help="print the plan of every edge between two layouts, without ranks"
    )
    parser.add_argument(
        "--layout", action="append", required=True, metavar="language=tp4,cp2,dp1,sp,zigzag",
        help="a module and its layout; the last one, or language, reads all others",
    )  # fmt: skip
    parser.add_argument(
        "--tensor", required=True, metavar='"bf16[8,576,4096]"',
        help="dtype and global shape of the value: samples, sequence, the rest; [8*576,4096] where "
        "samples and sequence are one dim",
    )  # fmt: skip
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks with fast links")
    parser.add_argument("--json", action="store_true", help="numbers and groups instead of a page")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the page, or the JSON; the exit status."""
    layouts = read_layouts(options.layout)
    nodes = options.ranks_per_node
    if nodes is not None and nodes < 1:
        raise LayoutError(f"--ranks-per-node is {nodes}: give at least 1")
    sink = SINK if SINK in layouts else list(layouts)[-1]
    plans = {
        name: explain(options.tensor, (name, layout), (sink, layouts[sink]), ranks_per_node=nodes)
        for name, layout in layouts.items()
        if name != sink
    }
    if options.json:
        edges = [as_json(plan) for plan in plans.values()]
        texts = {name: str(layout) for name, layout in layouts.items()}
        print(json.dumps({"layouts": texts, "tensor": options.tensor, "edges": edges}, indent=1))
    else:
        print(page(_graph(layouts, sink, plans), "redistribute"), end="")
    return 0


def read_layouts(words: list[str]) -> dict[str, Layout]:
    """``images=tp2,dp4`` by name. Raises: LayoutError for a word that is none, a name given twice,
    fewer than two."""
    layouts: dict[str, Layout] = {}
    for word in words:
        name, equals, axes = word.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise LayoutError(f"{word[:60]!a} is no layout: write it like images=tp2,dp4")
        if name in layouts:
            raise LayoutError(f"{name} has two layouts: {layouts[name]} and {axes[:60]}")
        layouts[name] = Layout.parse(axes)
    if len(layouts) < 2:
        raise LayoutError(
            f"--layout was given for {', '.join(layouts)} alone: an edge has two ends"
        )
    return layouts


def explain(
    tensor: str,
    src: tuple[str, Layout],
    dst: tuple[str, Layout],
    *,
    ranks_per_node: int | None = None,
) -> Plan:
    """The plan, proved, that carries a value of ``tensor``'s shape from ``src`` to ``dst``.

    Raises: LayoutError for a tensor that one of the layouts cannot cut.
    """
    value = typed(tensor, *src)
    typed(tensor, *dst)
    dims = ("sample", "sequence") if axes_of(src[1]) or axes_of(dst[1]) else ("sample",)
    plan = solve(src, dst, dims=dims, value=value, ranks_per_node=ranks_per_node)
    samples = value.dims[0].samples
    if samples % plan.units:
        rest = samples % plan.units
        raise LayoutError(
            f"{tensor} has {samples} samples, which {src[0]} ({src[1]}) and {dst[0]} ({dst[1]}) "
            f"cut into {plan.units} equal parts: {samples} % {plan.units} = {rest}. Make it a "
            f"multiple of {plan.units}."
        )
    check(plan)
    return plan


def typed(text: str, name: str, layout: Layout) -> Type:
    """The type of a value of this dtype and global shape on ``layout``: samples over dp, the
    sequence as the layout cuts it."""
    value = Type.parse(text, name, layout)
    if value.open or any(dim.samples == 0 for dim in value.dims) or not value.dims:
        raise LayoutError(f"{text} has no size for every dim; write it like bf16[8,576,4096]")
    first, axes = value.dims[0], axes_of(layout)
    # One dim of samples and rows: 8*576.
    flat = first.rows > 1 and first.samples > 1
    samples = replace(first, axes=("dp",)) if flat else Dim(first.size, 1, ("dp",))
    sequence = 0 if flat else 1 if len(value.dims) > 1 else None
    value = replace(value, dims=(samples, *value.dims[1:]), batch=0, sequence=sequence)
    if not axes:
        return value
    if sequence is None:
        raise LayoutError(
            f"{text} has {len(value.dims)} dim, {name} ({layout}) cuts dim 1, the sequence, over "
            f"{' and '.join(axes)}. Give it a sequence: bf16[8,576,4096]"
        )
    return value.cut(sequence, text)


def as_json(plan: Plan) -> dict[str, Any]:
    """One edge as plain numbers and texts: per direction the bytes of every rank and the steps."""
    received, bound = plan.received(), plan.bound()
    directions = {}
    for index, (name, steps) in enumerate((("forward", plan.forward), ("backward", plan.backward))):
        directions[name] = {
            "received_bytes": received[index],
            "bound_bytes": bound[index],
            "steps": [_step(step) for step in steps],
        }
    forms = [f for f in (form(side.layout) for side in (plan.src, plan.dst)) if f]
    return {
        "src": plan.src.module,
        "dst": plan.dst.module,
        "kind": plan.kind,
        "ratio": str(plan.ratio),
        "grid": dict(zip(plan.dims, plan.grid, strict=True)),
        "closed_forms": list(plan.where),
        "sequence_forms": forms,
        "reasons": list(plan.reasons),
        **directions,
    }


def _step(step: Step) -> dict[str, Any]:
    return {"kind": step.kind, "groups": [list(group) for group in step.groups], "adds": step.adds}


def _graph(layouts: dict[str, Layout], sink: str, plans: dict[str, Plan]) -> Graph:
    """A graph of inserted edges alone: each encoder's value, and the sink's view of it."""
    graph = Graph(fx.Graph(), "explain", layouts, {name: name for name in layouts}, sink=sink)
    results = []
    for name, plan in plans.items():
        value = plan.value
        assert value is not None and value.batch is not None
        graph.batch_size = value.dims[value.batch].samples
        node = graph.fx.placeholder(re.sub(r"\W", "_", name))
        node.meta = {"path": (name,), "module": name, "types": value, "line": ""}
        target = f"{node.name}_{re.sub(r'\W', '_', sink)}"
        call = graph.fx.create_node("call_module", f"colocc.{target}", (node,), {}, name=target)
        text = f"{value.dtype}[{','.join(_plain(dim) for dim in value.dims)}]"
        types = replace(typed(text, sink, layouts[sink]), stages=plan.dst.stages)
        call.meta = {"module": sink, "types": types, "line": "", "inserted": True}
        graph.plans[call.name] = plan
        results.append(call)
    output = graph.fx.output(tuple(results))
    output.meta = {"module": sink, "types": None, "line": ""}
    return graph


def _plain(dim: Dim) -> str:
    return f"{dim.samples}*{dim.rows}" if dim.samples > 1 and dim.rows > 1 else str(dim.size)

"""The page that a person reads: ASCII, deterministic, about 100 columns; also the tests' golden.

Types stand where a value is made. Inserted lines start with ``+``. Bytes are what the busiest rank
receives for one batch of the example's size; without an example, parts of the batch.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from colocc.layout import closed_form
from colocc.passes.graph import Graph, first_type
from colocc.passes.solve.plan import Plan, Step
from colocc.types import Type

SHOWN_GROUPS = 8
WIDTH = 100
PAGE_WIDTH, CALL_WIDTH = 100, 28
PASSES = ("capture", "propagate", "redistribute", "phases", "specialize")


def page(graph: Graph, after: str = "phases") -> str:
    """The whole page of ``graph``."""
    place = f"{PASSES.index(after) + 1}/{len(PASSES)} " if after in PASSES else ""
    lines = [f"graph {graph.name}    world {graph.world}    after {place}{after}", ""]
    lines += ["layouts", *_layouts(graph), ""]
    if any("phase" in node.meta for node in graph.fx.nodes):
        lines += _phases(graph)
    else:
        lines += _nodes(graph, graph.nodes)
    lines += _guards(graph)
    if graph.plans:
        lines += ["", *_moved(graph)]
    lines += [f"note    {note}" for note in graph.notes]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _layouts(graph: Graph) -> list[str]:
    rows = []
    for name, layout in graph.layouts.items():
        forms = [
            f"{axis} = {closed_form(layout.coordinate(axis))}"
            for axis in ("tp", "cp", "pp", "dp")
            if layout.sizes[axis] > 1
        ]
        path = graph.targets[name]
        rows.append([name, str(layout), "   ".join(forms), "" if path == name else path])
    return _table(rows, indent="  ")


def _phases(graph: Graph) -> list[str]:
    encode = [node for node in graph.nodes if node.meta["phase"] == "encode"]
    language = [node for node in graph.nodes if node.meta["phase"] == "language"]
    names = sorted({node.meta["module"] for node in encode} - {graph.sink})
    lines, number = [], 1
    if encode:
        lines += ["phase 1  encode           all ranks, all samples of the step at once"]
        lines += [*_nodes(graph, encode), ""]
        number = 2
    stages = graph.layouts[graph.sink].pp
    how = f"1f1b over {stages} stages, by microbatch" if stages > 1 else "by microbatch"
    lines += [f"phase {number}  {graph.sink:<16} {how}", *_nodes(graph, language)]
    if encode:
        back = " and ".join(names)
        lines += ["", f"phase 3  encode backward  {back}, all samples at once; then finalise once"]
    return lines


def _nodes(graph: Graph, nodes: list[fx.Node]) -> list[str]:
    """One line a node; the columns are as wide as the page's widest."""
    rows: list[list[str]] = []
    after: dict[int, list[str]] = {}
    for node in nodes:
        if node.op == "output":
            rows.append(["", f"return {_value(node.args[0])}"])
            continue
        types = node.meta.get("types")
        shown = _leaves(types)
        sign = "+ " if node.name in graph.plans else "  "
        rows.append([f"{sign}%{node.name}", *_typed(node, shown), _call(graph, node)])
        if node.name in graph.plans:
            after[len(rows) - 1] = _plan_lines(graph, node)
    full = [row for row in rows if len(row) > 2]
    used = sum(max(len(row[i]) for row in full) + 3 for i in range(4)) if full else 0
    for row in full:
        row[4] = _short(row[4], max(CALL_WIDTH, PAGE_WIDTH - used))
    text = _table(rows, indent="")
    lines = []
    for index, line in enumerate(text):
        line = "  " + line.strip() if not rows[index][0] else line
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 3] + "...")
        lines += after.get(index, [])
    return lines


def _leaves(types: Any) -> list[Type]:
    return [leaf for leaf in pytree.tree_leaves(types) if isinstance(leaf, Type)]


def _typed(node: fx.Node, shown: list[Type]) -> list[str]:
    module = str(node.meta.get("module") or "")
    if not shown:
        return ["", module, ""]
    more = f" +{len(shown) - 1}" if len(shown) > 1 else ""
    held = {"first": " pp0", "last": " last pp"}.get(str(node.meta.get("stage", "")), "")
    if shown[0].stages is not None:
        held = " pp" + ",".join(map(str, shown[0].stages))
    return [str(shown[0]) + more, module + held, shown[0].local()]


def _call(graph: Graph, node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"input({'.'.join(node.meta['path'])})"
    arguments = [_value(arg) for arg in node.args]
    arguments += [f"{k}={_value(v)}" for k, v in node.kwargs.items() if v is not None]
    name = str(getattr(node.target, "__name__", node.target))
    if node.name in graph.plans:
        name = "redistribute"
    elif node.op == "call_module":
        name = graph.module_of(node) or name
    return f"{name}({', '.join(arguments)})"


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_value(item) for item in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _plan_lines(graph: Graph, node: fx.Node) -> list[str]:
    plan = graph.plans[node.name]
    source = first_type(node.all_input_nodes[0].meta["types"])
    kind = plan.kind if plan.kind == "equal" else f"{plan.kind} x{plan.ratio}"
    ends = f"{plan.src.module} {plan.src.layout} -> {plan.dst.module} {plan.dst.layout}"
    lines = [f"+   {kind}   {ends}   where {plan.where}"]
    rows: list[list[str]] = []
    got = plan.received()
    for title, steps, received in (("fwd", plan.forward, got[0]), ("bwd", plan.backward, got[1])):
        if not steps:
            rows.append([title, "as it is", "0 B", "local"])
        for step in steps:
            moved = max(received) if step.groups else 0
            rows.append(
                [title, _step(step, title, plan), _bytes(moved, plan, source), _groups(step)]
            )
        above = sum(received) - sum(plan.bound()[title == "bwd"])
        if above:
            rows.append([title, f"above the bound by {above} of {plan.units} units", "", ""])
    if plan.scale != 1:
        reductions = {
            n: graph.reductions.get(n, "mean") for n in (plan.src.module, plan.dst.module)
        }
        why = ", ".join(f"{n} {how}" for n, how in reductions.items())
        rows.append(["bwd", f"scale x{plan.scale}", "", f"{why} over dp"])
    lines += _table(rows, indent="+   ")
    line = str(node.meta.get("line", ""))
    return [*lines, f"+   at    {_short(line, PAGE_WIDTH - 10)}"] if line else lines


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _step(step: Step, title: str, plan: Plan) -> str:
    dim = "dim=0"
    if step.kind == "all_to_all" and plan.dst.stages is not None:
        dim += ", to pp0" if title == "fwd" else ", from pp0"
    return f"{step.kind}({dim})"


def _groups(step: Step) -> str:
    if not step.groups:
        return "local"
    shown = [f"[{','.join(map(str, group))}]" for group in step.groups[:SHOWN_GROUPS]]
    more = len(step.groups) - SHOWN_GROUPS
    return " ".join(shown) + (f" and {more} more" if more > 0 else "")


def _bytes(units: int, plan: Plan, source: Type | None) -> str:
    per_sample = source.bytes_per_sample() if source is not None else None
    if units == 0:
        return "0 B"
    if per_sample is None or source is None or source.batch is None:
        return f"{Fraction(units, plan.units)} batch"
    total = per_sample * source.dims[source.batch].samples
    return human(Fraction(total * units, plan.units))


def human(count: Fraction | int) -> str:
    """``count`` bytes, with two decimals and a binary unit."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{int(size)} B" if unit == "B" else f"{size:.2f} {unit}"


def _moved(graph: Graph) -> list[str]:
    totals: list[Fraction] = [Fraction(0), Fraction(0)]
    known, collectives = True, 0
    for name, plan in graph.plans.items():
        node = next(n for n in graph.fx.nodes if n.name == name)
        source = first_type(node.all_input_nodes[0].meta["types"])
        per_sample = source.bytes_per_sample() if source is not None else None
        collectives += sum(bool(step.groups) for step in plan.forward + plan.backward)
        if per_sample is None or source is None or source.batch is None:
            known = False
            continue
        unit = Fraction(per_sample * source.dims[source.batch].samples, plan.units)
        for index, received in enumerate(plan.received()):
            totals[index] += unit * max(received)
    size = f"for a batch of {graph.batch_size}" if graph.batch_size else ""
    count = f"{collectives} collective{'s' * (collectives != 1)} per step"
    if not known:
        return [f"moved   {count}"]
    fwd, bwd = (human(total) for total in totals)
    return [f"moved   fwd {fwd}, bwd {bwd} per receiving rank {size}, {count}"]


def _guards(graph: Graph) -> list[str]:
    """What the graph takes for granted of every batch, with the user's lines."""
    rows = [] if graph.guards is None else [list(line) for line in graph.guards.lines()]
    width = max((len(text) for text, _ in rows), default=0)
    lines = [_short(f"guard   {text.ljust(width)}   {line}", PAGE_WIDTH) for text, line in rows]
    return ["", *lines] if lines else []


def _table(rows: list[list[str]], indent: str) -> list[str]:
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))] if full else []
    lines = []
    for row in rows:
        if len(row) <= 2:
            lines.append(indent + " ".join(row))
            continue
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + "   ".join(cells)).rstrip())
    return lines


def excerpt(graph: Graph, node: fx.Node, around: int = 4) -> str:
    """The lines of the graph around ``node``, which is marked ``<-- here``."""
    nodes = graph.nodes
    place = nodes.index(node)
    lines = []
    for other in nodes[max(0, place - around) : place + around + 1]:
        shown = _leaves(other.meta.get("types"))
        typed = " ".join(part for part in _typed(other, shown) if part)
        body = (
            f"return {_value(other.args[0])}"
            if other.op == "output"
            else (f"%{other.name}  {typed}  {_call(graph, other)}")
        )
        lines.append(f"  {'> ' if other is node else '  '}{body}{'   <-- here' * (other is node)}")
    return "\n".join(lines) + "\n"


def ranks(graph: Graph, name: str) -> str:
    """Which units of the step each rank holds before and after the redistribution ``name``."""
    plan = graph.plans[name]
    rows = [["rank", *map(str, range(graph.world))]]
    for holding in (plan.src, plan.dst):
        cells = [",".join(f"{a}:{b}" for a, b in units) or "-" for units in holding.units()]
        rows.append([holding.module, *cells])
    title = f"%{name}  {plan.kind}  parts of {plan.units} of the step's samples held by each rank"
    return "\n".join([title, *_table(rows, indent="")]) + "\n"


def dot(graph: Graph) -> str:
    """The graph in graphviz's language: a cluster per layout, redistributions coloured."""
    lines = [f"digraph {graph.name} {{", "  rankdir=LR; node [shape=box, style=rounded];"]
    for index, (name, layout) in enumerate(graph.layouts.items()):
        members = "; ".join(
            n.name
            for n in graph.fx.nodes
            if n.meta["module"] == name and n.name not in graph.plans and n.op != "output"
        )
        lines.append(f'  subgraph cluster_{index} {{ label="{name}   {layout}"; {members}; }}')
    for node in graph.fx.nodes:
        if node.name in graph.plans:
            plan = graph.plans[node.name]
            label = f"{plan.kind}\\n{plan.where}"
            lines.append(f'  {node.name} [style=filled, fillcolor="#ffd9a0", label="{label}"];')
        for source in node.all_input_nodes if node.op != "output" else []:
            lines.append(
                f'  {source.name} -> {node.name} [label="{first_type(source.meta["types"])}"];'
            )
    return "\n".join([*lines, "}"]) + "\n"

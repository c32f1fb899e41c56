"""The page that a person reads: ASCII, deterministic, about 100 columns; also the tests' golden.

Types stand where a value is made. Inserted lines start with ``+``. Bytes are what the busiest rank
receives for one batch of the example's size; without an example, parts of the batch.
"""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from colocc.passes.graph import Graph, first_type
from colocc.passes.solve.plan import Plan, Step, received
from colocc.ranks import closed_form
from colocc.types import Type

SHOWN_GROUPS = 8
WIDTH = 100
PAGE_WIDTH, CALL_WIDTH = 100, 28
PASSES = ("capture", "propagate", "merge", "redistribute", "phases", "specialize")


def page(graph: Graph, after: str = "phases", schedule: str = "three_phase") -> str:
    """The whole page of ``graph``, whose phases ``schedule`` orders."""
    place = f"{PASSES.index(after) + 1}/{len(PASSES)} " if after in PASSES else ""
    lines = [f"graph {graph.name}    world {graph.world}    after {place}{after}", ""]
    lines += ["layouts", *_layouts(graph), ""]
    if any("phase" in node.meta for node in graph.fx.nodes):
        lines += _phases(graph, schedule)
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


def _phases(graph: Graph, schedule: str) -> list[str]:
    forward, backward = _when(schedule)
    encode = [node for node in graph.nodes if node.meta["phase"] == "encode"]
    language = [node for node in graph.nodes if node.meta["phase"] == "language"]
    names = sorted({node.meta["module"] for node in encode} - {graph.sink})
    lines, number = [], 1
    if encode:
        lines += [f"phase 1  encode           all ranks, {forward}"]
        lines += [*_nodes(graph, encode), ""]
        number = 2
    stages = graph.layouts[graph.sink].pp
    how = f"1f1b over {stages} stages, by microbatch" if stages > 1 else "by microbatch"
    lines += [f"phase {number}  {graph.sink:<16} {how}", *_nodes(graph, language)]
    if encode:
        back = " and ".join(names)
        lines += ["", f"phase 3  encode backward  {back}, {backward}; then finalise once"]
    return lines


def _when(schedule: str) -> tuple[str, str]:
    """What encoders take at a time under ``schedule``, forward and backward."""
    kind, _, number = schedule.partition("=")
    if kind == "filled":
        return (
            "portions in the bubbles of phase 2, each sent when made",
            "portions in these bubbles",
        )
    if kind == "lookahead":
        some = "one microbatch" if number == "1" else f"{number} microbatches"
        return f"{some} at a time, then phases 2 and 3 of these", f"{some} at a time"
    return "all samples of the step at once", "all samples at once"


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
        sign = "+ " if node.name in graph.plans or node.meta.get("added") else "  "
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
    ends = f"{plan.src.module} {plan.src.layout} -> {plan.dst.module} {plan.dst.layout}"
    first = f"+   {_kind(plan)}   {ends}"
    relations = [f"where {relation}" for relation in plan.where]
    fits = len(first) + 3 + len(relations[0]) <= PAGE_WIDTH
    lines = [f"{first}   {relations[0]}"] if fits else [first, f"+   {relations[0]}"]
    lines += [f"+   {relation}" for relation in relations[1:]]
    rows = _step_rows(plan, source)
    if plan.scale != 1:
        reductions = {
            n: graph.reductions.get(n, "mean") for n in (plan.src.module, plan.dst.module)
        }
        why = ", ".join(f"{n} {how}" for n, how in reductions.items())
        axes = "dp and cp" if max(plan.src.layout.cp, plan.dst.layout.cp) > 1 else "dp"
        rows.append(["bwd", f"scale x{plan.scale}", "", f"{why} over {axes}"])
    lines += _table(rows, indent="+   ")
    lines += [f"+   {_short(line, PAGE_WIDTH - 4)}" for line in _reasons(plan)]
    line = str(node.meta.get("line", ""))
    return [*lines, f"+   at    {_short(line, PAGE_WIDTH - 10)}"] if line else lines


def _kind(plan: Plan) -> str:
    """``equal``, ``fan_in x2``, or ``fan_in 3:2`` where neither dp divides the other."""
    if plan.kind == "equal":
        return "equal"
    above, below = plan.ratio.numerator, plan.ratio.denominator
    return f"{plan.kind} " + (f"x{above}" if below == 1 else f"{above}:{below}")


def _step_rows(plan: Plan, source: Type | None) -> list[list[str]]:
    """A row for each step: direction, what is done, bytes of the busiest rank, groups."""
    rows: list[list[str]] = []
    directions = (("fwd", plan.forward, plan.src), ("bwd", plan.backward, plan.dst))
    for title, steps, start in directions:
        if not steps:
            rows.append([title, "as it is", "0 B", "local"])
        before = received((), start)
        for index, step in enumerate(steps):
            after = received(steps[: index + 1], start)
            moved = int((after - before).max())
            rows.append(
                [title, _step(step, title, plan, source), _bytes(moved, plan), _groups(step)]
            )
            before = after
    return rows


def _reasons(plan: Plan) -> list[str]:
    """Why a direction takes more than one collective, or more than its bound, and how much more."""
    lines = []
    for title, above in zip(("fwd", "bwd"), _above(plan), strict=True):
        why = "; ".join(r.removeprefix(f"{title} ") for r in plan.reasons if r.startswith(title))
        if above:
            lines.append(f"{title}   above the bound by {_bytes(above, plan)}, because {why}")
        elif why:
            lines.append(f"{title}   at the bound; {why}")
    return lines


def _above(plan: Plan) -> tuple[int, int]:
    """By how many cells the rank that is worst off is above its bound, forward and backward."""
    pairs = zip(plan.received_cells(), plan.bound_cells(), strict=True)
    forward, backward = (int((got - bound).max()) for got, bound in pairs)
    return forward, backward


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _step(step: Step, title: str, plan: Plan, source: Type | None) -> str:
    batch = source.batch if source is not None and source.batch is not None else 0
    places = {
        "sample": batch,
        "sequence": source.sequence if source is not None else 1,
        "slice": -1,
    }
    dims = [str(places[dim]) for dim in plan.dims if places.get(dim) is not None]
    text = f"dim{'s' * (len(dims) > 1)}={','.join(dict.fromkeys(dims))}"
    if step.kind in ("all_to_all", "send_recv") and plan.dst.stages is not None:
        text += ", to pp0" if title == "fwd" else ", from pp0"
    if step.kind == "all_reduce" or step.adds:
        text += ", sum"
    return f"{step.kind}({text})"


def _groups(step: Step) -> str:
    if not step.groups:
        return "local"
    shown = [f"[{','.join(map(str, group))}]" for group in step.groups[:SHOWN_GROUPS]]
    more = len(step.groups) - SHOWN_GROUPS
    return " ".join(shown) + (f" and {more} more" if more > 0 else "")


def _bytes(cells: int, plan: Plan) -> str:
    size = plan.cell_bytes()
    if cells == 0:
        return "0 B"
    return f"{Fraction(cells, prod(plan.grid))} batch" if size is None else human(size * cells)


def human(count: Fraction | int) -> str:
    """``count`` bytes, with two decimals and a binary unit."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{int(size)} B" if unit == "B" else f"{size:.2f} {unit}"


def _moved(graph: Graph) -> list[str]:
    plans = list(graph.plans.values())
    collectives = sum(bool(step.groups) for p in plans for step in p.forward + p.backward)
    count = f"{collectives} collective{'s' * (collectives != 1)} per step"
    totals, bounds = [Fraction(0), Fraction(0)], [Fraction(0), Fraction(0)]
    for plan in plans:
        size = plan.cell_bytes()
        if size is None:
            return [f"moved   {count}"]
        for index in range(2):
            totals[index] += size * int(plan.received_cells()[index].max())
            bounds[index] += size * int(plan.bound_cells()[index].max())
    batch = f"for a batch of {graph.batch_size}" if graph.batch_size else ""
    moved, bound = (f"fwd {human(fwd)}, bwd {human(bwd)}" for fwd, bwd in (totals, bounds))
    return [f"moved   {moved} per receiving rank {batch}, {count}", f"bound   {bound}"]


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
    """Which cells of the step each rank holds before and after the redistribution ``name``: units
    of samples, and chunks of the other dims that the plan cuts."""
    plan = graph.plans[name]
    rows = [["rank", *map(str, range(graph.world))]]
    for holding in (plan.src, plan.dst):
        boxes = holding.boxes()
        for place, dim in enumerate(plan.dims):
            if place and plan.grid[place] == 1:
                continue
            cells = [",".join(f"{a}:{b}" for a, b in box[place]) if box else "-" for box in boxes]
            rows.append([holding.module + f" {dim}" * (place > 0), *cells])
    title = f"%{name}  {plan.kind}  parts of {plan.units} of the step's samples held by each rank"
    cut = zip(plan.dims[1:], plan.grid[1:], strict=True)
    more = [f"{n} of the {dim}" for dim, n in cut if n > 1]
    return "\n".join([", ".join([title, *more]), *_table(rows, indent="")]) + "\n"


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
            label = "\\n".join([plan.kind, *plan.where])
            lines.append(f'  {node.name} [style=filled, fillcolor="#ffd9a0", label="{label}"];')
        for source in node.all_input_nodes if node.op != "output" else []:
            lines.append(
                f'  {source.name} -> {node.name} [label="{first_type(source.meta["types"])}"];'
            )
    return "\n".join([*lines, "}"]) + "\n"

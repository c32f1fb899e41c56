"""The graph that the passes hand on: an fx.Graph, the modules of the user's layouts, and the plans.

What a pass knows of a node stands in ``node.meta`` under one of these keys:

path      of a placeholder: where its value stands in the batch, ("modality_inputs", "images")
line      the user's source line that made the node, "mimo.py:31 self.vision(...)"
no_grad   True of what the forward computes under torch.no_grad
shapes    (dtype, dims, batch dim) of each tensor that it makes; None where nothing is known
learns    True of a value that has a gradient                       (of recorded graphs)
module    the name in ``layouts`` on whose layout the node runs            (from propagate on)
types     the types of its tensors, a pytree shaped like its value         (from propagate on)
items     of a value whose dim holds items, not samples: the module that Items names
                                                                     (of recorded graphs)
phase     "encode" or "language"                                          (from phases on)
stage     "first", "last" or "all": the pipeline stages that run the node  (from phases on)
rows      of a value made of rows, samples having different numbers of them:
          the plan whose reader holds them as the node does        (from redistribute on)
entries   of such a value that is made of items: what an entry of its dim 0 is
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.fx

from colocc.errors import CaptureError
from colocc.layout import Layout
from colocc.passes.solve.plan import Plan
from colocc.types import Type

if TYPE_CHECKING:
    import sympy

    from colocc.passes.guards import Guards

COMPUTING = ("call_function", "call_method", "call_module")
"""The ops of nodes that compute."""

Reduction = Literal["mean", "sum"]


class Method:
    """A method of the model as the target of a node; the executor binds it to the model."""

    def __init__(self, name: str, stage: str) -> None:
        self.name = self.__name__ = name
        self.stage = stage

    def __repr__(self) -> str:
        return f"model.{self.name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(f"{self!r} is bound to a model by the program that runs the graph")


@dataclass(frozen=True)
class Glue:
    """A method of the model that is one opaque call: it looks at values, so it is not traced.

    Its value is called ``label``. It runs on the layout of ``module``. ``returns`` gives its
    results from its arguments by name, with (dtype, shape) for a tensor; None where that cannot be
    known. ``stage`` is "first" for a method that only the first pipeline stage can run, "all" for
    one that every stage must.
    """

    method: str
    label: str
    module: str
    returns: Callable[[Mapping[str, Any], Layout], Any] | None = None
    stage: Literal["first", "all"] = "first"


@dataclass(frozen=True, eq=False)
class Places:
    """Which inputs hold the items of a module that makes rows, and where these rows belong.

    ``inputs`` is the path of a mapping in the batch (() is the batch itself), ``names`` are those
    of its parts that hold items, None: all. ``items`` is what ``compile(rows=)`` calls the module.
    The places are where ``input_ids`` is ``token``, or where ``mask``, made of inputs, is true.
    ``each`` is how many rows an item makes, as far as sizes tell it; ``stated`` where the user's
    function does. ``template`` is one item of the example.
    """

    items: str
    inputs: tuple[str, ...]
    names: tuple[str, ...] | None = None
    token: int | None = None
    mask: torch.fx.Node | None = None
    each: sympy.Expr | None = None
    stated: bool = False
    template: Any = None

    def given(self, batch: Mapping[str, Any]) -> Any:
        """The inputs that hold the items of ``batch``; None where there are none."""
        found: Any = batch
        for key in self.inputs:
            found = found.get(key) if isinstance(found, Mapping) else None
        if self.names is None:
            return found
        return {name: found[name] for name in self.names if found.get(name) is not None} or None

    @property
    def read(self) -> set[tuple[str, ...]]:
        """The inputs that tell the places: every rank has them whole."""
        if self.mask is None:
            return {("input_ids",)}
        return {node.meta["path"] for node in made_from(self.mask) if node.op == "placeholder"}


def token_places(tokens: Mapping[str, int]) -> dict[str, Places]:
    """The places of modules of a MimoModel, by name, from their placeholders in ``input_ids``."""
    return {n: Places(n, ("modality_inputs", n), token=token) for n, token in tokens.items()}


@dataclass(frozen=True)
class Entries:
    """What an entry of a value made of items is: ``size`` of them are one item's, or, with
    ``by_row``, one row's."""

    size: sympy.Expr
    by_row: bool


def made_from(node: torch.fx.Node) -> set[torch.fx.Node]:
    """``node`` and all nodes that its value is made from."""
    found, todo = set[torch.fx.Node](), [node]
    while todo:
        if (last := todo.pop()) not in found:
            found.add(last)
            todo += last.all_input_nodes
    return found


@dataclass(frozen=True)
class Merging:
    """The methods that embed the text, merge rows into it, and cut the result's sequence."""

    text: str
    merged: str
    sharded: str


@dataclass(frozen=True)
class Traits:
    """What is known beforehand of a kind of model; the empty one knows nothing.

    ``targets`` maps names of layouts to submodule paths. ``inputs`` are the forward arguments that
    are captured as inputs although they have a default; an argument of ``nested`` holds one value
    per module name. ``outputs`` gives the type of a module's output from the types of its
    arguments.
    ``disabled`` are attributes of the model that are empty while it is traced.
    ``rows`` gives, of modules whose output is rows that belong to placeholders in the sequence, the
    placeholder's id. ``merging`` names the glue that puts them there. ``handed`` are inputs that
    modules get although the forward gives them None; ``packing`` is the input with the borders of
    packed sequences.
    """

    targets: Mapping[str, str] = field(default_factory=dict)
    glue: tuple[Glue, ...] = ()
    inputs: tuple[str, ...] = ()
    nested: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: Mapping[str, Callable[[Mapping[str, Any], Layout], Any]] = field(default_factory=dict)
    disabled: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    merging: Merging | None = None
    handed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packing: str = ""

    @property
    def rare(self) -> frozenset[str]:
        """Inputs that an example has if batches have them."""
        names = {name for names in self.handed.values() for name in names}
        return frozenset(names | {self.packing} - {""})


@dataclass
class Graph:
    """An fx.Graph with the modules, layouts and plans that its nodes speak of.

    ``targets`` maps the names in ``layouts`` to submodule paths; ``sink`` is the name of the module
    that every other one feeds (the language model). ``plans`` are by node name.
    ``reductions`` says how each module's gradients are reduced over its dp axis. ``sequence_dims``
    are the dims of modules' outputs and of inputs that hold the sequence. ``rows`` says of modules
    that make rows where these belong; ``items`` what holds the items that a recorded model makes
    them of, by the name that the user gives. ``guards`` is what the graph of an example takes for
    granted. ``homes`` are the modules that run as part of the sink. ``masks`` are inputs that all
    samples may share, with 1 in their batch dim; ``packing`` is the input with the borders of
    packed sequences.
    """

    fx: torch.fx.Graph
    name: str
    layouts: dict[str, Layout]
    targets: dict[str, str]
    sink: str = ""
    reductions: dict[str, Reduction] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    batch_size: int | None = None
    sequence_dims: dict[str, int] = field(default_factory=dict)
    rows: dict[str, Places] = field(default_factory=dict)
    items: dict[str, Places] = field(default_factory=dict)
    guards: Guards | None = None
    homes: dict[str, str] = field(default_factory=dict)
    masks: frozenset[str] = frozenset()
    packing: str = ""

    @property
    def world(self) -> int:
        return next(iter(self.layouts.values())).size

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return list(self.fx.nodes)

    def module_of(self, node: torch.fx.Node) -> str | None:
        """The name in ``layouts`` that a call_module node calls, None for any other node."""
        if node.op != "call_module":
            return None
        return next((n for n, path in self.targets.items() if path == node.target), None)

    def owner_of(self, node: torch.fx.Node) -> str | None:
        """The name in ``layouts`` of the module that a node calls or reads, whole or a part of."""
        if node.op not in ("call_module", "get_attr"):
            return None
        target = f"{node.target}."
        found = (name for name, path in self.targets.items() if target.startswith(path + "."))
        return next(found, None)

    def home(self, name: str) -> str:
        """Where the nodes of the module ``name`` run: on its own layout, or the sink's."""
        return self.homes.get(name, name)

    def plan_of(self, node: torch.fx.Node) -> Plan | None:
        return self.plans.get(node.name) if node.op == "call_module" else None

    def scale(self, src: str, dst: str, *, whole: bool = True) -> Fraction:
        """What the gradient from ``dst`` to ``src`` must be multiplied by.

        The gradient of the reader is summed over its dp and cp ranks and, for a mean, divided by
        their number; the source's likewise over its own. For one gradient of one loss the source's
        divisor must become the reader's: (divisor of src) / (divisor of dst). ``whole``: each cp
        rank of the source makes the whole sequence, so that its gradient counts cp times.
        """
        divisor = {
            name: layout.dp * layout.cp if self.reductions.get(name, "mean") == "mean" else 1
            for name, layout in self.layouts.items()
        }
        alike = self.layouts[src].cp if whole else 1
        return Fraction(divisor[src], divisor[dst] * alike)

    def placeholders(self) -> list[torch.fx.Node]:
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    def output(self) -> torch.fx.Node:
        return self.fx.output_node()


def first_type(types: Any) -> Type | None:
    """The first tensor type in a pytree of types, None where there is none."""
    if isinstance(types, Type):
        return types
    if isinstance(types, Mapping):
        types = list(types.values())
    if isinstance(types, (list, tuple)):
        return next((found for item in types if (found := first_type(item))), None)
    return None


def depends(graph: Graph) -> dict[torch.fx.Node, set[torch.fx.Node]]:
    """For every node, all nodes that its value is made from."""
    made_from: dict[torch.fx.Node, set[torch.fx.Node]] = {}
    for node in graph.fx.nodes:
        made_from[node] = set()
        for source in node.all_input_nodes:
            made_from[node] |= {source} | made_from[source]
    return made_from

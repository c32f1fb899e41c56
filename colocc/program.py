"""What compile() returns: the graph of this rank, bound to its model and its process groups."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from colocc.errors import LayoutError
from colocc.modules import Modules, check_way_back
from colocc.passes.capture import Method
from colocc.passes.dump import dot, page, ranks
from colocc.passes.graph import Graph, first_type
from colocc.passes.merge import Merge
from colocc.passes.phases import cut
from colocc.passes.rows import BatchDims, RowsPerItem
from colocc.passes.solve.plan import Plan
from colocc.runtime import megatron
from colocc.runtime.agreement import Check
from colocc.runtime.bubbles import Bubbles
from colocc.runtime.captured import Captured
from colocc.runtime.crossing import Crossing
from colocc.runtime.cuda_graphs import CapturedModule
from colocc.runtime.data import Batches
from colocc.runtime.execute import Executor
from colocc.runtime.groups import (
    ProcessGroups,
    close_groups,
    open_groups,
    process_groups,
)
from colocc.runtime.intake import Intake, take
from colocc.runtime.redistribution import Redistribution, tensor_dims
from colocc.runtime.row_moves import RowRedistribution
from colocc.runtime.samples import RowCounts, imbalances, step_samples
from colocc.runtime.schedule import Schedule, run_step
from colocc.runtime.trace import Traced


class Program(Modules, Traced):
    """A compiled model. ``print(program)`` is its page; ``program(**batch)`` its forward at pp = 1.

    A batch is a dict of the forward's arguments, global and the same on every rank: the program
    cuts out what this rank reads. ``samples`` says which samples that is; compiled with
    ``batches="local"``, a rank gives these alone (runtime/parts.py).
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        mine: Graph | None,
        groups: ProcessGroups | None,
        batch_dims: BatchDims,
        timeout: timedelta,
        schedule: Schedule,
        *,
        rows: Mapping[str, RowsPerItem] | None = None,
        check: Check = "every",
        balance: bool = False,
        local: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        # By the node that calls the module.
        self.captured = Captured()
        self._cuda_graphs = cuda_graphs
        self.balance, self._local = balance and schedule.kind != "filled", local
        super().__init__(model, graph, groups)
        self.batch_dims = batch_dims
        self.schedule = schedule
        self.rank = dist.get_rank() if dist.is_initialized() else None
        self._owns_groups = False
        self._quiet = megatron.QuietGlue(model) if megatron.is_mimo(model) else None
        self._destroyed = False
        self._intake: Intake | None = None
        self.cut: list[fx.Node] = []
        self.redistributions: dict[str, Redistribution | RowRedistribution] = {}
        self.bubbles: Bubbles | None = None
        self._calls: dict[str, Callable[..., Any]] = {}
        self._members: tuple[tuple[int, ...], ...] = ()
        self._world: weakref.ref[dist.ProcessGroup] | None = None
        if self.rank is not None and mine is not None:
            self._intake = Intake(
                graph,
                mine,
                self.rank,
                batch_dims,
                megatron.optional_inputs(model),
                rows_per_item=dict(rows or {}),
                check=check,
                timeout=timeout,
                balance=self.balance,
                local=local,
            )
            self._bind(self.rank, mine, timeout)

    def _bind(self, rank: int, mine: Graph, timeout: timedelta) -> None:
        """Open the groups of the plans, in one order on all ranks, and bind this rank's graph."""
        if self.groups is None and megatron.is_mimo(self.model):
            self.groups, self._owns_groups = (
                process_groups(self.graph.layouts, timeout=timeout),
                True,
            )
        if megatron.is_mimo(self.model):
            megatron.cut_angles(self.model, self.collection(self.graph.sink))
        plans = self.graph.plans
        self._members = tuple(
            dict.fromkeys(group for plan in plans.values() for group in plan.member_lists())
        )
        assert dist.group.WORLD is not None
        self._world = weakref.ref(dist.group.WORLD)
        opened = open_groups(self._members, timeout=timeout)
        self.mine = mine
        moves = self.redistributions
        for node in mine.fx.nodes:
            if node.name in plans:
                moves[node.name] = self._bound(plans[node.name], node, opened, rank)
            elif isinstance(node.target, Merge):
                self._calls[node.name] = megatron.MergeInPart(
                    self.model, mine.layouts[mine.sink], rank
                )
            elif self._cuda_graphs and (name := mine.module_of(node)) not in (None, mine.sink):
                module = CapturedModule(name, mine.layouts[name], partial(self._module, node))
                self.captured[node.name] = self._calls[node.name] = module
        self._calls |= {n: move for n, move in moves.items() if isinstance(move, RowRedistribution)}
        self.cut = cut(mine)
        self.crossing = Crossing(self.cut, moves, rank, partial(megatron.no_rows, self.model))
        self._output = mine.output()
        methods = self._quiet.methods() if self._quiet is not None else None
        self._encode, self._language = (
            Executor(
                mine,
                phase,
                self.model,
                moves,
                results,
                calls=self._calls,
                methods=methods,
                noted=lambda kind: self.noted(kind),
                settle=settle,
            )
            for phase, results, settle in (
                ("encode", self.cut, self._settle_rows),
                ("language", self._output.all_input_nodes, None),
            )
        )
        if self.schedule.kind == "filled":
            self.bubbles = Bubbles(self, timeout, self.schedule.portions, self.schedule.window)

    def _bound(
        self,
        plan: Plan,
        node: fx.Node,
        groups: Mapping[tuple[int, ...], dist.ProcessGroup],
        rank: int,
    ) -> Redistribution | RowRedistribution:
        if "rows" in node.meta:
            empty = partial(self._no_rows, plan.src.module)
            return RowRedistribution(plan, groups, rank, name=node.name, empty=empty)
        dims = tensor_dims(plan, first_type(node.meta["types"]))
        return Redistribution(plan, groups, rank, name=node.name, dims=dims)

    def _module(self, node: fx.Node) -> nn.Module:
        """The module that ``node`` calls, as it is wrapped now."""
        return self.model.get_submodule(str(node.target))

    def _no_rows(self, module: str) -> torch.Tensor:
        """Instead of the output of an encoder that has seen no item: its backward runs the
        collectives of ranks whose encoder has, with local parts."""
        learns = self._local and torch.is_grad_enabled() and module in self.trainable()
        return megatron.no_rows(self.model).requires_grad_(learns)

    def __str__(self) -> str:
        return page(self.graph, schedule=str(self.schedule))

    def ranks(self, name: str) -> str:
        """Which part of the samples each rank holds before and after the redistribution
        ``name``."""
        return ranks(self.graph, name)

    def dot(self) -> str:
        """The graph in graphviz's language."""
        return dot(self.graph)

    def samples(
        self,
        *,
        num_microbatches: int,
        batch_size: int,
        rank: int | None = None,
        rows: RowCounts | None = None,
    ) -> dict[str, list[tuple[int, int]]]:
        """For each module, the (microbatch, sample) pairs that ``rank`` reads, in order.

        ``batch_size`` is the samples of one global microbatch. What an encoder reads depends on
        the schedule: it cuts the microbatches that are encoded at once. ``rows`` gives, of modules
        that encode items, the placeholders of each sample of each microbatch: with ``balance`` the
        samples are dealt to slots by them, and it must be given.
        """
        who = self.rank if rank is None else rank
        if who is None:
            raise LayoutError("samples() needs a rank where torch.distributed is not initialised")
        if self.bubbles is not None:
            raise LayoutError(
                "schedule 'filled' chooses who encodes what by the sizes of a step's batches: load "
                "all samples on every rank, or write schedule='three_phase'"
            )
        chunks = self.schedule.chunks(num_microbatches)
        counts = (rows or {}) if self.balance else None
        return step_samples(self.graph, chunks, batch_size, who, counts)

    def imbalance(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
        """For each encoder of items, the most rows of a slot over the mean in a step of these
        microbatches: with the samples in order, and as ``balance`` deals them."""
        intake = self._ready()
        before, given = intake.learned.copy(), list(batches)
        try:
            return imbalances(self.graph, intake.chunks(self.schedule, given))
        finally:
            intake.learned = before

    def encode(self, batches: Batches) -> list[Any]:
        """The values that cross to the language phase, for the samples of all of ``batches``."""
        nodes = [node for node in self.mine.placeholders() if node.meta["phase"] == "encode"]
        try:
            values = {node: batches.encoder_input(node) for node in nodes}
        except Exception as error:
            # Where its peers say what they made.
            self.settle(error)
            raise
        self.crossing.expect(batches)
        count = len(batches.microbatches)
        found = self._encode(
            values, samples=count * batches.size, sizes=batches.sizes[0] if count == 1 else None
        )
        return self.crossing.kept(found)

    def _settle_rows(self, values: Mapping[fx.Node, Any], error: Exception | None) -> None:
        """Raise on every rank alike what went wrong on any of them as it encoded: an ``error``,
        another number of rows than its samples have placeholders, or rows unlike those of others.
        """
        made = ""
        try:
            if error is None:
                self.crossing.check(values)
                # With local parts, an encoder without an item may have made nothing.
                made = "" if self._local else self.crossing.outline(values)
        except Exception as problem:  # noqa: BLE001 - raised on every rank
            error = problem
        self.settle(error, made)

    def unseen(self) -> list[str]:
        """The modules that a rank may never have called, as it has had none of their items."""
        return list(self.graph.rows) if self._local else []

    def settle(self, error: Exception | None, made: str = "") -> None:
        """Raise an ``error`` that any rank had when it encoded on every rank, or that they have not
        ``made`` the same; collective."""
        assert self._intake is not None
        self._intake.settle(error, made)

    def on_any_rank(self, question: bool) -> bool:
        """Whether any rank says yes; collective."""
        assert self._intake is not None
        return self._intake.agreement.any(question)

    def check_learns(self, crossing: list[Any], trainable: Mapping[str, nn.Module]) -> None:
        """Raise LayoutError, where gradients are on, for a value of a ``trainable`` module that has
        lost its way back to its parameters."""
        if not torch.is_grad_enabled():
            return
        assert self._intake is not None
        for node, value in zip(self.cut, crossing, strict=True):
            source = node.all_input_nodes[0] if node.name in self.redistributions else node
            name = source.meta["module"]
            # Without an item in any step so far, no rank has called it.
            called = name not in self.graph.rows or name in self._intake.learned.templates
            if called and name in trainable:
                check_way_back(name, source.name, value)

    def look_ahead(self, batches: Batches) -> None:
        """Learn what the language phase of ``batches`` must know of its values."""
        ids = [n for n in self.mine.placeholders() if n.meta["path"] == ("input_ids",)]
        if self._quiet is not None and ids and self._looks(ids[0]):
            every = range(len(batches.microbatches))
            mine = [batches.sink_input(ids[0], index) for index in every]
            self._quiet.know(batches.placeholders(), mine)

    @staticmethod
    def _looks(node: fx.Node) -> bool:
        return any(isinstance(user.target, Method) for user in node.users)

    def language(self, batches: Batches, microbatch: int, crossing: list[Any]) -> Any:
        """One microbatch through this rank's part of the language phase; what the forward
        returns."""
        values = {
            node: batches.sink_input(node, microbatch)
            for node in self.mine.placeholders()
            if node.meta["phase"] == "language"
        }
        values |= dict(zip(self.cut, crossing, strict=True))
        if self._quiet is not None:
            self._quiet.turn_to(microbatch)
        results = dict(zip(self._output.all_input_nodes, self._language(values), strict=True))
        return fx.node.map_arg(self._output.args[0], results.__getitem__)

    def __call__(self, **batch: Any) -> Any:
        """Return what the model's forward returns for this rank's replica of ``batch``.

        Raises: LayoutError if the language module is pipelined, or the batch lacks or adds an
        input.
        """
        layout = self.graph.layouts[self.graph.sink]
        if layout.pp > 1:
            raise LayoutError(
                f"{self.graph.sink} ({layout}) is pipelined over {layout.pp} stages: call "
                "program.forward_backward(batches, num_microbatches=..., loss_func=...)"
            )
        intake = self._ready()
        with intake.unless_wrong():
            (batches,) = self._agreed(lambda: [intake.prepare([batch])])
            self.look_ahead(batches)
            with self.captured.steady():
                return self.language(batches, 0, self.encode(batches))

    def forward_backward(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        num_microbatches: int,
        loss_func: Callable[..., Any] | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        force_all_reduce: bool = False,
        seq_length: int | None = None,
    ) -> list[Any]:
        """Run forward and backward of one training step and finalise its gradients.

        Takes ``num_microbatches`` global microbatches from ``batches``. ``loss_func`` gets what the
        model's forward returns and follows Megatron's contract: it returns (loss sum, tokens, log),
        or (loss, log). The other options are those of Megatron's schedules; ``seq_length`` is told
        from the batch. Returns the logs on the last stage, [] elsewhere.

        Raises: LayoutError, before any collective, for batches that cannot be cut or modules that
        nothing would reduce.
        """
        intake = self._ready()

        def prepared() -> list[Batches]:
            """The chunks, and behind them the whole step."""
            self.check_trainable(forward_only=forward_only)
            found = intake.step(self.schedule, take(batches, num_microbatches))
            self.check_lengths(found[-1], seq_length)
            self.check_heads(found[-1])
            return found

        # Graphs and bubbles wait for all weights at once, so these are under way from the start.
        at_once = self.graph.targets if self.bubbles is not None else self.captured.names()
        ahead = [
            self.model.get_submodule(path)
            for name, path in self.graph.targets.items()
            if name != self.graph.sink and name in at_once
        ]
        for module in ahead:
            megatron.start_gathering(module)
        with intake.unless_wrong(), self.captured.steady(), self._abandoned(ahead):
            try:
                *chunks, found = self._agreed(
                    prepared, forward_only=forward_only, force_all_reduce=force_all_reduce
                )
            finally:
                # Of a refused batch, too: what comes next may move the weights.
                for module in ahead:
                    megatron.gather_parameters(module)
            return run_step(
                self,
                found,
                chunks,
                loss_func,
                forward_only=forward_only,
                collect_non_loss_data=collect_non_loss_data,
                force_all_reduce=force_all_reduce,
                seq_length=seq_length or found.hidden[0],
            )

    def _ready(self) -> Intake:
        if self._intake is None:
            raise LayoutError(
                "torch.distributed was not initialised when the program was compiled: it can be "
                "printed, not run. Call init_process_group before compile()."
            )
        if self._destroyed:
            raise LayoutError("the program was destroyed: compile the model again")
        return self._intake

    def _agreed(self, prepare: Callable[[], list[Batches]], **options: bool) -> list[Batches]:
        """What ``prepare`` returns, the whole step last; its error on any rank, or other
        ``options``, are one error on all."""
        intake = self._ready()
        found, error = None, None
        try:
            found = prepare()
            intake.look(found[-1])
        except Exception as problem:  # noqa: BLE001 - agreed on, then raised on every rank
            error = problem
        trained = [name for name in self.trainable() if name != self.graph.sink]
        asked = [f"{name}=True" for name, value in options.items() if value]
        intake.agree(None if found is None else found[-1], error, trained, asked)
        assert found is not None
        return found

    @contextlib.contextmanager
    def _abandoned(self, modules: list[nn.Module]) -> Iterator[None]:
        """Inside, an error ends the reductions of ``modules`` that are under way."""
        try:
            yield
        except Exception:
            for module in modules:
                megatron.abandon_reductions(module)
            raise

    def destroy(self) -> None:
        """Give back the process groups that the program opened."""
        self._destroyed = True
        if self._intake is not None:
            self._intake.close()
        if self._world is not None:
            if self.bubbles is not None:
                self.bubbles.close(self._world)
                self.bubbles = None
            close_groups(self._members, world=self._world)
        self._members = ()
        if self._owns_groups and self.groups is not None:
            self.groups.destroy()
            self.groups, self._owns_groups = None, False

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc: object) -> None:
        self.destroy()

"""What of the schedule ``filled`` outlives a step: who encodes what where, groups, streams."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.passes.fill import shortest
from colocc.passes.graph import Graph, first_type
from colocc.passes.places import Places, places_of, places_of_forwards
from colocc.passes.portions import Portions
from colocc.passes.shapes import lookup
from colocc.passes.timeline import Timeline
from colocc.runtime import megatron
from colocc.runtime.backend import uses_nccl
from colocc.runtime.channels import Channel
from colocc.runtime.costs import Work, costs_of
from colocc.runtime.data import Batches
from colocc.runtime.execute import Executor
from colocc.runtime.groups import Use, close_groups, open_groups
from colocc.runtime.lanes import Lanes
from colocc.runtime.links import links_of

if TYPE_CHECKING:
    from colocc.program import Program


def portions_of(graph: Graph) -> Portions:
    """How the samples of the one encoder of ``graph`` are split over stages.

    Raises: LayoutError if the bubbles of these layouts cannot be filled.
    """
    encoders = [name for name in graph.layouts if name != graph.sink]
    if len(encoders) != 1:
        raise LayoutError(
            f"schedule 'filled' runs one encoder in the bubbles of {graph.sink}, these layouts "
            f"have {len(encoders)}: {', '.join(encoders)}. Write schedule='three_phase'."
        )
    sink = (graph.sink, graph.layouts[graph.sink])
    return Portions((encoders[0], graph.layouts[encoders[0]]), sink)


@dataclass(frozen=True)
class Rows:
    """What the encoder makes of one sample; the same on all ranks."""

    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    device: torch.device

    def of(self, samples: int) -> list[int]:
        """The shape of the rows of ``samples`` samples."""
        shape = list(self.shape)
        shape[self.dim] *= samples
        return shape

    def empty(self, samples: int) -> torch.Tensor:
        """Room for the rows of ``samples`` samples."""
        return torch.empty(self.of(samples), dtype=self.dtype, device=self.device)


class Bubbles:
    """What of the schedule ``filled`` outlives a step: groups, costs, timelines."""

    def __init__(
        self, program: Program, timeout: timedelta, portions: int | None, window: int | None
    ) -> None:
        self.program, self.wish, self.window = program, portions, window
        self.portions = portions_of(program.graph)
        self.sink = program.graph.layouts[program.graph.sink]
        assert program.rank is not None
        self.rank = program.rank
        self.stage = int(self.sink.coordinates("pp")[self.rank])
        if len(program.cut) != 1:
            raise LayoutError(
                f"schedule 'filled' hands one value to {program.graph.sink}, the encoder hands "
                f"{len(program.cut)}. Write schedule='three_phase'."
            )
        identity = dict.fromkeys(program.redistributions, lambda value, samples=None: value)
        self.encode = Executor(
            program.mine,
            "encode",
            program.model,
            identity,
            program.cut,
            calls=program.captured,
        )
        self._inputs = [
            node for node in program.mine.placeholders() if node.meta["phase"] == "encode"
        ]
        self._streams = Lanes.streams() if self.needs_care() else None
        self.apart = self._streams is not None
        self._reserved = 0
        self._ran: set[Any] = set()
        found = first_type(program.cut[0].meta["types"])
        self.dim = found.batch if found is not None and found.batch is not None else 0
        self._rows: dict[Any, Rows] = {}
        self._places: dict[Any, Places] = {}
        self._work: list[Work] | None = None
        self._open(timeout)

    def _open(self, timeout: timedelta) -> None:
        links = links_of(self.portions)
        self._lists: dict[Use, Any] = {link.use: link.lists for link in links}
        everyone = (tuple(range(self.sink.size)),)
        host: dist.ProcessGroup | None = None
        if self.needs_care():
            (host,) = open_groups(everyone, timeout=timeout, use="host").values()
        opened: dict[Use, dist.ProcessGroup] = {}
        for use, lists in self._lists.items():
            mine = open_groups(lists, timeout=timeout, use=use)
            members = next(members for members in lists if self.rank in members)
            opened[use] = mine[members]
        if host is not None:
            self._lists["host"] = everyone

        def channel(up: Use, down: Use) -> Channel:
            made = Channel((opened.get(up), opened.get(down)), host, len(channels))
            made.connect([pair for link in links if link.use in (up, down) for pair in link.pairs])
            channels.append(made)
            return made

        channels: list[Channel] = []
        self.onward = channel("pipeline", "pipeline")
        self.back = channel("pipeline back", "pipeline back")
        self.embeddings = channel("embeddings up", "embeddings down")
        self.gradients = channel("gradients up", "gradients down")
        self.channels = tuple(channels)

    @staticmethod
    def needs_care() -> bool:
        """Whether messages are kernels."""
        return uses_nccl()

    def close(self, world: Any) -> None:
        """Give the groups back."""
        for use, lists in self._lists.items():
            close_groups(lists, use=use, world=world)

    def rows(self, batches: Batches) -> Rows:
        """What one sample makes, by trying it once for each kind of microbatch."""
        for name, rows in batches.ragged.rows.items():
            counts = rows.counts
            if len(counts) and counts.min() != counts.max():
                raise LayoutError(
                    f"schedule 'filled' needs equally many rows of every sample, {name} makes "
                    f"{counts.min()} to {counts.max()}. Write schedule='three_phase'."
                )
            if not counts.any():
                raise LayoutError(
                    f"schedule 'filled' needs rows of every sample, {name} makes none in this "
                    "step. Write schedule='three_phase'."
                )
        found = [self._of_kind(batches, index) for index in range(len(batches.microbatches))]
        for index, made in enumerate(found):
            if made != found[0]:
                raise LayoutError(
                    f"schedule 'filled' hands on rows of one kind, a sample of microbatch {index} "
                    f"makes {made}, one of microbatch 0 {found[0]}. Write schedule='three_phase'."
                )
        return found[0]

    def _of_kind(self, batches: Batches, index: int) -> Rows:
        """What a sample of a microbatch makes: as one of another with such inputs and as many
        rows, if there was one in any step."""
        inputs = [lookup(batches.microbatches[index], node.meta["path"]) for node in self._inputs]
        leaves, spec = pytree.tree_flatten(inputs)
        key = (
            str(spec),
            tuple(int(rows.counts[0]) for rows in batches.ragged.rows.values()),
            tuple(
                (leaf.dtype, tuple(leaf.shape[1:]))
                if isinstance(leaf, torch.Tensor)
                else repr(leaf)
                for leaf in leaves
            ),
        )
        if key not in self._rows:
            made, error = None, None
            try:
                made = self._tried(batches, index)
            except Exception as problem:  # noqa: BLE001 - raised on every rank
                error = problem
            self.program.settle(error)
            assert made is not None
            self._rows[key] = made
        return self._rows[key]

    def _tried(self, batches: Batches, index: int) -> Rows:
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(gpus):
            value = self.run_encoder(batches, [(index, 0, 1)])
        for name, rows in batches.ragged.rows.items():
            if len(value) != rows.counts[0]:
                raise LayoutError(
                    f"{name} made {len(value)} rows of sample 0 of microbatch {index}, which has "
                    f"{rows.counts[0]} placeholders in input_ids. Give each sample as many "
                    "placeholders as its items make rows."
                )
        return Rows(tuple(value.shape), self.dim, value.dtype, value.device)

    def run_encoder(self, batches: Batches, runs: list[tuple[int, int, int]]) -> torch.Tensor:
        """The encoder's output for the samples of ``runs``."""
        inputs = {node: batches.encoder_input(node, runs) for node in self._inputs}
        (value,) = self.encode(inputs)
        result: torch.Tensor = value
        return result

    def places(
        self, batches: Batches, rows: Rows, seq_length: int, *, train: bool, learns: bool
    ) -> Places:
        """What runs where; the same question has the same answer on every rank. ``learns``: the
        encoder has a backward.

        The first step of its kind loads kernels and takes memory, so its messages are careful; and
        so are those of a step that must do so again: on any rank some memory was given back, or
        modules run or are trained in another way.
        """
        count = len(batches.microbatches)
        key = (count, batches.size, rows.shape, seq_length, train, learns)
        first = key not in self._places
        careful = self._is_new(key, train=train) or first
        for channel in self.channels:
            channel.careful = careful
        if first:
            portions, timeline = self._timeline(batches, rows, seq_length, learns=learns)
            if train:
                places = places_of(timeline, self.stage, portions)
            else:
                places = places_of_forwards(timeline, self.stage, portions)
            self._places[key] = places
        # The careful step runs on them, too: they take their memory in it.
        self.lanes = Lanes(self._streams)
        return self._places[key]

    def _way(self, *, train: bool) -> tuple[Any, ...]:
        """How the modules of this rank run: what is trained, and what graphs are captured with."""
        graphs = self.program.captured.values() if train else ()
        parts = tuple(
            (
                part.training,
                tuple(
                    weight.requires_grad
                    for weight in part._parameters.values()
                    if weight is not None
                ),
            )
            for part in self.program.model.modules()
        )
        return parts, tuple(graph.state() for graph in graphs)

    def _is_new(self, key: Any, *, train: bool) -> bool:
        """Whether any rank has yet to run such a step in this way, or its GPU holds less memory for
        torch than after the last one; collective."""
        if not self.needs_care():
            return False
        step = key, self._way(train=train)
        new = step not in self._ran
        self._ran.add(step)
        return self.program.on_any_rank(new or torch.cuda.memory_reserved() < self._reserved)

    def ended(self) -> None:
        """A step has run."""
        if self._streams is not None:
            self._reserved = torch.cuda.memory_reserved()

    def _timeline(
        self, batches: Batches, rows: Rows, seq_length: int, *, learns: bool
    ) -> tuple[tuple[int, ...], Timeline]:
        """The number of portions of each microbatch, and the shortest timeline with them."""
        choices = self.portions.choices(batches.size) if self.wish is None else [self.wish]
        if self._work is None:
            self._work = self._all_work()
        *stages, encoder = self._work
        samples = batches.size / len(self.portions.slots[0])
        costs = costs_of(
            stages,
            encoder,
            tokens=batches.size // self.sink.dp * seq_length,
            rows=samples * rows.shape[rows.dim],
            captured=bool(self.program.captured),
            learns=learns,
        )
        count = len(batches.microbatches)
        return shortest(self.sink.pp, choices, count, costs, window=self.window, apart=self.apart)

    def _all_work(self) -> list[Work]:
        """That of each stage of the language module, and of the encoder, on the rank that has the
        most."""
        found = torch.zeros(
            self.sink.pp + 1, 2, dtype=torch.float64, device=torch.cuda.current_device()
        )
        for place, module in (
            (self.stage, self.program.sink_module),
            (-1, self.program.encoder_module),
        ):
            weights = megatron.weights_in_products(module)
            found[place, 0] = sum(weight.numel() for weight in weights)
            found[place, 1] = sum(weight.dim() > 1 for weight in weights)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [Work(*work) for work in found.tolist()]

"""The encoders' work inside the bubbles of the language pipeline.

``passes.fill.fill`` gives every stage one list of tasks; the language tasks among them are
Megatron's 1F1B, the others run between these (megatron/pipeline.py). Embeddings go to the first
stage portion by portion, and their gradients back, as messages between pairs of ranks.

No order of arrival can deadlock. Every rank runs the tasks of its stage in the order of the
timeline, a send never waits, and a task waits for its own inputs alone: so the task that starts
first in the timeline, of all that have not run, can always run. Ranks of one stage, which meet in
collectives, run the same list. For this the messages of a kind and direction have a group of their
own: between two ranks, sends and receives in one group wait for each other. On a GPU the language
tasks and the others are on two streams (lanes.py), each in that order, and only the others wait for
what comes before them in the list: the network has fewer edges, and still ends. A message is sent
and asked for at the end of what makes it, in one order on all ranks (passes/places.py): it is
behind the tasks that start before that, none of which waits for it, and hosts that wait for their
GPUs there go on, too.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from colocc.errors import LayoutError
from colocc.passes.places import Send
from colocc.passes.portions import Piece
from colocc.passes.timeline import LANGUAGE, Kind, Task
from colocc.runtime import megatron
from colocc.runtime.bubbles import Bubbles
from colocc.runtime.channels import Arrival, Channel
from colocc.runtime.data import Batches
from colocc.runtime.exchange import exchange, unpack

if TYPE_CHECKING:
    from colocc.program import Program


class Filled:
    """The encoders' side of one step whose work lies between the language tasks."""

    def __init__(
        self,
        program: Program,
        bubbles: Bubbles,
        batches: Batches,
        *,
        seq_length: int,
        train: bool,
        force_all_reduce: bool,
    ) -> None:
        self.program, self.bubbles, self.batches = program, bubbles, batches
        self.force_all_reduce = force_all_reduce
        megatron.gather_parameters(program.encoder_module)
        self.rows = bubbles.rows(batches)
        self.trainable = program.trainable()
        # A frozen encoder has no backward, and nothing returns to it.
        self.train, self.learns = train, train and bool(program.trainable_encoders())
        self.places = bubbles.places(
            batches, self.rows, seq_length, train=train, learns=self.learns
        )
        self.encoded: dict[tuple[int, int], torch.Tensor] = {}
        self.leaf: dict[int, torch.Tensor] = {}
        self.kept: dict[tuple[int, Piece], tuple[torch.Tensor, Any]] = {}
        self.asked: dict[tuple[Task, Piece], tuple[torch.Tensor, Arrival, Any]] = {}
        self.made: dict[tuple[int, int], Any] = {}
        self.lanes = bubbles.lanes
        self.replica = int(bubbles.sink.coordinates("dp")[bubbles.rank])
        self.held: dict[Task, list[tuple[Channel, torch.Tensor, int]]] = {}
        self._handed: Counter[Kind] = Counter()

    @property
    def pipeline(self) -> tuple[Channel, Channel, Filled]:
        """The way onward, the way back, and what runs between the tasks."""
        return self.bubbles.onward, self.bubbles.back, self

    def start(self) -> None:
        """Nothing runs ahead of the pipeline."""

    def before(self, place: int, ask: Callable[[Kind], object] | None = None) -> None:
        """Run what comes before language task number ``place`` of this stage. ``ask`` asks for the
        input of the next language task of a kind."""
        steps = self.places.before[place]
        last = self.places.last_backward() if place == len(self.places.before) - 1 else None
        first = next((step for step in steps if isinstance(step, Task)), None)
        for step in steps:
            if isinstance(step, Task):
                if step is first:
                    self.lanes.behind()
                with self.lanes.encoders():
                    self._run(step, last=step == last)
            elif isinstance(step, Send):
                self._send(step.task)
            elif step.task.kind in LANGUAGE:
                assert ask is not None
                ask(step.task.kind)
            elif step.task.kind == "encode" or self.learns:
                self._ask(step.task)

    def hand_on(self, kind: Kind, channel: Channel, tensor: torch.Tensor, receiver: int) -> None:
        """What the next language task of ``kind`` hands on, which is sent at its place."""
        task = Task(kind, self._handed[kind])
        self._handed[kind] += 1
        self._hold(task, channel, tensor, receiver)

    def _hold(self, task: Task, channel: Channel, tensor: torch.Tensor, receiver: int) -> None:
        # A tensor of its own: the caller may empty the one that it holds.
        self.held.setdefault(task, []).append((channel, tensor.detach(), receiver))

    def _send(self, task: Task) -> None:
        """Send what ``task`` made, behind it in its lane."""
        encodes = task.kind == "encode"
        with self.lanes.encoders() if encodes else contextlib.nullcontext():
            for channel, tensor, receiver in self.held.pop(task, ()):
                channel.send(tensor, receiver)
        if task.kind == "backward" and self.bubbles.stage == 0:
            self._return(task.microbatch)

    def _run(self, task: Task, *, last: bool) -> None:
        if task.kind == "encode":
            self._encode(task.microbatch, task.portion)
        elif self.learns:
            self._backward(task.microbatch, task.portion, last=last)

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the pipeline runs."""
        return self.lanes.pipeline()

    def leaves(self, microbatch: int) -> list[Any]:
        """The embeddings of ``microbatch``, on the first stage; other stages read none."""
        if self.bubbles.stage:
            return [None]
        tasks = [
            Task("encode", microbatch, portion)
            for portion in range(self.places.portions[microbatch])
        ]
        for task in tasks:
            self._ask(task)  # in a step of forwards alone, nobody has
        found = [(task, piece) for task in tasks for piece in self._read(task)]
        mine = [self._arrived(*place) for place in found]
        parts = self._handed_on([piece for _, piece in found], mine)
        leaf = torch.cat(parts, dim=self.rows.dim) if len(parts) > 1 else parts[0]
        leaf = leaf.detach().requires_grad_(self.learns)
        if self.learns:
            self.leaf[microbatch] = leaf
        else:
            for portion in range(self.places.portions[microbatch]):
                self.encoded.pop((microbatch, portion), None)
        return [leaf]

    def _handed_on(
        self, pieces: list[Piece], mine: list[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """The parts of all ``pieces`` of this replica: ``mine``, and for None those of peers."""
        rank, split = self.bubbles.rank, self.bubbles.portions
        readers, every = split.readers[pieces[0].replica], range(len(pieces))
        # By reader, who hands each piece on to it.
        carriers = {
            reader: [split.carrier(piece, reader) for piece in pieces] for reader in readers
        }
        found = dict(zip(every, mine, strict=True))
        if any(carrier is not None for row in carriers.values() for carrier in row):
            given = [[mine[i] for i in every if row[i] == rank] for row in carriers.values()]
            coming = [[i for i in every if carriers[rank][i] == peer] for peer in readers]
            shapes = {i: self.rows.of(pieces[i].stop - pieces[i].start) for i in every}
            flat = exchange(
                [[part for part in parts if part is not None] for parts in given],
                [sum(prod(shapes[i]) for i in places) for places in coming],
                group=self.program.collection(self.program.graph.sink).tp,
                kind="all_to_all",
                like=self.rows.empty(0),
            )
            places = list(itertools.chain(*coming))
            found |= dict(zip(places, unpack(flat, [shapes[i] for i in places]), strict=True))
        parts = []
        for i in every:
            part = found[i]
            assert part is not None
            parts.append(part)
        return parts

    def _return(self, microbatch: int) -> None:
        """Hand the gradient of a microbatch that the first stage is done with to those who encoded
        it. Ranks of this stage may do so for each other: they meet piece by piece."""
        leaf = self.leaf.pop(microbatch, None)
        if leaf is None:
            return
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        share = self.batches.size // self.bubbles.sink.dp
        rank, split = self.bubbles.rank, self.bubbles.portions
        for portion in range(self.places.portions[microbatch]):
            task = Task("encode_backward", microbatch, portion)
            for piece in self._pieces(microbatch, portion):
                readers = piece.ranks if piece.replica == self.replica else ()
                for reader in readers:
                    if split.gradient_source(piece, reader) != rank:
                        continue
                    first = piece.start - self.replica * share
                    part = self._narrow(gradient, first, piece.stop - piece.start)
                    if reader == rank:
                        self.kept[microbatch, piece] = part, self.lanes.mark()
                    else:
                        self.bubbles.gradients.send(part, reader)
                if rank in piece.ranks:
                    self._ask_for(task, piece)

    def finish(self) -> None:
        """Run what is left after the last language task; then every gradient is complete."""
        with self.lanes.joined(), self.lanes.pipeline():
            self.before(len(self.places.before) - 1)
        assert not self.encoded and not self.asked and not self.held
        for channel in self.bubbles.channels:
            channel.flush()
        self.bubbles.ended()
        if self.learns:
            for module in self.program.trainable_encoders():
                megatron.start_reductions(module, force_all_reduce=self.force_all_reduce)

    def _pieces(self, microbatch: int, portion: int) -> list[Piece]:
        """The pieces of a portion that hold a sample."""
        stage = self.places.stage_of[microbatch, portion]
        found = self.bubbles.portions.pieces(
            stage, portion, self.places.portions[microbatch], self.batches.size
        )
        return [piece for piece in found if piece.stop > piece.start]

    def _mine(self, microbatch: int, portion: int) -> list[Piece]:
        pieces = self._pieces(microbatch, portion)
        return [piece for piece in pieces if self.bubbles.rank in piece.ranks]

    def _encode(self, microbatch: int, portion: int) -> None:
        mine = self._mine(microbatch, portion)
        if not mine:
            return
        with torch.set_grad_enabled(self.train), self.program.noted("encode", microbatch):
            value = self.bubbles.run_encoder(
                self.batches, [(microbatch, piece.start, piece.stop) for piece in mine]
            )
        if self.learns:
            self.program.check_learns([value], self.trainable)
        self._check(value, sum(piece.stop - piece.start for piece in mine))
        self.encoded[microbatch, portion] = value
        self.made[microbatch, portion] = self.lanes.mark()
        first, split = 0, self.bubbles.portions
        for piece in mine:
            count = piece.stop - piece.start
            part = self._narrow(value.detach(), first, count)
            first += count
            for reader in split.readers[piece.replica]:
                if reader != self.bubbles.rank and split.source(piece, reader) == self.bubbles.rank:
                    task = Task("encode", microbatch, portion)
                    self._hold(task, self.bubbles.embeddings, part, reader)
        if not self.learns and self.bubbles.stage:
            del self.encoded[microbatch, portion]

    def _check(self, value: torch.Tensor, samples: int) -> None:
        if list(value.shape) != self.rows.of(samples):
            raise LayoutError(
                f"the encoder made {list(value.shape)} of {samples} samples, one makes "
                f"{list(self.rows.shape)}: schedule 'filled' needs the same number of rows of "
                "every sample. Write schedule='three_phase'."
            )

    def _read(self, task: Task) -> list[Piece]:
        """The pieces that this rank's replica reads of what ``task`` encodes."""
        pieces = self._pieces(task.microbatch, task.portion)
        return [piece for piece in pieces if piece.replica == self.replica]

    def _ask(self, task: Task) -> None:
        """Have peers' messages come, if none has been asked for: what ``task`` makes, if it
        encodes, else the gradient that it waits for."""
        encodes = task.kind == "encode"
        for piece in self._read(task) if encodes else self._mine(task.microbatch, task.portion):
            self._ask_for(task, piece)

    def _ask_for(self, task: Task, piece: Piece) -> None:
        split, rank = self.bubbles.portions, self.bubbles.rank
        if task.kind == "encode":
            channel, source = self.bubbles.embeddings, split.source(piece, rank)
        else:
            channel, source = self.bubbles.gradients, split.gradient_source(piece, rank)
        if source is not None and source != rank and (task, piece) not in self.asked:
            buffer = self.rows.empty(piece.stop - piece.start)
            arrival = channel.receive(buffer, source)
            self.asked[task, piece] = buffer, arrival, self.lanes.mark()

    def _take(self, task: Task, piece: Piece) -> torch.Tensor | None:
        """What was asked for, for use on the current stream; None if nothing was."""
        if (task, piece) not in self.asked:
            return None
        buffer, arrival, mark = self.asked.pop((task, piece))
        found = self.lanes.take(buffer, mark)
        arrival.wait()
        return found

    def _arrived(self, task: Task, piece: Piece) -> torch.Tensor | None:
        """What this rank has of ``piece`` by now; None where a peer hands it on."""
        if self.bubbles.portions.source(piece, self.bubbles.rank) != self.bubbles.rank:
            return self._take(task, piece)
        first = 0
        for other in self._mine(task.microbatch, task.portion):
            if other == piece:
                break
            first += other.stop - other.start
        place = task.microbatch, task.portion
        value = self.encoded[place].detach()
        self.lanes.take(value, self.made[place])
        return self._narrow(value, first, piece.stop - piece.start)

    def _backward(self, microbatch: int, portion: int, *, last: bool) -> None:
        """Backward of one portion; behind the ``last`` task of the step, reductions start with
        it."""
        mine, task = self._mine(microbatch, portion), Task("encode_backward", microbatch, portion)
        if not mine:
            return
        value, parts = self.encoded.pop((microbatch, portion)), []
        for piece in mine:
            part = self._take(task, piece)
            if part is None:
                part = self.lanes.take(*self.kept.pop((microbatch, piece)))
            parts.append(part)
        gradient = torch.cat(parts, dim=self.rows.dim) if len(parts) > 1 else parts[0]
        scale = self.program.scale
        with contextlib.ExitStack() as stack:
            stack.enter_context(megatron.no_sync(self.program.encoder_module))
            if last:
                stack.enter_context(
                    self.program.captured.last_backward(
                        self.trainable, force_all_reduce=self.force_all_reduce
                    )
                )
            stack.enter_context(self.program.noted("encode_backward", microbatch))
            torch.autograd.backward(value, gradient * scale if scale != 1 else gradient)

    def _narrow(self, tensor: torch.Tensor, first: int, samples: int) -> torch.Tensor:
        each = self.rows.shape[self.rows.dim]
        return tensor.narrow(self.rows.dim, first * each, samples * each)

"""A training step: encode, language pipeline, encode backward, finalise.

1. Encode the samples of a chunk of microbatches and redistribute; cut the result into microbatches,
   each a leaf of its own.
2. Megatron's schedule (1F1B, or none at pp = 1) over the language module, which reads the leaves.
3. Return the leaves' gradients through the redistributions and the encoders.

With ``three_phase`` the chunk is the whole step. With ``lookahead=k``, at pp = 1, it is k
microbatches: 3 of a chunk and 1 of the next come between two microbatches of 2, so that no more
than k microbatches' encoder activations are alive. With ``filled``, at pp > 1, 1 and 3 lie in the
bubbles of 2 (runtime/filled.py). Gradients are finalised once, at the end.

Source: the schedule of NVIDIA/Megatron-LM pull request 4784; pairing is by sample here, not by
position.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.graph import first_type
from colocc.passes.structure import mapped
from colocc.runtime import megatron
from colocc.runtime.data import Batches
from colocc.runtime.filled import Filled
from colocc.runtime.gradients import finalize

if TYPE_CHECKING:
    from colocc.program import Program


@dataclass(frozen=True)
class Schedule:
    """The order of a step's work; ``at_once`` microbatches are encoded together, None: all.

    With ``filled`` a microbatch is encoded in ``portions``, None: as many as pay; the encoder
    activations of ``window`` microbatches are alive, None: four for each stage.
    """

    kind: Literal["three_phase", "lookahead", "filled"] = "three_phase"
    at_once: int | None = None
    portions: int | None = None
    window: int | None = None

    @classmethod
    def parse(cls, text: str, sink: tuple[str, Layout]) -> Schedule:
        """The schedule that ``text`` names, for the module and layout ``sink``.

        Raises: LayoutError for a text that names none, or one that the sink's layout forbids.
        """
        if text == "three_phase":
            return cls()
        name, _, number = text.partition("=")
        if filled := re.fullmatch(r"filled(?:=([1-9]\d*)(?:,([1-9]\d*))?)?", text):
            portions, window = (int(found) if found else None for found in filled.groups())
            return cls("filled", portions=portions, window=window)
        if name != "lookahead" or not number.isdecimal() or int(number) < 1:
            raise LayoutError(
                f"schedule {text!r} is not known: write schedule='three_phase', or 'lookahead=2' "
                "to encode 2 microbatches at a time, or 'filled' to encode in pipeline bubbles"
            )
        module, layout = sink
        if layout.pp > 1:
            raise LayoutError(
                f"schedule {text!r} encodes between microbatches, where all ranks are at the same "
                f"one; the stages of {module} ({layout}) are not: pp{layout.pp}. "
                "Write schedule='three_phase', or pp1."
            )
        return cls("lookahead", int(number))

    def chunks(self, microbatches: int) -> list[range]:
        """The microbatches that are encoded together."""
        size = self.at_once or microbatches
        return [
            range(start, min(start + size, microbatches)) for start in range(0, microbatches, size)
        ]

    def __str__(self) -> str:
        numbers = [str(n) for n in (self.at_once, self.portions, self.window) if n is not None]
        return "=".join([self.kind, ",".join(numbers)] if numbers else [self.kind])


@dataclass
class Encoded:
    """The values that cross from encode to language: whole, and cut into leaves by microbatch.

    ``counts`` gives, of values made of rows, the rows of each microbatch; all others have equally
    many samples in each.
    """

    nodes: list[fx.Node]
    whole: list[Any]
    counts: dict[fx.Node, list[int]] = field(default_factory=dict)
    leaves: list[list[Any]] = field(default_factory=list)

    def cut(self, microbatches: int) -> None:
        """Detach each value by microbatch; a microbatch's backward then fills its own leaf's
        grad."""
        self.leaves = [
            [self._leaf(node, value, index, microbatches) for node, value in self._pairs()]
            for index in range(microbatches)
        ]

    def _pairs(self) -> Iterator[tuple[fx.Node, Any]]:
        return zip(self.nodes, self.whole, strict=True)

    def _leaf(self, node: fx.Node, value: Any, index: int, count: int) -> Any:
        dim, counts = _batch_dim(node), self.counts.get(node)

        def part(tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor) or dim is None:
                return tensor
            leaf = tensor.detach()
            sizes = counts or [tensor.shape[dim] // count] * count
            if sizes[index] != tensor.shape[dim]:
                leaf = leaf.narrow(dim, sum(sizes[:index]), sizes[index])
            return leaf.requires_grad_(tensor.requires_grad)

        return mapped(part, value)

    def backward(self) -> None:
        """From the leaves' gradients to the encoders' parameters, on every rank alike.

        A rank that read nothing returns zero rows, so that all ranks run the same collectives.
        """
        tensors, gradients = [], []
        for place, (node, value) in enumerate(self._pairs()):
            dim = _batch_dim(node)
            parts = [pytree.tree_leaves(leaves[place]) for leaves in self.leaves]
            for which, tensor in enumerate(pytree.tree_leaves(value)):
                if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad or dim is None:
                    continue
                tensors.append(tensor)
                found = [_grad_of(part[which]) for part in parts]
                gradients.append(torch.cat(found, dim=dim) if len(found) > 1 else found[0])
        self.leaves.clear()
        if tensors:
            torch.autograd.backward(tensors, gradients)


def _batch_dim(node: fx.Node) -> int | None:
    if "rows" in node.meta:
        return 0
    found = first_type(node.meta["types"])
    return found.batch if found is not None else None


def _grad_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class Chunks:
    """The encoders' side of a step: one chunk of microbatches is encoded at a time."""

    def __init__(
        self,
        program: Program,
        chunks: list[Batches],
        *,
        train: bool,
        force_all_reduce: bool = False,
    ) -> None:
        self.program, self.train, self.force_all_reduce = program, train, force_all_reduce
        self.trainable = program.trainable()
        self.todo = list(chunks)
        self.encoded: Encoded | None = None
        self.first = self.stop = 0

    # The pipeline's communication stays Megatron's own.
    pipeline = None

    def start(self) -> None:
        """Encode the first chunk before the schedule: in there, the stages of a pipeline are not at
        the same microbatch."""
        self.turn()

    def leaves(self, microbatch: int) -> list[Any]:
        """The leaves of ``microbatch``; the first of a chunk ends the one before."""
        if microbatch >= self.stop:
            self.turn()
        assert self.encoded is not None
        return self.encoded.leaves[microbatch - self.first]

    def turn(self) -> None:
        """Backward of the chunk at hand, which adds to the encoders' gradients; encode the next."""
        self._backward(last=False)
        batches = self.todo.pop(0)
        encoded = Encoded(self.program.cut, [])
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and self.train),
            self.program.noted("encode"),
        ):
            encoded.whole = self.program.encode(batches)
            encoded.counts = self.program.crossing.counts()
            self.program.check_learns(encoded.whole, self.trainable)
        count = len(batches.microbatches)
        encoded.cut(count)
        self.encoded, self.first, self.stop = encoded, self.stop, self.stop + count

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the pipeline runs."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Backward of the last chunk, if there is any: then every gradient is complete."""
        self._backward(last=True)

    def _backward(self, *, last: bool) -> None:
        encoded, self.encoded = self.encoded, None
        if encoded is None or not self.train:
            return
        with contextlib.ExitStack() as stack:
            apart = dict.fromkeys([*self.program.captured.names(), *self.program.unseen()])
            names = apart if last else self.trainable
            quiet = [
                self.trainable[name]
                for name in names
                if name in self.trainable and name != self.program.graph.sink
            ]
            for module in quiet:
                stack.enter_context(megatron.no_sync(module))
            if last:
                stack.enter_context(
                    self.program.captured.last_backward(
                        self.trainable, force_all_reduce=self.force_all_reduce
                    )
                )
            stack.enter_context(self.program.noted("encode_backward"))
            encoded.backward()
        # A replayed backward tells DDP nothing, nor does an encoder that has not run: what they
        # would have started, start here; all ranks in one order, also one that could not capture.
        for module in quiet if last else ():
            megatron.start_reductions(module, force_all_reduce=self.force_all_reduce)


def run_step(
    program: Program,
    batches: Batches,
    chunks: list[Batches],
    loss_func: Callable[..., Any] | None,
    *,
    forward_only: bool,
    collect_non_loss_data: bool,
    force_all_reduce: bool,
    seq_length: int,
) -> list[Any]:
    """Run one step over ``batches``, encoding ``chunks`` of them at a time; return what Megatron's
    schedule returns on this rank."""
    count = len(batches.microbatches)
    train = not forward_only
    encoders: Chunks | Filled
    if program.bubbles is None:
        encoders = Chunks(program, chunks, train=train, force_all_reduce=force_all_reduce)
    else:
        encoders = Filled(
            program,
            program.bubbles,
            batches,
            seq_length=seq_length,
            train=train,
            force_all_reduce=force_all_reduce,
        )
    program.look_ahead(batches)
    encoders.start()
    tokens: list[torch.Tensor | None] = []

    def collect(model: Any, num_tokens: torch.Tensor | None, **unused: Any) -> None:
        tokens.append(num_tokens)

    def forward_step(indices: Iterator[int], model: Any) -> tuple[Any, Callable[..., Any] | None]:
        index = next(indices)
        leaves = encoders.leaves(index)
        with program.noted("forward", index):
            output = program.language(batches, index, leaves)
        if program.recorder is not None:
            program.recorder.watch_backward(pytree.tree_leaves(output)[0], index)
        return output, loss_func

    with encoders.running():
        results = megatron.run_schedule(
            megatron.Stage(program.sink_module, collect),
            forward_step,
            program.collection(program.graph.sink),
            num_microbatches=count,
            seq_length=seq_length,
            micro_batch_size=batches.hidden[1],
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            force_all_reduce=force_all_reduce,
            indices=iter(range(count)),
            filled=encoders.pipeline,
        )
    encoders.finish()
    if train:
        with program.noted("reduce"):
            finalize(program, tokens[0], force_all_reduce=force_all_reduce)
    return results

"""An encoder's forward and backward as CUDA graphs: one launch each in place of a thousand.

A pair of graphs holds what the forward keeps for its backward, so as many pairs of a kind are
captured as are under way at once, each when it is first needed. The backward adds to the gradients
that DDP holds inside the graph, and marks where those of a bucket are complete, behind which DDP
reduces them (marks.py). A replay is the captured kernels on the captured addresses: where an
address, a shape or what is trained changes, another pair is captured, and where a forward cannot be
captured, it runs as it is, with a warning that says why.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from colocc.layout import Layout
from colocc.runtime import megatron
from colocc.runtime.marks import Marks

# Each kind of input has graphs, with activations, of its own: more kinds than this are ragged.
KINDS = 4


class CapturedModule:
    """``module(*args, **kwargs)`` of the encoder ``name``, replayed where gradients are on.

    ``find`` returns the module as it is wrapped now. ``reason`` says why it is not replayed, None
    while it is.
    """

    def __init__(self, name: str, layout: Layout, find: Callable[[], nn.Module]) -> None:
        self.name, self.layout, self.find = name, layout, find
        self.reason: str | None = None
        self._pairs: dict[Any, list[_Pair]] = {}
        self._seen: _Weights | None = None
        self._steady = False
        self._state: tuple[Any, ...] | None = None
        self._reduce: Callable[[Any], None] | None = None
        self._behind: Sequence[nn.Module] = ()

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Inside, nobody moves or freezes weights, or changes how the module runs: so that is
        looked at once, which takes the host as long as a hundred launches."""
        self._steady = True
        try:
            yield
        finally:
            self._steady, self._state = False, None

    @contextlib.contextmanager
    def last_backward(
        self, behind: Sequence[nn.Module], *, force_all_reduce: bool
    ) -> Iterator[None]:
        """Inside, the backward that ends what is under way is the last of the step: behind it
        gradients are reduced as they are complete, if DDP is to do so, and has begun with those of
        all modules that this one is ``behind``."""
        self._behind = behind
        self._reduce = functools.partial(
            megatron.start_reduction, force_all_reduce=force_all_reduce
        )
        try:
            yield
        finally:
            self._reduce, self._behind = None, ()

    def went_back(self, marks: Marks) -> None:
        """A replay of a backward with these ``marks`` has been launched."""
        under_way = sum(not pair.free for pairs in self._pairs.values() for pair in pairs)
        if self._reduce is None or under_way != 1:
            return
        if all(megatron.has_started_reductions(module) for module in self._behind):
            marks.start(megatron.reductions(self.find()), self._reduce)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; without gradients, by running it."""
        module = self.find()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.reason is None and torch.is_grad_enabled():
            self._look(module, leaves)
        # Also where it runs as it is: all ranks gather in one order.
        megatron.gather_parameters(module)
        if self.reason is not None or not torch.is_grad_enabled():
            return module(*args, **kwargs)
        weights = self._weights(module)
        free = self._free(module, weights, leaves, spec)
        if free is None:
            return module(*args, **kwargs)
        return free.run([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])

    def state(self) -> tuple[Any, ...] | None:
        """What graphs of this moment are captured with, None where the module runs without: a step
        that finds another than before captures."""
        module = self.find()
        if self.reason is None:
            self._look(module, [])
        return None if self.reason is not None else self._current(self._weights(module))

    def captured(self) -> int:
        """How many pairs of graphs there are."""
        return sum(len(pairs) for pairs in self._pairs.values())

    def _look(self, module: nn.Module, leaves: list[Any]) -> None:
        reason = None if self._state is not None else megatron.uncapturable(module)
        if not torch.cuda.is_available():
            reason = "there is no GPU"
        elif self.layout.ep > 1 or self.layout.size != self.layout.dp * self.layout.pp:
            reason = f"{self.layout} has collectives inside the encoder"
        elif any(not leaf.is_cuda for leaf in leaves if isinstance(leaf, torch.Tensor)):
            reason = "it has inputs on the host"
        if reason is not None:
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(f"cuda_graphs: {self.name} runs without: {reason}", stacklevel=2)

    def _weights(self, module: nn.Module) -> _Weights:
        seen = self._seen
        if seen is None or not (self._state or (seen.module is module and seen.is_current())):
            self._seen = seen = _Weights(module)
        return seen

    def _current(self, weights: _Weights) -> tuple[Any, ...]:
        state = self._state or weights.state()
        self._state = state if self._steady else None
        return state

    def _free(
        self, module: nn.Module, weights: _Weights, leaves: list[Any], spec: Any
    ) -> _Pair | None:
        """A pair for these inputs that nothing is under way in; None if there cannot be one."""
        kind = (spec, self._current(weights), tuple(_kind(leaf) for leaf in leaves))
        pairs = self._pairs.setdefault(kind, [])
        if (free := next((pair for pair in pairs if pair.free), None)) is not None:
            return free
        if len(self._pairs) > KINDS:
            self._give_up(f"its inputs or weights are of more than {KINDS} kinds")
            return None
        try:
            pairs.append(_Pair(self, module, weights, leaves, spec))
        except Exception as problem:  # noqa: BLE001 - said in the warning; it then runs as it is
            torch.cuda.synchronize()
            self._give_up(f"{type(problem).__name__} when it was captured: {problem}")
            return None
        return pairs[-1]


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), repr(leaf)


@dataclass
class _Weights:
    """A module's parameters and buffers by name, and where their gradients are added."""

    module: nn.Module
    parameters: dict[str, nn.Parameter] = field(init=False)
    buffers: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = dict(self.module.named_parameters())
        # Megatron's DDP has a list by the name of the method.
        self.buffers = list(nn.Module.buffers(self.module))
        # What each part holds under which name: a tensor or a part of it may be put in another's
        # place.
        self._held = [(table, list(table.values())) for table in _tables(self.module)]

    def is_current(self) -> bool:
        """Whether every part of the module still holds the same tensors and parts."""
        return all(
            len(table) == len(values) and all(map(operator.is_, table.values(), values))
            for table, values in self._held
        )

    def state(self) -> tuple[Any, ...]:
        """What a graph was captured with: addresses, what is trained, the mode."""
        return (
            self.module.training,
            tuple(
                (weight.data_ptr(), megatron.main_gradient(weight).data_ptr())
                if weight.requires_grad
                else (weight.data_ptr(), None)
                for weight in self.parameters.values()
            ),
            tuple(buffer.data_ptr() for buffer in self.buffers),
        )

    def aliases(
        self,
        take: Callable[[torch.Tensor], None],
        taken: Callable[[nn.Parameter], None] = lambda weight: None,
    ) -> dict[str, torch.Tensor]:
        """The parameters under tensors of their own; each whose gradient is made goes to ``take``,
        then the parameter to ``taken``.

        A parameter's own gradient is accumulated on the stream where DDP first asked for it, which
        a capture on another stream must not touch.
        """

        def took(alias: torch.Tensor, weight: nn.Parameter) -> None:
            take(alias)
            alias.grad = None
            taken(weight)

        found = {}
        for name, weight in self.parameters.items():
            alias = weight.detach().requires_grad_(weight.requires_grad)
            # What Megatron's layers and DDP note on a parameter.
            vars(alias).update(vars(weight))
            if weight.requires_grad:
                alias.register_post_accumulate_grad_hook(functools.partial(took, weight=weight))
            found[name] = alias
        return found


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    for part in module.modules():
        yield from (vars(part)["_parameters"], vars(part)["_buffers"], vars(part)["_modules"])


class _Pair:
    """The graphs of one forward and its backward, with the tensors that they read and write."""

    def __init__(
        self,
        owner: CapturedModule,
        module: nn.Module,
        weights: _Weights,
        leaves: Sequence[Any],
        spec: Any,
    ) -> None:
        self.owner, self.free, self.marks = owner, True, Marks(module)
        self.inputs = [_still(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        pool, stream = torch.cuda.graph_pool_handle(), _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Once beside the graphs: libraries make their workspaces and kernels are loaded, which
            # a capture must not see.
            dry = functools.partial(megatron.add_gradient, dry=True)
            made = self._make(module, weights.aliases(dry), leaves, spec)
            learning = _learning(pytree.tree_leaves(made))
            if learning:
                torch.autograd.backward(learning, [torch.zeros_like(out) for out in learning])
            del made, learning
            for still in self.inputs:
                still.grad = None
        torch.cuda.current_stream().wait_stream(stream)
        # A collector at work inside a capture may free what another graph holds.
        gc.collect()
        self.forward, self.backward = torch.cuda.CUDAGraph(), None
        with _capturing(self.forward, pool, stream):
            aliases = weights.aliases(megatron.add_gradient, self.marks.made)
            made = self._make(module, aliases, leaves, spec)
        found, self.spec = pytree.tree_flatten(made)
        self.others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in found]
        outputs = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
        self.places = [isinstance(leaf, torch.Tensor) for leaf in found]
        self.learns = [output.requires_grad for output in outputs]
        learning = _learning(outputs)
        self.gradients = [torch.zeros_like(output) for output in learning]
        if learning:
            self.backward = torch.cuda.CUDAGraph()
            with _capturing(self.backward, pool, stream):
                torch.autograd.backward(learning, self.gradients)
        self.input_gradients = [still.grad for still in self.inputs]
        self.outputs = [output.detach() for output in outputs]

    def _make(
        self, module: nn.Module, weights: dict[str, torch.Tensor], leaves: Sequence[Any], spec: Any
    ) -> Any:
        inputs = iter(self.inputs)
        still = [next(inputs) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(still, spec)
        return functional_call(module, weights, args, kwargs)

    def run(self, inputs: list[torch.Tensor]) -> Any:
        """The outputs of a replay on ``inputs``."""
        if self.backward is None:
            self._replay(inputs)
            found = [output.clone() for output in self.outputs]
        else:
            # Without an input that learns, autograd would see nothing to go back to.
            anchor = torch.empty(0, device=inputs[0].device, requires_grad=True)
            found = list(_Replay.apply(self, anchor, *inputs))  # type: ignore[no-untyped-call]
        tensors = iter(found)
        pairs = zip(self.places, self.others, strict=True)
        leaves = [next(tensors) if place else other for place, other in pairs]
        return pytree.tree_unflatten(leaves, self.spec)

    def _replay(self, inputs: Sequence[torch.Tensor]) -> None:
        for still, given in zip(self.inputs, inputs, strict=True):
            with torch.no_grad():
                still.copy_(given)
        self.forward.replay()

    def go_back(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Add to the weights' gradients; return those of the inputs."""
        assert self.backward is not None
        learning = [given for given, learns in zip(gradients, self.learns, strict=True) if learns]
        for still, given in zip(self.gradients, learning, strict=True):
            still.zero_() if given is None else still.copy_(given)
        self.backward.replay()
        self.owner.went_back(self.marks)
        return [None if found is None else found.clone() for found in self.input_gradients]


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Where all captures run: each stream has memory and workspaces of its own."""
    return torch.cuda.Stream(device)


def _learning(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _still(given: torch.Tensor) -> torch.Tensor:
    """A tensor that stays where it is, with the values and strides of ``given``."""
    still = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    return still.copy_(given.detach()).requires_grad_(given.requires_grad)


def _capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Any:
    # NCCL's watchdog asks for events on a thread of its own, which must not end the capture.
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


class _Lease:
    """A pair that is under way; it is free again after its backward, or if none will come."""

    def __init__(self, pair: _Pair) -> None:
        self.pair: _Pair | None = pair
        pair.free = False

    def end(self) -> None:
        if self.pair is not None:
            self.pair.free, self.pair = True, None

    def __del__(self) -> None:
        self.end()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: _Pair, anchor: torch.Tensor, *inputs: torch.Tensor) -> Any:
        ctx.lease = _Lease(pair)
        pair._replay(inputs)
        found = tuple(output.detach() for output in pair.outputs)
        ctx.mark_non_differentiable(
            *(output for output, learns in zip(found, pair.learns, strict=True) if not learns)
        )
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        pair = ctx.lease.pair
        if pair is None:
            raise RuntimeError(
                "backward of a CUDA graph a second time: its activations are gone. Compile with "
                "cuda_graphs=False to go back twice."
            )
        found = pair.go_back(gradients)
        ctx.lease.end()
        return (None, None, *found)

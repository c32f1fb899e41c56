"""The oracle: the same model on one process, one rank, in float64, without any of colocc's
graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from colocc.runtime.context_parallel import join, shard
from colocc.runtime.megatron import unwrapped
from colocc.testing.names import full_gradients, global_names, gradient_of

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from colocc.program import Program


@dataclass
class Run:
    """What one training step made: the loss of the step, the language module's inputs by microbatch
    and replica, and whole gradients by module and global name."""

    loss: float | None = None
    inputs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class _Float64(TorchFunctionMode):
    """Megatron computes norms, rotary angles and the cross entropy in float32, whatever the model
    is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **kwargs)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Inside, float32 means float64: what Megatron computes in float32 by itself follows the
    model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def watch_input(module: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    """Append the ``decoder_input`` of every call of the language module to ``seen``."""

    def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        value = kwargs.get("decoder_input")
        if value is not None:
            seen.append(value.detach().clone())

    handle = unwrapped(module).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def oracle(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    loss_func: Callable[[Any], Any],
    *,
    replicas: int,
    cp: int = 1,
    per_token: bool = True,
) -> Run:
    """Run ``model``, whole on one rank and not compiled, over ``batches``; gradients are in
    ``grad``.

    ``replicas`` and ``cp`` are the language module's dp and cp: with mean losses each replica's
    mean counts alike, and so does the mean of each of its cp ranks over the tokens there; the batch
    and the model's output [b, s] are cut as they would be. ``loss_func`` is the one that
    forward_backward gets.
    """
    run, total, tokens = Run(loss=0.0), 0.0, 0
    seen: list[torch.Tensor] = []
    model.zero_grad(set_to_none=True)
    cuts = [
        (index, replica, _cut(batch, replica, replicas))
        for index, batch in enumerate(batches)
        for replica in range(replicas)
    ]
    with watch_input(model.language_model, seen):
        for _, _, batch in cuts:
            losses = []
            for part in _parts(model(**batch), cp):
                loss, count, _ = loss_func(part)
                losses.append(loss if per_token else loss / max(int(count), 1) / (len(cuts) * cp))
                tokens += int(count)
            loss = torch.stack(losses).sum()
            loss.backward()
            total += float(loss.detach())
    divisor = max(tokens, 1) if per_token else 1
    run.loss = total / divisor
    run.inputs = {(i, r): value for (i, r, _), value in zip(cuts, seen, strict=True)}
    names = {name: model.modality_submodules[name] for name in model.modality_submodules}
    for owner, module in (names | {"language": model.language_model}).items():
        for name, weight in global_names(module):
            gradient = gradient_of(weight)
            if gradient is not None:
                run.gradients[f"{owner}.{name}"] = gradient.detach().clone() / divisor
    return run


def _cut(batch: Mapping[str, Any], replica: int, replicas: int) -> dict[str, Any]:
    """The samples of one replica of a global batch: its dim 0, cut in equal parts."""

    def narrow(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        size = value.shape[0] // replicas
        return value[replica * size : (replica + 1) * size]

    return {key: pytree.tree_map(narrow, value) for key, value in batch.items()}


def _parts(output: Any, cp: int) -> list[Any]:
    """What the loss function of each cp rank gets of the model's output."""
    if cp == 1:
        return [output]
    values, spec = pytree.tree_flatten(output)
    cuts = [[shard(value, 1, rank, cp) for value in values] for rank in range(cp)]
    return [pytree.tree_unflatten(cut, spec) for cut in cuts]


def observed(
    program: Program,
    losses: Sequence[tuple[float, int]],
    inputs: Sequence[torch.Tensor] = (),
    *,
    microbatches: int,
) -> Run:
    """What this rank saw of a step: its share of the loss, its replica's inputs, and its stage's
    gradients, whole.

    ``losses`` are (sum, tokens) by microbatch, empty off the last stage. Collective, over each
    module's tp groups and the language module's cp groups.
    """
    assert program.groups is not None and program.rank is not None
    replica = int(program.graph.layouts[program.graph.sink].coordinates("dp")[program.rank])
    sink = program.graph.sink
    wholes = [
        whole_input(value, program.sink_module, program.groups[sink])
        for value in inputs[:microbatches]
    ]
    modules = program.trainable()
    return Run(
        loss=sum(loss for loss, _ in losses) if losses else None,
        inputs={(i, replica): value for i, value in enumerate(wholes)},
        gradients=full_gradients(modules, program.groups),
    )


def whole_input(
    value: torch.Tensor, module: nn.Module, collection: ProcessGroupCollection
) -> torch.Tensor:
    """The language module's input for the whole sequence, [s, b, h], from this rank's part;
    collective over the groups that share the sequence."""
    if getattr(unwrapped(module).config, "sequence_parallel", False):
        value = torch.cat(_of_all(value, collection.tp))
    return join(_of_all(value, collection.cp), 0) if collection.cp.size() > 1 else value


def _of_all(part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """``part`` of every rank of ``group``."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| in L2; the absolute norm where the reference is zero."""
    wanted = reference.double()
    error = (value.double() - wanted).norm()
    size = wanted.norm()
    return float(error / size) if size > 0 else float(error)


def compare(
    runs: Sequence[Run], reference: Run, *, tolerance: float = 1e-5, noise: float = 1e-12
) -> dict[str, float]:
    """Return the worst relative L2 of each gradient and of the inputs over all ranks.

    Losses are not compared: each replica has its share.
    ``noise`` is the size below which a reference gradient is zero but for rounding (a key's bias
    under softmax): such a gradient is compared absolutely.
    Raises: AssertionError naming every tensor above ``tolerance``, and those missing or unexpected.
    """
    worst: dict[str, float] = {}
    problems: list[str] = []
    seen = {name for run in runs for name in run.gradients}
    problems += [
        f"no rank has a gradient of {n}" for n in sorted(reference.gradients.keys() - seen)
    ]
    problems += [f"unexpected gradient of {n}" for n in sorted(seen - reference.gradients.keys())]
    for rank, run in enumerate(runs):
        errors = {
            name: _error(value, reference.gradients[name], noise)
            for name, value in run.gradients.items()
            if name in reference.gradients
        }
        errors |= {
            f"language input {place}": _error(value, reference.inputs[place], noise)
            for place, value in run.inputs.items()
        }
        for name, error in errors.items():
            worst[name] = max(worst.get(name, 0.0), error)
            # Written so that a NaN is a problem.
            if not error <= tolerance:
                problems.append(f"rank {rank}: {name} is off by {error:.2e}")
    if problems:
        shown = "\n  ".join(problems[:12])
        raise AssertionError(
            f"{len(problems)} of a run's values differ from the oracle:\n  {shown}"
        )
    return worst


def _error(value: torch.Tensor, reference: torch.Tensor, noise: float) -> float:
    if value.shape != reference.shape:
        return float("inf")
    if reference.double().norm() <= noise * reference.numel() ** 0.5:
        return float(value.double().norm())
    return relative_l2(value, reference)

"""The modules of a compiled model: which is which, which learn, and with what they are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from colocc.errors import LayoutError
from colocc.passes.graph import Graph
from colocc.runtime import megatron

if TYPE_CHECKING:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.process_groups_config import ProcessGroupCollection

    from colocc.runtime.data import Batches
    from colocc.runtime.groups import ProcessGroups


class Modules:
    """The modules that the layouts of ``graph`` name, as they are wrapped now."""

    def __init__(self, model: nn.Module, graph: Graph, groups: ProcessGroups | None) -> None:
        self.model, self.graph, self.groups = model, graph, groups

    def trainable(self) -> dict[str, nn.Module]:
        """The modules of the layouts with a parameter that requires grad, in the order of the
        layouts."""
        modules = {n: self.model.get_submodule(path) for n, path in self.graph.targets.items()}
        return {n: m for n, m in modules.items() if any(p.requires_grad for p in m.parameters())}

    def trainable_encoders(self) -> list[nn.Module]:
        """The trainable modules that feed the sink."""
        return [m for name, m in self.trainable().items() if name != self.graph.sink]

    @property
    def encoder_module(self) -> nn.Module:
        """The module that feeds the sink, where it is one, with its wrappers."""
        (name,) = (name for name in self.graph.layouts if name != self.graph.sink)
        return self.model.get_submodule(self.graph.targets[name])

    @property
    def scale(self) -> float:
        """What that module's gradients from the sink are multiplied by."""
        (name,) = (name for name in self.graph.layouts if name != self.graph.sink)
        return float(self.graph.scale(name, self.graph.sink))

    @property
    def sink_module(self) -> nn.Module:
        """The module that every other one feeds, with its wrappers."""
        return self.model.get_submodule(self.graph.targets[self.graph.sink])

    def collection(self, name: str) -> ProcessGroupCollection:
        """The process groups of the module ``name``."""
        if self.groups is None:
            raise LayoutError(
                "this program has no Megatron process groups: it was compiled without any"
            )
        return self.groups[name]

    def optimizer(self, config: OptimizerConfig) -> Any:
        """Megatron's MimoOptimizer over the modules, each on its own groups; frozen ones are left
        out."""
        if self.groups is None:
            raise LayoutError("optimizer() needs Megatron process groups: give compile() groups=")
        modules = {n: self.model.get_submodule(path) for n, path in self.graph.targets.items()}
        return megatron.mimo_optimizer(modules, self.groups, config)

    def check_trainable(self, *, forward_only: bool) -> None:
        """Raise LayoutError if ``forward_backward`` cannot train, or nothing would reduce what it
        makes."""
        if not megatron.is_mimo(self.model):
            raise LayoutError(
                f"forward_backward runs Megatron's schedules, {type(self.model).__name__} is no "
                "MimoModel: call program(**batch) and loss.backward()"
            )
        if forward_only:
            return
        if not torch.is_grad_enabled():
            raise LayoutError(
                "forward_backward was called under torch.no_grad(), so there is no backward: leave "
                "no_grad, or write forward_only=True"
            )
        for name, module in self.trainable().items():
            megatron.require_ddp(name, module)

    def check_lengths(self, batches: Batches, seq_length: int | None) -> None:
        """Raise LayoutError where the stages of a pipeline expect hidden states of one shape, and
        microbatches, or ``seq_length``, are of another."""
        sink, layout = self.graph.sink, self.graph.layouts[self.graph.sink]
        if layout.pp == 1 or megatron.has_variable_lengths(self.sink_module):
            return
        tokens, length = batches.tokens, batches.hidden[0]
        odd = next((index for index, count in enumerate(tokens) if count != tokens[0]), None)
        if odd is not None:
            raise LayoutError(
                f"input_ids of microbatch {odd} has {tokens[odd]} tokens, of microbatch 0 "
                f"{tokens[0]}: the stages of {sink} ({layout}) hand on hidden states of one shape. "
                f"Pad them, or set variable_seq_lengths in the config of {sink} and write "
                "schedule='three_phase'."
            )
        if seq_length not in (None, length):
            raise LayoutError(
                f"seq_length is {seq_length}, the hidden states that the stages of {sink} "
                f"({layout}) hand on have {length} tokens. Leave it out."
            )

    def check_heads(self, batches: Batches) -> None:
        """Raise LayoutError for a mask of another number of heads than the sink's: one stage alone
        may find out."""
        heads = megatron.heads_of(self.sink_module)
        for index, batch in enumerate(batches.microbatches):
            for name in sorted(self.graph.masks):
                mask = batch.get(name)
                if mask is not None and heads is not None and mask.shape[1] not in (1, heads):
                    raise LayoutError(
                        f"{name} of microbatch {index} is of {mask.shape[1]} heads, "
                        f"{self.graph.sink} has {heads}: give dim 1 a size of 1 or {heads}"
                    )


def check_way_back(name: str, output: str, value: Any) -> None:
    """Raise LayoutError unless the ``output`` of module ``name``, which has parameters to train,
    requires a gradient."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if not any(leaf.requires_grad for leaf in leaves):
        raise LayoutError(
            f"{name} has parameters to train, and its output {output} requires no grad: they would "
            "get no gradient. A recomputed layer whose input requires no grad loses them: leave it "
            f"out of the recomputation of {name}, or put a layer with parameters before it."
        )

"""Megatron's engine: its schedules, DDP, gradient reductions, optimizer and scratch buffers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from colocc.errors import LayoutError
from colocc.passes.graph import Reduction
from colocc.runtime.accumulate import accumulate
from colocc.runtime.texts import agree_on, device_of_messages

if TYPE_CHECKING:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.process_groups_config import ProcessGroupCollection

    from colocc.runtime.channels import Channel
    from colocc.runtime.groups import ProcessGroups
    from colocc.runtime.megatron.pipeline import Between


def unwrapped(module: nn.Module) -> Any:
    """``module`` without wrappers such as DDP or Float16Module."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return module


def has_variable_lengths(module: nn.Module) -> bool:
    """Whether the stages of ``module`` tell one another the shape of what they hand on."""
    return bool(unwrapped(module).config.variable_seq_lengths)


def heads_of(module: nn.Module) -> int | None:
    """The attention heads of ``module``, None where its config has no such number."""
    config = getattr(unwrapped(module), "config", None)
    return getattr(config, "num_attention_heads", None)


def reduction_of(name: str, module: nn.Module) -> Reduction:
    """How DDP reduces the gradients of ``module``: a sum with per-token loss, else the mean over
    dp.

    Megatron's DDP reads it from the config; torch's DDP always takes the mean.
    """
    for part in module.modules():
        config = getattr(part, "config", None)
        per_token = getattr(config, "calculate_per_token_loss", None)
        if per_token is not None:
            return "sum" if per_token else "mean"
    return "mean"


def weights_in_products(module: nn.Module) -> list[nn.Parameter]:
    """The weights of ``module`` that a token is multiplied with: all but tables of embeddings."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    tables = (nn.Embedding, VocabParallelEmbedding)
    looked_up = {
        id(weight)
        for part in module.modules()
        if isinstance(part, tables)
        for weight in part.parameters(recurse=False)
    }
    return [weight for weight in module.parameters() if id(weight) not in looked_up]


def prepare_buffers() -> None:
    """Give Megatron the scratch buffer that its sequence parallelism takes from parallel_state,
    which only ``initialize_model_parallel`` would otherwise make."""
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def is_ddp(module: nn.Module) -> bool:
    """Whether ``module`` is wrapped in Megatron's DDP."""
    return hasattr(module, "finish_grad_sync") and hasattr(module, "scale_gradients")


def no_sync(module: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, backward adds to the gradients that DDP holds, and reduces none of them."""
    held: contextlib.AbstractContextManager[None] = module.no_sync()
    return held


class Stage(nn.Module):
    """This rank's part of the pipelined module as Megatron's schedules want it.

    It carries a copy of the config, so that the schedule hands its token count to ``collect``
    instead of finalising gradients, while the user's config stays as it is.
    """

    def __init__(self, module: nn.Module, collect: Callable[..., None]) -> None:
        super().__init__()
        self.module = module
        inner = unwrapped(module)
        self.config = copy.copy(inner.config)
        self.config.finalize_model_grads_func = collect
        self.config.grad_sync_func = None
        if self.config.no_sync_func is None and is_ddp(module):
            self.config.no_sync_func = module.no_sync
        self.model_type = inner.model_type
        self.vp_stage = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Give this stage the hidden states of the stage before it."""
        unwrapped(self.module).set_input_tensor(tensor)


def run_schedule(
    stage: Stage,
    forward_step: Callable[..., Any],
    collection: ProcessGroupCollection,
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
    collect_non_loss_data: bool,
    force_all_reduce: bool,
    indices: Iterator[int],
    filled: tuple[Channel, Channel, Between] | None = None,
) -> list[Any]:
    """Return what Megatron's schedule returns: the losses on the last stage, [] elsewhere.

    ``filled`` is the pipeline's way onward, its way back, and what runs between its tasks.
    """
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from colocc.runtime.megatron.pipeline import FilledCommunicator

    common: dict[str, Any] = {
        "forward_step_func": forward_step,
        "data_iterator": indices,
        "model": stage,
        "num_microbatches": num_microbatches,
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
        "forward_only": forward_only,
        "collect_non_loss_data": collect_non_loss_data,
        "pg_collection": collection,
        "force_all_reduce": force_all_reduce,
    }
    if collection.pp.size() == 1:
        result = schedules.forward_backward_no_pipelining(**common)
    else:
        communicator = (
            P2PCommunicator(pp_group=collection.pp, config=stage.config)
            if filled is None
            else FilledCommunicator(collection.pp, stage.config, *filled)
        )
        result = schedules.forward_backward_pipelining_without_interleaving(
            p2p_communicator=communicator, **common
        )
    return list(result)


def global_tokens(tokens: torch.Tensor, collection: ProcessGroupCollection) -> torch.Tensor:
    """The token count of the whole step, on every rank: the last stages hold their replicas'
    counts, each of its tp ranks the same one, of which the first is counted."""
    last = collection.pp.rank() == collection.pp.size() - 1
    counts = last and collection.tp.rank() == 0
    total = tokens.clone() if counts else torch.zeros_like(tokens)
    dist.all_reduce(total)
    return total


def scale_gradients(module: Any, factor: torch.Tensor) -> None:
    """Multiply the gradients that DDP holds by ``factor``."""
    module.scale_gradients(factor)


def start_gathering(module: Any) -> None:
    """Start to gather what ``overlap_param_gather`` has put off until a forward, the groups that a
    forward needs first in front, as Megatron's hooks do."""
    if not is_ddp(module) or not module.ddp_config.overlap_param_gather:
        return
    for groups in (module.bucket_groups, module.expert_parallel_bucket_groups):
        for group in reversed(groups):
            if not group.param_gather_dispatched:
                group.start_param_sync()


def gather_parameters(module: Any) -> None:
    """Have all parameters gathered: a rank may not run the forward that would, or replay it."""
    start_gathering(module)
    if is_ddp(module) and module.ddp_config.overlap_param_gather:
        for group in module.bucket_groups + module.expert_parallel_bucket_groups:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def reductions(module: Any) -> list[Any]:
    """The groups of buckets whose gradients DDP reduces together, as soon as they are complete;
    empty if it reduces none before all are."""
    # Of reductions among instances it keeps no handle, by which to tell that one has started.
    return _overlapped(module, among_instances=False)


def weights_of(group: Any) -> Iterable[nn.Parameter]:
    """The parameters whose gradients are in one of ``reductions``."""
    found: Iterable[nn.Parameter] = group.params
    return found


def _overlapped(module: Any, *, among_instances: bool) -> list[Any]:
    """The groups of buckets that are reduced beside the backward, if that is among several
    instances of the optimizer or not, as asked."""
    if not is_ddp(module) or not module.ddp_config.overlap_grad_reduce:
        return []
    several = module.ddp_config.num_distributed_optimizer_instances > 1
    if several != among_instances:
        return []
    return list(module.bucket_groups + module.expert_parallel_bucket_groups)


def start_reduction(group: Any, *, force_all_reduce: bool) -> None:
    """Start to reduce the gradients of one of ``reductions``, unless that has been done."""
    if group.grad_reduce_handle is None and not group.grad_reduce_finished:
        group.start_grad_sync(force_all_reduce=force_all_reduce)


def start_reductions(module: Any, *, force_all_reduce: bool) -> None:
    """Start what backward would have with ``overlap_grad_reduce``, had it not run in ``no_sync``
    or as a CUDA graph; once in a step."""
    for group in reductions(module):
        start_reduction(group, force_all_reduce=force_all_reduce)
    for group in _overlapped(module, among_instances=True):
        # Until DDP has seen a backward, it waits for none and starts them by itself.
        if not group.is_first_batch and not group.grad_reduce_finished:
            group.start_grad_sync(force_all_reduce=force_all_reduce)


def has_started_reductions(module: Any) -> bool:
    """Whether all is under way that ``start_reductions`` would start."""
    return not _overlapped(module, among_instances=True) and all(
        group.grad_reduce_handle is not None or group.grad_reduce_finished
        for group in reductions(module)
    )


def abandon_reductions(module: Any) -> None:
    """Let go of what a step that failed has started: DDP would take it for the next step's."""
    for group in reductions(module):
        if group.grad_reduce_handle is not None:
            group.grad_reduce_handle.wait()
            group.grad_reduce_handle = None


def finish_gradients(
    module: nn.Module, collection: ProcessGroupCollection, *, force_all_reduce: bool
) -> None:
    """Reduce the gradients of one module over its own groups: dp, tied embeddings, sequence
    parallel."""
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    finalize_model_grads([module], None, collection, force_all_reduce)


def mimo_optimizer(
    modules: Mapping[str, nn.Module], groups: ProcessGroups, config: OptimizerConfig
) -> Any:
    """Megatron's MimoOptimizer over ``modules``: one optimizer each on its own groups, one norm.

    A module that learns on any rank has one on all: they ask one another, as they do for the norm,
    and a stage of a pipeline may be frozen alone. Collective.
    Raises: LayoutError on every rank for such a module that is not wrapped in Megatron's DDP.
    """
    from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
    from megatron.core.optimizer import get_megatron_optimizer

    here = [any(weight.requires_grad for weight in m.parameters()) for m in modules.values()]
    learns = torch.tensor(here, dtype=torch.int, device=device_of_messages())
    dist.all_reduce(learns, dist.ReduceOp.MAX)
    trained = [name for name, anywhere in zip(modules, learns.tolist(), strict=True) if anywhere]
    error = None
    try:
        for name in trained:
            require_ddp(name, modules[name])
    except LayoutError as problem:
        error = problem
    agree_on("the modules that learn", "", error)
    infos = {}
    for name in modules:
        optimizer = None
        if name in trained:
            optimizer = get_megatron_optimizer(
                config=config,
                model_chunks=[modules[name]],
                pg_collection=groups[name],
                use_gloo_process_groups=False,
            )
        infos[name] = ModuleOptimizerInfo(
            optimizer=optimizer, grid=None, pg_collection=groups[name], is_active=True
        )
    return MimoOptimizer(infos, config)


def require_ddp(name: str, module: nn.Module) -> None:
    """Raise LayoutError unless ``module`` is wrapped in Megatron's DDP, which holds the gradients
    of what required one then."""
    if not is_ddp(module):
        raise LayoutError(
            f"{name} has parameters to train and is no Megatron DistributedDataParallel: nothing "
            f"would reduce its gradients. Wrap it: DistributedDataParallel(config, ddp_config, "
            f"module, pg_collection=groups[{name!r}])"
        )
    ddp: Any = module
    for path, weight in module.named_parameters():
        if weight.requires_grad and weight not in ddp.param_to_bucket_group:
            raise LayoutError(
                f"{name}: {path} requires a gradient, and was frozen when {name} was wrapped in "
                "DistributedDataParallel: nothing would reduce its gradient. Wrap the module "
                "again, or freeze it after it is wrapped."
            )


def main_gradient(weight: torch.Tensor) -> torch.Tensor:
    """Where DDP adds up the gradient of a weight to train."""
    held: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
    return held


def add_gradient(weight: Any, *, dry: bool = False) -> None:
    """Do what DDP does with the gradient of ``weight`` once a backward has made it, but reduce;
    ``dry`` as in ``accumulate``."""
    # A fused layer has added it already, and leaves a tensor without meaning.
    if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
        accumulate(weight.main_grad, weight.grad, dry=dry)


def uncapturable(module: nn.Module) -> str | None:
    """Why forward and backward of ``module`` cannot be replayed as CUDA graphs; None if they
    can."""
    learns = any(weight.requires_grad for weight in module.parameters())
    if learns and not is_ddp(module):
        return "its gradients are not held by Megatron's DDP"
    configs: dict[int, Any] = {}
    rates = []
    for part in module.modules():
        # A module asked for what it has not looks in all its tables first, and makes an error.
        config = vars(part).get("config") or getattr(type(part), "config", None)
        configs[id(config)] = config
        if isinstance(part, nn.modules.dropout._DropoutNd):
            rates.append(part.p)
    for config in configs.values():
        if getattr(config, "recompute_granularity", None) is not None:
            return "it recomputes activations, which sets the state of random numbers"
        if getattr(config, "fp8", None):
            return "it scales to fp8 from step to step"
        rates += [getattr(config, f"{name}_dropout", 0.0) for name in ("hidden", "attention")]
    if module.training and any(rates):
        return "it drops out at random"
    return None

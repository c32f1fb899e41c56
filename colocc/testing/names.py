"""Parameters by a name that no layout changes, whole: pipeline stages renumbered, tp slices
joined."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

Groups = Mapping[str, "ProcessGroupCollection"]


def global_names(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its name: without wrappers, layers counted over the whole pipeline,
    experts over all ranks.

    An output layer that shares the word embedding bears the embedding's name.
    """
    layers = {
        name: number - 1
        for name, part in module.named_modules()
        if isinstance(number := getattr(part, "layer_number", None), int)
        and re.search(r"(^|\.)layers\.[0-9]+$", name)
    }
    experts = {
        name: part.ep_group.rank() * part.num_local_experts
        for name, part in module.named_modules()
        if hasattr(part, "local_experts") and hasattr(part, "ep_group")
    }
    for name, weight in module.named_parameters():
        for prefix, first in experts.items():
            if name.startswith(prefix + ".local_experts."):
                number, _, rest = name.removeprefix(prefix + ".local_experts.").partition(".")
                name = f"{prefix}.local_experts.{first + int(number)}.{rest}"
                break
        for prefix, number in layers.items():
            if name.startswith(prefix + "."):
                name = f"{prefix.rpartition('.')[0]}.{number}{name[len(prefix) :]}"
                break
        name = re.sub(r"(^|\.)module(?=\.)", "", name).lstrip(".")
        if getattr(weight, "shared_embedding", False) and name.endswith("output_layer.weight"):
            name = name.removesuffix("output_layer.weight") + "embedding.word_embeddings.weight"
        yield name, weight


def _slice_of(weight: torch.Tensor) -> int | None:
    """The dim that tp splits, None for a weight that every tp rank has whole."""
    if not getattr(weight, "tensor_model_parallel", False):
        return None
    return int(getattr(weight, "partition_dim", 0))


def _tp_of(weight: torch.Tensor, collection: ProcessGroupCollection) -> dist.ProcessGroup:
    """The ranks that share a weight: those of the experts' own tp for an expert's."""
    group: dist.ProcessGroup = (
        collection.tp if getattr(weight, "allreduce", True) else collection.expt_tp
    )
    return group


def seed_parameters(
    module: nn.Module, group: ProcessGroupCollection | None, *, seed: int = 0, scale: float = 0.1
) -> None:
    """Fill each parameter from its global name and whole shape, so that any layout starts alike.

    Norm weights are around one, everything else around zero, with ``scale`` as the deviation.
    """
    with torch.no_grad():
        for name, weight in global_names(module):
            dim, tp = _slice_of(weight), 1 if group is None else _tp_of(weight, group).size()
            shape = list(weight.shape)
            if dim is not None:
                shape[dim] *= tp
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6])
            generator = torch.Generator().manual_seed(key)
            whole = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            if "norm" in name and name.endswith("weight"):
                whole += 1
            if dim is not None and group is not None:
                whole = whole.chunk(tp, dim)[_tp_of(weight, group).rank()]
            weight.copy_(whole)


def _whole(
    modules: Mapping[str, nn.Module],
    groups: Groups,
    value: Callable[[nn.Parameter], torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    cut: dict[tuple[dist.ProcessGroup, torch.dtype], list[tuple[str, int]]] = {}
    for owner, module in modules.items():
        for name, weight in global_names(module):
            part = value(weight)
            if part is None:
                continue
            found[f"{owner}.{name}"] = part.detach().clone()
            dim, tp = _slice_of(weight), _tp_of(weight, groups[owner])
            if dim is not None and tp.size() > 1:
                cut.setdefault((tp, part.dtype), []).append((f"{owner}.{name}", dim))
    for (tp, _), slices in cut.items():
        found |= _joined([(name, dim, found[name]) for name, dim in slices], tp)
    return found


def _joined(
    slices: list[tuple[str, int, torch.Tensor]], tp: dist.ProcessGroup
) -> dict[str, torch.Tensor]:
    """The whole of each (name, the dim that is cut, this rank's part): all in one collective."""
    mine = torch.cat([part.flatten() for _, _, part in slices])
    ranks = [torch.empty_like(mine) for _ in range(tp.size())]
    dist.all_gather(ranks, mine, group=tp)
    sizes = [part.numel() for _, _, part in slices]
    rows = zip(*(rank.split(sizes) for rank in ranks), strict=True)
    return {
        name: torch.cat([row.view(part.shape) for row in parts], dim)
        for (name, dim, part), parts in zip(slices, rows, strict=True)
    }


def gradient_of(weight: nn.Parameter) -> torch.Tensor | None:
    """The gradient that the optimizer will read, None for a parameter without one."""
    if not weight.requires_grad:
        return None
    main: Any = getattr(weight, "main_grad", None)
    return weight.grad if main is None else main


def full_gradients(modules: Mapping[str, nn.Module], groups: Groups) -> dict[str, torch.Tensor]:
    """The whole gradient of each parameter on this stage, by module and global name; collective."""
    return _whole(modules, groups, gradient_of)


def full_weights(modules: Mapping[str, nn.Module], groups: Groups) -> dict[str, torch.Tensor]:
    """The whole of each parameter on this stage, by module and global name; collective."""
    return _whole(modules, groups, lambda weight: weight)

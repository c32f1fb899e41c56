"""What all ranks tell one another as text before they run collectives that depend on it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from colocc.errors import CaptureError, LayoutError
from colocc.runtime.backend import uses_nccl


def agree(what: str, text: str, error: str | None = None) -> None:
    """Return if all ranks bring the same ``text`` and none an ``error``.

    Collective on the default group. Raises: the same LayoutError on every rank, naming the ranks
    that differ from rank 0, or the ranks whose own check failed.
    """
    if not dist.is_initialized():
        if error:
            raise LayoutError(error)
        return
    texts = gather_texts(("E" if error else "T") + (error or text))
    errors = {rank: line[1:] for rank, line in enumerate(texts) if line[0] == "E"}
    if errors:
        groups: dict[str, list[int]] = {}
        for rank, line in errors.items():
            groups.setdefault(line, []).append(rank)
        if len(groups) == 1 and len(errors) == len(texts):
            raise LayoutError(next(iter(groups)))
        raise LayoutError("; ".join(f"{_ranks(who)}: {line}" for line, who in groups.items()))
    other = {rank: line[1:] for rank, line in enumerate(texts) if line != texts[0]}
    if other:
        shown = "; ".join(f"rank {rank} has {line}" for rank, line in list(other.items())[:4])
        raise LayoutError(
            f"the ranks do not agree on {what}: rank 0 has {texts[0][1:]}; {shown}. "
            f"{_ranks(list(other))} must be given what rank 0 is given."
        )


def agree_on(what: str, text: str, error: Exception | None) -> None:
    """Return if all ranks bring the same ``text`` and none an ``error``; collective.

    Raises: ``error`` itself where all ranks have the same, else a LayoutError that names the ranks.
    """
    said = None if error is None else _said(error)
    try:
        agree(what, text, said)
    except LayoutError as problem:
        shared = problem
    else:
        return
    if error is None:
        raise shared
    if said == str(shared):
        raise error
    raise LayoutError(str(shared)) from error


def _said(error: Exception) -> str:
    """What an error says; of some, such as a KeyError, the text alone says nothing."""
    if isinstance(error, (LayoutError, CaptureError, RuntimeError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)


def _ranks(ranks: list[int]) -> str:
    name = "rank" if len(ranks) == 1 else "ranks"
    return f"{name} {', '.join(map(str, ranks))}"


def device_of_messages() -> torch.device:
    """Where a tensor must be for the default group to send it."""
    if uses_nccl():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_texts(text: str) -> list[str]:
    """The texts of all ranks, as bytes: nothing is unpickled."""
    device = device_of_messages()
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    world = dist.get_world_size()
    if dist.get_backend() == "fake":
        return [text] * world
    sizes = torch.zeros(world, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(data)], device=device))
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    everything = torch.zeros(world * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everything, padded)
    rows = everything.view(world, longest).cpu()
    return [
        bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes.tolist(), strict=True)
    ]

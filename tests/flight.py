"""What the ranks of a run recorded of their collectives, compared when the run is over.

Gloo returns wrong numbers where dtypes or shapes differ, without a word. Torch's own check
(TORCH_DISTRIBUTED_DEBUG=DETAIL) has the ranks exchange, before each collective, what they are about
to run: a third of the time of small models. Torch's flight recorder keeps the same of each rank,
and the comparison can wait for the end.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch._C import _distributed_c10d as c10d

# Operations that the ring of a process of the pool keeps (TORCH_FR_BUFFER_SIZE).
BUFFER = 1024


class Collective(NamedTuple):
    """One collective, as all ranks of its group must have it."""

    group: str
    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        tensors = zip(self.dtypes, self.shapes, strict=False)
        shown = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in tensors)
        return f"{self.name}({shown or ', '.join(self.dtypes)})"


class Recorder:
    """The flight recorder of this process, read after each run, and within one that is long."""

    def __init__(self) -> None:
        self.seen = 0
        self.held: list[Collective] = []

    def hold(self) -> None:
        """Read what the ring has, before it is overwritten.

        Raises: RuntimeError if it no longer holds all since the last time.
        """
        start, entries = self.seen, self._new()
        if entries and entries[0]["record_id"] > start:
            raise RuntimeError(
                f"a run has more than {BUFFER} operations: let it call flight.RECORDER.hold()"
            )
        self.held += [_collective(entry) for entry in entries if not entry["is_p2p"]]

    def take(self) -> list[Collective]:
        """The collectives of the run that ends, in the order of their calls."""
        self.hold()
        held, self.held = self.held, []
        return held

    def skip(self) -> list[Collective]:
        """No collectives: those of torch's own check, which records what it exchanges, too."""
        self._new()
        self.held = []
        return []

    def _new(self) -> list[dict[str, Any]]:
        text: bytes = c10d._dump_fr_trace_json(includeCollectives=True, onlyActive=False)  # type: ignore[attr-defined]
        entries = [e for e in json.loads(text).get("entries", []) if e["record_id"] >= self.seen]
        self.seen = entries[-1]["record_id"] + 1 if entries else self.seen
        return entries


RECORDER = Recorder()


def _collective(entry: dict[str, Any]) -> Collective:
    name = entry["profiling_name"]
    # A root alone has what it scatters and gathers; the splits of an all_to_all are a rank's own.
    side = "output" if name.endswith("scatter") else "input"
    shapes = () if "all_to_all" in name else entry[f"{side}_sizes"]
    return Collective(
        entry["process_group"][0],
        name,
        tuple(entry[f"{side}_dtypes"]),
        tuple(tuple(shape) for shape in shapes),
    )


def compare(ranks: Sequence[Sequence[Collective]]) -> None:
    """Return if the ranks of each group have run the same collectives in the same order.

    Groups are told apart by name; a rank that has none of a group's is not one of its members.
    Raises: RuntimeError naming the first mismatch of a group.
    """
    groups: dict[str, dict[int, list[Collective]]] = {}
    for rank, calls in enumerate(ranks):
        for call in calls:
            groups.setdefault(call.group, {}).setdefault(rank, []).append(call)
    for group, members in groups.items():
        first, wanted = next(iter(members.items()))
        for rank, calls in members.items():
            if calls == wanted:
                continue
            pairs = enumerate(zip(wanted, calls, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(calls)))
            one, other = (c[at] if at < len(c) else "nothing" for c in (wanted, calls))
            raise RuntimeError(
                f"collective mismatch in group {group} of ranks {list(members)}: call {at} is "
                f"{one} on rank {first} and {other} on rank {rank}"
            )

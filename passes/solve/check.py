"""Prove one plan: walk every rank's sample units through its steps and look at what arrives.

Nothing of the planner is imported, so a mistake there cannot hide here. What is proved, for the
layouts at hand and every batch whose samples divide by ``plan.units``:

- the slots cut the step's samples: each unit is in one slot, every slot is equally long;
- what the plan says of its reader is what the reader's layout says;
- forward, each reader ends with the samples of its own dp replica, all of them, once, in order, and
  a rank of another stage ends with nothing;
- backward, each source rank ends with the gradient of exactly the samples that it holds, each
  exactly once, taken from a rank that has the gradient (not zero copies, not tp of them), in order:
  the transpose of forward where the gradient of a replicated value is replicated;
- each unit comes from the rank itself or one of its own tp and cp coordinates where it is held, so
  replicas share the load and a rank's gradient starts from its own copy;
- every step changes something, every group is ascending, groups of a step share no rank, and
  nothing is sent outside its group, so every rank issues the same collectives in the same order
  whatever the data.
"""

from __future__ import annotations

from fractions import Fraction

from colocc.errors import VerifyError
from colocc.passes.solve.plan import Holding, Plan, Step

Buffer = list[int]


def check(plan: Plan, *, scale: Fraction | None = None) -> None:
    """Return if ``plan`` is right; ``scale``, if given, is what its gradient must be scaled by.

    Raises: VerifyError naming the first rank that ends with something else, and what.
    """
    try:
        _check_slots(plan)
        _check_reader(plan)
        _check_direction("forward", plan.forward, plan.src, plan.dst)
        _check_direction("backward", plan.backward, plan.dst, plan.src)
        if scale is not None and plan.scale != scale:
            raise VerifyError(f"the gradient is scaled by {plan.scale}, not by {scale}")
    except (VerifyError, IndexError, ValueError) as error:
        raise VerifyError(
            f"plan {plan.src.module} ({plan.src.layout}) -> {plan.dst.module} ({plan.dst.layout}) "
            f"is wrong: {error}. This is a bug in colocc: please report it with the dump."
        ) from error


def _check_slots(plan: Plan) -> None:
    lengths = set()
    seen: Buffer = []
    for slot in plan.src.slots:
        units = _expand(slot)
        lengths.add(len(units))
        seen += units
    if sorted(seen) != list(range(plan.units)):
        raise VerifyError(
            f"the slots hold units {sorted(seen)}, the step has 0 to {plan.units - 1}"
        )
    if len(plan.src.slots) != plan.src.layout.dp or len(lengths) != 1:
        raise VerifyError(f"{plan.src.layout.dp} equal slots wanted, their lengths are {lengths}")


def _check_reader(plan: Plan) -> None:
    for rank, (says, want) in enumerate(zip(_buffers(plan.dst), _wanted(plan), strict=True)):
        if says != want:
            raise VerifyError(f"rank {rank} is said to read units {says}, it needs {want}")
    if len(plan.dst.slots) != plan.dst.layout.dp:
        raise VerifyError(f"{plan.dst.layout.dp} slots read, the plan has {len(plan.dst.slots)}")


def _check_direction(name: str, steps: tuple[Step, ...], start: Holding, end: Holding) -> None:
    buffers = [[(unit, rank) for unit in held] for rank, held in enumerate(_buffers(start))]
    for step in steps:
        _check_groups(step, len(buffers))
        after = run(step, buffers)
        if after == buffers:
            raise VerifyError(f"{name}, a {step.kind} changes nothing")
        buffers = after
    lanes = [start.layout.coordinates(axis).tolist() for axis in ("tp", "cp")]
    for rank, (got, want) in enumerate(zip(buffers, _buffers(end), strict=True)):
        units = [unit for unit, _ in got]
        if units != want:
            raise VerifyError(f"{name}, rank {rank} ends with units {units}, it needs {want}")
        for unit, origin in got:
            if any(lane[origin] != lane[rank] for lane in lanes):
                raise VerifyError(
                    f"{name}, rank {rank} takes unit {unit} from rank {origin}, which has another "
                    f"tp or cp coordinate in {start.layout}"
                )


def _check_groups(step: Step, world: int) -> None:
    members: list[int] = []
    for group in step.groups:
        if list(group) != sorted(set(group)) or not set(group) <= set(range(world)):
            raise VerifyError(f"group {list(group)} is not an ascending set of ranks")
        members += group
    if len(members) != len(set(members)):
        raise VerifyError(f"a rank is in two groups of one {step.kind}: {step.groups}")
    if (step.kind == "narrow") != (not step.groups):
        raise VerifyError(f"{step.kind} over groups {step.groups}")


def run[T](step: Step, buffers: list[list[T]]) -> list[list[T]]:
    """What every rank holds after ``step``, from what every rank held before it."""
    if step.kind == "narrow":
        return [
            [item for start, stop in keeps for item in _cut(buffer, start, stop)]
            for buffer, keeps in zip(buffers, step.keeps, strict=True)
        ]
    after: list[list[T]] = [[] for _ in buffers]
    if step.kind == "all_gather":
        after = [list(buffer) for buffer in buffers]
        for group in step.groups:
            if len({len(buffers[rank]) for rank in group}) != 1:
                raise VerifyError(f"group {list(group)} gathers buffers of different lengths")
            joined = [unit for rank in group for unit in buffers[rank]]
            for rank in group:
                after[rank] = list(joined)
        return after
    group_of = {rank: set(group) for group in step.groups for rank in group}
    for rank, sends in enumerate(step.sends):
        peers = [peer for peer, _, _ in sends]
        if peers != sorted(set(peers)) or not set(peers) <= group_of.get(rank, {rank}):
            raise VerifyError(f"rank {rank} sends to {peers}, its group is {group_of.get(rank)}")
        for peer, start, stop in sends:
            after[peer] += _cut(buffers[rank], start, stop)
    return after


def _cut[T](buffer: list[T], start: int, stop: int) -> list[T]:
    if not 0 <= start < stop <= len(buffer):
        raise VerifyError(f"interval {start}:{stop} of a buffer of {len(buffer)} units")
    return buffer[start:stop]


def _buffers(holding: Holding) -> list[Buffer]:
    layout = holding.layout
    slots = [_expand(slot) for slot in holding.slots]
    dp, pp = layout.coordinates("dp").tolist(), layout.coordinates("pp").tolist()
    return [
        list(slots[slot]) if holding.stages is None or stage in holding.stages else []
        for slot, stage in zip(dp, pp, strict=True)
    ]


def _wanted(plan: Plan) -> list[Buffer]:
    """What each rank of the reader needs, from its layout alone: the samples of its own replica."""
    layout = plan.dst.layout
    size, rest = divmod(plan.units, layout.dp)
    if rest:
        raise VerifyError(f"{plan.units} units do not divide by {plan.dst.module}'s dp{layout.dp}")
    dp, pp = layout.coordinates("dp").tolist(), layout.coordinates("pp").tolist()
    first_only = layout.pp > 1
    return [
        [] if first_only and stage else list(range(slot * size, (slot + 1) * size))
        for slot, stage in zip(dp, pp, strict=True)
    ]


def _expand(intervals: tuple[tuple[int, int], ...]) -> Buffer:
    return [unit for start, stop in intervals for unit in range(start, stop)]

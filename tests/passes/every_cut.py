"""The numbers of portions that tests of plans go through."""

from __future__ import annotations

from collections.abc import Sequence

from colocc.passes.fill import cuts


def every_cut(choices: Sequence[int], stages: int, microbatches: int) -> list[tuple[int, ...]]:
    """Steps in which all microbatches have as many portions, and all with more at the ends."""
    alike = [(count,) * microbatches for count in choices]
    most = max(choices)
    return alike + [cut for count in choices for cut in cuts(count, most, stages, microbatches)]

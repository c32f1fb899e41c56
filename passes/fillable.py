"""Whether encoder work may run inside the language pipeline's bubbles, and on which stage.

The ranks of one stage idle together, those of two stages do not. So a collective among the ranks of
an encoder's slot may lie in a bubble exactly if all of them are on one stage of the reader.
"""

from __future__ import annotations

from colocc.errors import LayoutError
from colocc.layout import Layout


def slots_by_stage(
    encoder: tuple[str, Layout], sink: tuple[str, Layout]
) -> tuple[tuple[int, ...], ...]:
    """For each stage of ``sink``, the dp coordinates of ``encoder`` whose ranks are all on it.

    Raises: LayoutError naming the first group of ranks that is on several stages.
    """
    (name, layout), (reader, language) = encoder, sink
    stage_of = language.coordinates("pp").tolist()
    slot_of = layout.coordinates("dp").tolist()
    found: list[list[int]] = [[] for _ in range(language.pp)]
    for group in layout.groups("tp", "cp"):
        stages = sorted({stage_of[rank] for rank in group})
        if len(stages) > 1:
            fits = layout.size // language.pp
            raise LayoutError(
                f"schedule 'filled' runs {name} in the bubbles of {reader}, which come at another "
                f"time on each stage: the ranks {list(group)}, one tp and cp group of {name} "
                f"({layout}), are on the stages {stages} of {reader} ({language}), so their "
                f"collectives would wait for each other. Write schedule='three_phase', or a layout "
                f"for {name} whose groups lie inside the {fits} ranks of a stage."
            )
        found[stages[0]].append(slot_of[group[0]])
    return tuple(tuple(sorted(slots)) for slots in found)

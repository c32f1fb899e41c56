"""How many rows an item makes, where all items of a step make equally many: placeholders / items.

A sample whose placeholders do not fit is named. What an item makes is taken from an earlier step
with items of the same shape, if there was one; else from this step, which then may name the wrong
one of two that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from colocc.errors import LayoutError
from colocc.runtime.rows import Ids


def rows_each(
    name: str, counts: Sequence[Ids], numbers: Sequence[int], known: int | None, inputs: str
) -> int:
    """The rows of each item of module ``name``; 0 where there are no items.

    ``counts`` are the placeholders of each sample, ``numbers`` the items, by microbatch; ``known``
    is what an item of this shape makes. ``inputs`` is what the user calls what holds the items.
    Raises: LayoutError for placeholders and items that do not match.
    """
    total, items = sum(int(count.sum()) for count in counts), sum(numbers)
    if items == 0 and total == 0:
        return 0
    if items == 0 or total == 0:
        raise _unpaired(name, counts, numbers, inputs)
    each = known or (total // items if total % items == 0 else _usual(counts))
    for index, (count, number) in enumerate(zip(counts, numbers, strict=True)):
        odd = np.flatnonzero(count % each)
        if len(odd) or int(count.sum()) != each * number:
            text = f"{name}: the step has {total} placeholders in input_ids for {items} items, "
            if known:
                text += f"an item of this shape makes {each} rows"
            elif total % items:
                text += f"{total} / {items} is not whole: most samples with any have {each}"
            else:
                text += f"{each} each"
            raise LayoutError(text + _wrong(name, index, count, number, odd))
    return each


def _usual(counts: Sequence[Ids]) -> int:
    """What most samples with placeholders have of them."""
    found = np.concatenate(counts)
    return int(np.bincount(found[found > 0]).argmax())


def _wrong(name: str, index: int, count: Ids, number: int, odd: Ids) -> str:
    if len(odd):
        text = f", but sample {odd[0]} of microbatch {index} has {count[odd[0]]}"
    else:
        text = (
            f", but microbatch {index} has {int(count.sum())} placeholders for {number} items: one "
            "is without the other"
        )
    shown = ", ".join(map(str, count[:8].tolist())) + ("..." if len(count) > 8 else "")
    return (
        f"{text} (samples of microbatch {index} have {shown}). Make them match; if items make "
        f"different numbers of rows, say how many: compile(..., rows={{{name!r}: function of one "
        "microbatch's inputs})"
    )


def _unpaired(name: str, counts: Sequence[Ids], numbers: Sequence[int], inputs: str) -> LayoutError:
    if sum(numbers):
        index = next(i for i, number in enumerate(numbers) if number)
        return LayoutError(
            f"{name}: the step has {sum(numbers)} items and no placeholder in input_ids: each item "
            f"needs as many as it makes rows, such as the {numbers[index]} of microbatch {index}. "
            "Leave the items out, or put placeholders in."
        )
    index = next(i for i, count in enumerate(counts) if count.any())
    sample = int(np.flatnonzero(counts[index])[0])
    return LayoutError(
        f"{name}: sample {sample} of microbatch {index} has {counts[index][sample]} placeholders "
        f"in input_ids, and the step has no items. Give {inputs}, or leave the placeholders "
        "out."
    )

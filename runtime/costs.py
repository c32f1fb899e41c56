"""What the tasks of a step take, as a plan reckons: by the weights and the products of modules.

The unit is one weight times one token, of which an H200 does some 250e12 a second in 16 bits. The
constants are those of the benchmark's 2.0B + 1.3B on two of them. Played with an encoder that takes
10 % more or less than is foreseen, its plans lose less than 1 %.
"""

from __future__ import annotations

from typing import NamedTuple

from colocc.passes.timeline import Costs

# A matrix product and the kernels around it take 14 us on the GPU, however few tokens there are,
# and 55 us of the host that launches them.
PRODUCT, LAUNCHED_PRODUCT = 3.4e9, 13.6e9
# A module that the host launches kernel by kernel takes longer than as a CUDA graph.
LAUNCHED = 1.2


class Work(NamedTuple):
    """The weights that a token is multiplied with, and how many matrices they are in."""

    weights: float
    products: float


def costs_of(
    stages: list[Work],
    encoder: Work,
    *,
    tokens: int,
    rows: float,
    captured: bool,
    learns: bool,
) -> Costs:
    """The costs of a microbatch of so many ``tokens`` of text on one rank, and ``rows`` if one
    stage encodes all of it. ``captured``: the encoder runs as CUDA graphs; ``learns``: it has a
    backward."""
    found = [LAUNCHED * work.weights * tokens + work.products * PRODUCT for work in stages]
    forward, back = max(1.0, *found), 2.0 if learns else 0.0
    encode = (1.0 if captured else LAUNCHED) * encoder.weights * rows
    portion = encoder.products * (PRODUCT if captured else LAUNCHED_PRODUCT)
    loads = tuple(stage / forward for stage in found)
    return Costs(forward, 2 * forward, encode, back * encode, portion, back * portion, loads)

"""Covers flight.py: which collectives of several ranks match."""

from typing import Any

import pytest

from tests.flight import Collective, _collective, compare


def call(group: str, shape: int, dtype: str = "Float", name: str = "gloo:all_reduce") -> Collective:
    return Collective(group, name, (dtype,), ((shape,),))


GOOD = [
    [call("0", 2), call("1", 3), call("0", 2)],
    [call("0", 2), call("2", 5), call("0", 2)],
    [call("1", 3), call("0", 2), call("0", 2)],
]


def test_ranks_of_a_group_agree_in_the_order_of_that_group() -> None:
    compare(GOOD)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ([call("0", 2), call("0", 2, "Double")], r"group 0 .* call 1 .*Float\[2\]\) on rank 0"),
        ([call("0", 3), call("0", 2)], r"call 0 .*Float\[3\]\) on rank 1"),
        (
            [call("0", 2)],
            r"call 1 is gloo:all_reduce\(Float\[2\]\) on rank 0 and nothing on rank 1",
        ),
        ([call("0", 2)] * 3, "call 2 is nothing on rank 0"),
        ([call("0", 2, name="gloo:broadcast"), call("0", 2)], "call 0 .*broadcast"),
    ],
)
def test_the_first_call_that_differs_is_named(bad: list[Collective], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        compare([GOOD[0], bad, GOOD[2]])


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("gloo:all_gather", ((4,),)),
        ("gloo:gather", ((4,),)),
        ("gloo:scatter", ((2, 4),)),
        ("gloo:all_to_all", ()),
    ],
)
def test_what_a_rank_may_have_alone_is_left_out(name: str, shapes: Any) -> None:
    entry = {
        "process_group": ["3", "undefined"],
        "profiling_name": name,
        "input_dtypes": ["Float"],
        "input_sizes": [[4]],
        "output_dtypes": ["Float"],
        "output_sizes": [[2, 4]],
    }
    assert _collective(entry) == Collective("3", name, ("Float",), shapes)

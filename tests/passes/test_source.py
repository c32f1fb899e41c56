"""Covers passes/source.py: the user's line, not torch's nor colocc's."""

from __future__ import annotations

import traceback

import torch
from torch import nn

from colocc.passes.source import line_here, line_in, line_of, short, user_line

HERE = "passes/test_source.py"


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(7)


def test_the_line_that_runs() -> None:
    line = line_here()
    assert line.startswith(f"{HERE}:") and line.endswith(" line = line_here()")


def test_the_line_that_raised_is_the_users_though_torch_called_it() -> None:
    try:
        Fails()(torch.zeros(2))
    except RuntimeError as error:
        found = line_of(error)
    assert found.startswith(f"at {HERE}:") and found.endswith(" return x.view(7)")
    assert line_of(ValueError("never raised")) == "at a line that is not known"


def test_torchs_own_frames_are_no_ones() -> None:
    frame = traceback.FrameSummary(torch.__file__, 3, "forward", line="x")
    assert user_line(traceback.StackSummary.from_list([frame])) == ""


def test_the_last_line_of_a_recorded_stack_that_is_the_users() -> None:
    number = test_the_line_that_runs.__code__.co_firstlineno + 1
    stack = (
        f'  File "{__file__}", line {number}, in forward\n    anything\n'
        f'  File "{torch.__file__}", line 1, in call\n    more\n'
    )
    assert line_in(stack) == f"{HERE}:{number} line = line_here()"
    assert line_in(None) == ""


def test_two_parts_of_a_path_are_shown() -> None:
    assert short("/some/where/passes/file.py") == "passes/file.py"

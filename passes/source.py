"""The user's lines: which line of the model made a node, or was refused."""

from __future__ import annotations

import linecache
import os
import traceback

import torch

_LIBRARIES = tuple(os.path.dirname(os.path.realpath(path)) for path in (torch.__file__, __file__))


def user_line(frames: traceback.StackSummary) -> str:
    """``file.py:31 code`` of the innermost frame that is neither torch's nor colocc's; "" if there
    is none."""
    for frame in reversed(frames):
        path = os.path.realpath(frame.filename)
        if not path.startswith(_LIBRARIES) and not path.startswith("<"):
            return f"{short(path)}:{frame.lineno} {frame.line}"
    return ""


def line_here() -> str:
    """The user's line that is running now."""
    return user_line(traceback.extract_stack())


def line_of(error: BaseException) -> str:
    """The user's line that raised ``error``."""
    found = user_line(traceback.extract_tb(error.__traceback__))
    return f"at {found}" if found else "at a line that is not known"


def line_in(stack_trace: str | None) -> str:
    """The last line of a stack recorded by torch.fx that is the user's."""
    found = ""
    lines = (stack_trace or "").splitlines()
    for line in lines:
        words = line.strip().split(", ")
        if len(words) < 2 or not words[0].startswith('File "'):
            continue
        path, number = words[0][6:-1], words[1].removeprefix("line ")
        if not os.path.realpath(path).startswith(_LIBRARIES):
            code = linecache.getline(path, int(number)).strip()
            found = f"{short(path)}:{number} {code}"
    return found


def short(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(path.split(os.sep)[-2:])

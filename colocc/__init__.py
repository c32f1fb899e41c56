"""colocc: each module of a multimodal model on its own parallel layout, on the same GPUs."""

from colocc.compile import compile
from colocc.errors import CaptureError, LayoutError, VerifyError
from colocc.layout import Layout
from colocc.passes.capture import leaf
from colocc.passes.rows import Items, Rows
from colocc.program import Program
from colocc.runtime.groups import ProcessGroups, process_groups
from colocc.sampler import Loader, Sampler, Wanted

__all__ = [
    "CaptureError",
    "Items",
    "Layout",
    "LayoutError",
    "Loader",
    "ProcessGroups",
    "Program",
    "Rows",
    "Sampler",
    "VerifyError",
    "Wanted",
    "compile",
    "leaf",
    "process_groups",
]

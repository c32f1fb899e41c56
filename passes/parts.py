"""Values that a forward takes apart sample by sample, or item by item, and joins again.

``list(features)`` and ``torch.split(features, counts)`` make one tensor per sample. How many that
is differs from rank to rank, so the pieces are no values of a graph. Joined again in their order
they are the whole, and that is: ``cat`` of the list is a flatten, ``cat`` of the split is the value
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import sympy
import torch

from colocc.errors import CaptureError

if TYPE_CHECKING:
    from colocc.passes.record import Recorder


@dataclass(frozen=True)
class Piece:
    """Piece ``index`` of ``count`` of ``whole``, taken along ``dim``."""

    whole: torch.Tensor
    kind: Literal["unbind", "split"]
    dim: int
    index: int
    count: int


class Pieces:
    """The pieces that a forward holds, and the numbers that it read from tensors of counts."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[torch.Tensor, Piece]] = {}
        self._counts: dict[int, tuple[Any, Piece]] = {}

    def add(self, tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
        self._pieces[id(tensor)] = (tensor, piece)
        return tensor

    def of(self, value: Any) -> Piece | None:
        found = self._pieces.get(id(value))
        return found[1] if found is not None else None

    def add_count(self, number: Any, piece: Piece) -> Any:
        """``number`` is the value of ``piece``, one of a tensor of counts."""
        self._counts[id(number)] = (number, piece)
        return number

    def are_counts(self, values: Any) -> bool:
        """Whether ``values`` are all the counts of one tensor, in order."""
        if not isinstance(values, (list, tuple)):
            return False
        found = [self._counts.get(id(value)) for value in values]
        return _complete([piece[1] if piece is not None else None for piece in found]) is not None

    def whole_of(self, values: Any) -> Piece | None:
        """The first piece, if ``values`` are all pieces of one value in order; else None."""
        if not isinstance(values, Sequence) or not values:
            return None
        return _complete([self.of(value) for value in values])


def _complete(pieces: list[Piece | None]) -> Piece | None:
    """The first piece, if these are all pieces of one value in order."""
    first = pieces[0] if pieces else None
    if first is None or len(pieces) != first.count:
        return None
    for index, piece in enumerate(pieces):
        if piece is None or piece.whole is not first.whole or piece.index != index:
            return None
    return first


def _argument(args: Any, kwargs: Any, index: int, name: str, default: Any) -> Any:
    if len(args) > index:
        return args[index]
    return kwargs.get(name, kwargs.get("axis", default) if name == "dim" else default)


def _unbind(recorder: Recorder, args: Any, kwargs: Any) -> Any:
    dim = _argument(args, kwargs, 1, "dim", 0)
    return _apart(recorder, args[0], "unbind", dim, None)


def _split(recorder: Recorder, args: Any, kwargs: Any) -> Any:
    how = (
        args[1]
        if len(args) > 1
        else next(v for k, v in kwargs.items() if k.startswith("split_size"))
    )
    dim = _argument(args, kwargs, 2, "dim", 0)
    if not recorder.pieces.are_counts(how):
        return NotImplemented
    return _apart(recorder, args[0], "split", dim, len(how))


def _apart(recorder: Recorder, whole: torch.Tensor, kind: Any, dim: int, count: int | None) -> Any:
    """The pieces of a value along the dim that holds its samples, or items."""
    sizes = recorder.sizes
    dim %= whole.dim()
    length = sizes.expr(whole.shape[dim])
    growing = sizes.growing(length)
    if not growing:
        return NotImplemented
    count = count or sizes.at(whole.shape[dim])
    shape: list[Any] = list(whole.shape)
    if kind == "unbind":
        del shape[dim]
    else:
        shape[dim] = sizes.symbolic(sympy.cancel(length / growing[0]))
    with recorder.inside():
        made = [torch.empty(shape, dtype=whole.dtype, device=whole.device) for _ in range(count)]
    return tuple(
        recorder.pieces.add(tensor, Piece(whole, kind, dim, index, count))
        for index, tensor in enumerate(made)
    )


def _cat(recorder: Recorder, args: Any, kwargs: Any) -> Any:
    piece = recorder.pieces.whole_of(args[0] if args else kwargs.get("tensors"))
    dim = _argument(args, kwargs, 1, "dim", 0)
    if piece is None or dim != piece.dim:
        return NotImplemented
    if piece.kind == "split":
        return piece.whole
    if dim or piece.whole.dim() < 2:
        return NotImplemented
    with recorder:
        return piece.whole.flatten(0, 1)


def _stack(recorder: Recorder, args: Any, kwargs: Any) -> Any:
    piece = recorder.pieces.whole_of(args[0] if args else kwargs.get("tensors"))
    dim = _argument(args, kwargs, 1, "dim", 0)
    if piece is None or piece.kind != "unbind" or dim != piece.dim:
        return NotImplemented
    return piece.whole


def _squeeze(recorder: Recorder, args: Any, kwargs: Any) -> Any:
    """Squeeze the dims that are 1 in the example: a rank may see one sample, and keeps its dim."""
    value = args[0] if args else kwargs["input"]
    dims = _argument(args, kwargs, 1, "dim", tuple(range(value.dim())))
    kept = []
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        length = recorder.sizes.expr(value.shape[dim])
        if length == 1:
            kept.append(dim)
        elif not recorder.sizes.growing(length):
            recorder.branched(sympy.Eq(length, 1), False)
    with recorder.inside():
        made = value.squeeze(tuple(kept))
    recorder.node("call_method", "squeeze", (recorder.operand(value), tuple(kept)), {}, made)
    return made


def _item(recorder: Recorder, args: Any, kwargs: Any) -> Any:
    """A count of one sample, as a number that nothing is known of."""
    piece = recorder.pieces.of(args[0])
    if piece is None or piece.whole.dim() != 1:
        return NotImplemented
    number = recorder.sizes.environment.create_unbacked_symint()
    return recorder.pieces.add_count(number, piece)


def _len(recorder: Recorder, args: Any, kwargs: Any) -> Any:
    (value,) = args
    sizes = recorder.sizes
    growing = sizes.growing(sizes.expr(value.shape[0])) if value.dim() else []
    if growing:
        raise NoPlainNumber(str(recorder.refused_count(growing[0], sizes.at(value.shape[0]))))
    return NotImplemented


class NoPlainNumber(CaptureError, TypeError):
    """The number of samples as a plain number; ``list(tensor)`` asks for it, and can do without."""


WHOLE: dict[str, Callable[[Recorder, Any, Any], Any]] = {
    "unbind": _unbind,
    "split": _split,
    "cat": _cat,
    "concat": _cat,
    "stack": _stack,
    "squeeze": _squeeze,
    "item": _item,
    "__len__": _len,
}
"""By name of the torch function: what it makes of a value in pieces, or NotImplemented."""

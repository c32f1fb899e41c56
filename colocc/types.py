"""The type of a value: dtype, global shape, which axes shard which dim, on which layout, on which
stages.

bf16[8@dp,576,4096]       a batch of 8 split over the dp axis of the value's layout
bf16[8*576@dp,4096]       8 samples of 576 rows each, in one dim, split over dp by sample
bf16[8@dp,576@tp@cp,4096] a sequence of 576, split over cp and within it over tp
?[B@dp,...]               nothing but the batch is known before the first batch has been seen
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from colocc.errors import LayoutError
from colocc.layout import AXES, Layout
from colocc.sequence import axes_of, check_length

DTYPES = {
    "float64": "f64",
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
    "complex64": "c64",
    "complex128": "c128",
}
ITEMSIZE = {
    "f64": 8,
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "u8": 1,
    "bool": 1,
    "c64": 8,
    "c128": 16,
}
UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Dim:
    """One dim of a global shape: ``samples * rows`` long, split over ``axes`` (fastest first).

    ``samples`` is 1 for a dim that holds no samples. A batch dim of unknown length has ``samples``
    0. Of a dim that holds both, dp splits the samples, and other axes the rows of each sample.
    """

    samples: int = 1
    rows: int = 1
    axes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.samples * self.rows

    def __str__(self) -> str:
        if self.samples == 0:
            size = "B" if self.rows == 1 else f"B*{self.rows}"
        elif "dp" in self.axes and self.rows > 1:
            size = f"{self.samples}*{self.rows}"
        else:
            size = str(self.size)
        return size + "".join(f"@{axis}" for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Type:
    """The type of one tensor on ``layout``, which stands under ``module`` in the user's layouts.

    ``dims`` is the global shape. When ``open`` is true only the batch dim is known, and it stands
    alone in ``dims``. ``stages`` are the pipeline stages that hold the value, None for all of them.
    ``batch`` is the dim that holds the samples, None for a value that is the same for all of them.
    ``sequence`` is the dim that holds the sequence, None where that is not known; it may be the
    batch dim.
    """

    dtype: str
    dims: tuple[Dim, ...]
    module: str
    layout: Layout
    batch: int | None = 0
    open: bool = False
    stages: tuple[int, ...] | None = None
    sequence: int | None = None

    def __str__(self) -> str:
        dims = [str(dim) for dim in self.dims] + ["..."] * self.open
        return f"{self.dtype}[{','.join(dims)}]"

    def local(self) -> str:
        """The shape that one rank holds, as printed in the dump; unknown lengths stay letters."""
        sizes = []
        for dim in self.dims:
            split = 1
            for axis in dim.axes:
                split *= self.layout.sizes[axis]
            if dim.samples == 0:
                sizes.append("B" + (f"/{split}" if split > 1 else ""))
            else:
                sizes.append(str(dim.size // split))
        return f"[{','.join(sizes + ['...'] * self.open)}]"

    def on(self, module: str, layout: Layout, stages: tuple[int, ...] | None = None) -> Type:
        """This value as ``module`` reads it: the same global tensor on another layout, which may
        cut its sequence otherwise.

        Raises: LayoutError if the layout cannot cut the sequence.
        """
        moved = replace(self, module=module, layout=layout, stages=stages)
        if self.sequence is None:
            return moved
        return moved.cut(self.sequence, f"what {module} reads of {self.module}")

    def cut(self, sequence: int, what: str) -> Type:
        """This value with its sequence in dim ``sequence``, cut as its layout says.

        Raises: LayoutError, which begins with ``what``, if there is no such dim, or the layout
        cannot cut it.
        """
        known = replace(self, sequence=sequence)
        if self.open and sequence >= len(self.dims):
            return known
        if sequence >= len(self.dims):
            raise LayoutError(
                f"{what}: {self} on {self.module} ({self.layout}) has no dim {sequence}, which is "
                f"to hold the sequence. Give sequence_dims a dim below {len(self.dims)}."
            )
        dim, axes = self.dims[sequence], axes_of(self.layout)
        check_length(f"{what}, on {self.module} ({self.layout}),", dim.rows, self.layout)
        if sequence == self.batch:
            axes += ("dp",)
        dims = (*self.dims[:sequence], replace(dim, axes=axes), *self.dims[sequence + 1 :])
        return replace(known, dims=dims)

    def bytes_per_sample(self) -> int | None:
        """Bytes of one sample of the global tensor, None while the shape is not known."""
        if self.open or self.batch is None or self.dtype == UNKNOWN:
            return None
        count = ITEMSIZE[self.dtype]
        for index, dim in enumerate(self.dims):
            count *= dim.rows if index == self.batch else dim.size
        return count

    @classmethod
    def parse(cls, text: str, module: str, layout: Layout) -> Type:
        """The inverse of ``str``. Raises LayoutError for text that is not a type."""
        found = re.fullmatch(r"(\?|[a-z]+[0-9]*)\[([0-9B*@a-z,.]*)\]", text)
        if not found or found[1] not in {UNKNOWN, *ITEMSIZE}:
            raise LayoutError(f"{text!r} is not a type; write it like bf16[8@dp,576,4096]")
        words = found[2].split(",") if found[2] else []
        is_open = bool(words) and words[-1] == "..."
        dims = tuple(_parse_dim(word, text) for word in words[: len(words) - is_open])
        sharded = [index for index, dim in enumerate(dims) if "dp" in dim.axes]
        cut = [index for index, dim in enumerate(dims) if {"tp", "cp"} & set(dim.axes)]
        return cls(
            found[1],
            dims,
            module,
            layout,
            sharded[0] if sharded else None,
            is_open,
            sequence=cut[0] if cut else None,
        )


def _parse_dim(word: str, text: str) -> Dim:
    found = re.fullmatch(r"(?:(B|[0-9]{1,18})(?:\*([0-9]{1,18}))?)((?:@[a-z]+)*)", word)
    axes = tuple(found[3].split("@")[1:]) if found else ()
    if not found or any(axis not in AXES for axis in axes):
        raise LayoutError(f"{word!r} in {text!r} is not a dim; write a size, 8@dp or 8*576@dp")
    if "dp" not in axes and found[1] != "B" and not found[2]:
        return Dim(1, int(found[1]), axes)
    return Dim(0 if found[1] == "B" else int(found[1]), int(found[2] or 1), axes)

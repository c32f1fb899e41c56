"""The rank grid of one module, and its arithmetic.

With axis sizes n_a in order, fastest first, the stride of an axis is the product of the earlier sizes,
and the coordinate of rank r on axis a is ``floor(r / stride_a) mod n_a``:

    tp2 dp2 pp2    rank  0 1 2 3 4 5 6 7
                   tp    0 1 0 1 0 1 0 1    r%2
                   dp    0 0 1 1 0 0 1 1    r//2%2
                   pp    0 0 0 0 1 1 1 1    r//4
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from colocc.errors import LayoutError

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("tp", "cp", "ep", "dp", "pp")
DENSE_AXES = ("tp", "cp", "dp", "pp")
PRINT_ORDER = ("tp", "cp", "pp", "dp", "ep")
DEFAULT_ORDER = "tp-cp-ep-dp-pp"
MAX_RANKS = 1 << 24
RANK = sympy.Symbol("r", integer=True, nonnegative=True)

Grid = tuple[tuple[str, int], ...]
"""Axes and their sizes, fastest first."""


@dataclass(frozen=True)
class Layout:
    """The rank grid of one module: axis sizes, and their order, fastest first, in Megatron's notation.

    ``ep`` is Megatron's expert view, another factorisation of the same ranks (expert tp is tp), and
    no extra factor of ``size``. An order may leave out axes of size one.

    Raises: LayoutError for a size below one, a malformed order, or an ep that does not divide cp*dp.

    >>> layout = Layout(tp=2, pp=2, dp=2)
    >>> str(layout), layout.size, closed_form(layout.coordinate("pp"))
    ('tp2 pp2 dp2', 8, 'r//4')
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    order: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise LayoutError(f"{axis} is {size!r}: the size of an axis is an integer of at least 1")
        if self.size > MAX_RANKS:
            raise LayoutError(f"a layout of {self.size} ranks is over the limit of {MAX_RANKS}")
        _check_order(self.order, {axis: getattr(self, axis) for axis in AXES})
        if (self.cp * self.dp) % self.ep:
            raise LayoutError(
                f"ep{self.ep} must divide cp*dp: {self.cp}*{self.dp} % {self.ep} = "
                f"{self.cp * self.dp % self.ep}. Expert tp is tp{self.tp}, so experts share cp and dp."
            )

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of tp, cp, dp and pp, fastest axis first."""
        return dict(self._grid())

    def _grid(self) -> Grid:
        return tuple((axis, getattr(self, axis)) for axis in self._axes() if axis != "ep")

    def _expert_grid(self) -> Grid:
        """Megatron's expert view: tp, ep and the dp that is left, in the same order."""
        sizes = {"tp": self.tp, "ep": self.ep, "dp": self.cp * self.dp // self.ep, "pp": self.pp}
        names = {"tp": "expt_tp", "dp": "expt_dp"}
        return tuple((names.get(a, a), sizes[a]) for a in self._axes() if a in sizes)

    def _axes(self) -> list[str]:
        named = self.order.split("-")
        return named + [axis for axis in AXES if axis not in named]

    def stride(self, axis: str) -> int:
        """The distance in ranks between neighbours on ``axis``."""
        return _stride(self._grid(), axis)

    def coordinate(self, axis: str) -> sympy.Expr:
        """The coordinate on ``axis`` as an expression in the rank ``RANK``."""
        return _coordinate(self._grid(), axis)

    def coordinates(self, axis: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The coordinate on ``axis`` of every rank; read-only."""
        return _coordinates(self._grid(), axis)

    def rank(self, **coordinates: Any) -> Any:
        """The rank at ``coordinates``, integers or arrays that broadcast; missing axes are 0."""
        result: Any = 0
        for axis, value in coordinates.items():
            result = result + value * self.stride(axis)
        return result

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """The sets of ranks that differ on ``axes`` alone, each ascending, by their first rank."""
        return _groups(self._grid(), axes)

    def expert_groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """As ``groups``, in the expert view: axes among expt_tp, ep, expt_dp and pp."""
        return _groups(self._expert_grid(), axes)

    def same_grid(self, other: Layout) -> bool:
        """Whether all ranks have the same coordinates on all axes, however the orders are written."""
        return _essence(self._grid()) == _essence(other._grid()) and (
            _essence(self._expert_grid()) == _essence(other._expert_grid())
        )

    def __str__(self) -> str:
        shown = [a for a in PRINT_ORDER if getattr(self, a) > 1 or a in ("tp", "dp")]
        text = " ".join(f"{axis}{getattr(self, axis)}" for axis in shown)
        default = replace(self, order=DEFAULT_ORDER)
        return text if self.same_grid(default) else f"{text} order={self.order}"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The inverse of ``str``; commas may stand for spaces: ``tp2,pp2,dp2``.

        Raises: LayoutError naming the word that is not an axis with its size, or is there twice.
        """
        sizes: dict[str, int] = {}
        order = DEFAULT_ORDER
        for word in text[:1000].replace(",", " ").split():
            if word.startswith("order=") and order == DEFAULT_ORDER:
                order = word.removeprefix("order=")
                continue
            found = re.fullmatch(r"(tp|cp|ep|dp|pp)([0-9]{1,8})", word)
            if not found or found[1] in sizes:
                problem = "stands twice" if found else "is no axis with a size"
                raise LayoutError(
                    f"layout {text[:100]!r}: {word[:40]!r} {problem}. Write it like tp2,pp2,dp2, with "
                    f"axes among {', '.join(AXES)}, and order=tp-cp-pp-dp if it is not {DEFAULT_ORDER}"
                )
            sizes[found[1]] = int(found[2])
        if not sizes:
            raise LayoutError(f"layout {text[:100]!r} names no axis. Write it like tp2,pp2,dp2")
        return cls(**sizes, order=order)

    @classmethod
    def from_grid(cls, grid: HyperCommGrid) -> Layout:
        """The layout of Megatron's ``grid``. Raises LayoutError for other axes or a rank offset."""
        if grid.rank_offset:
            raise LayoutError(
                f"the grid starts at rank {grid.rank_offset}: colocated modules are on all ranks, from 0"
            )
        return cls._from_axes(dict(zip(grid.dim_names, grid.shape, strict=True)))

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> Layout:
        """The layout of torch's ``mesh``, whose dims are named tp, cp, dp or pp, the last the fastest.

        Raises: LayoutError for other names, or a mesh that does not count its ranks up from 0.
        """
        names = mesh.mesh_dim_names or ()
        if not names or mesh.mesh.flatten().tolist() != list(range(mesh.mesh.numel())):
            raise LayoutError(
                "the mesh needs named dims and ranks that count up from 0, like "
                f"init_device_mesh(device, (2, 4), mesh_dim_names=('dp', 'tp')); its names are {names}"
            )
        sizes = dict(zip(names, mesh.mesh.shape, strict=True))
        return cls._from_axes(dict(reversed(sizes.items())))

    @classmethod
    def _from_axes(cls, sizes: Mapping[str, int]) -> Layout:
        unknown = [axis for axis in sizes if axis not in DENSE_AXES]
        if unknown:
            raise LayoutError(f"axis {unknown[0]!r} is none of {', '.join(DENSE_AXES)}")
        return cls(**{axis: int(size) for axis, size in sizes.items()}, order="-".join(sizes))

    @classmethod
    def from_parallel_state(cls) -> Layout:
        """The layout that Megatron's ``parallel_state`` was initialised with.

        Its order is not recorded there, so it is found by comparing groups.
        Raises: LayoutError if parallel_state is not initialised or no order gives its groups.
        """
        from megatron.core import parallel_state as mpu
        from torch.distributed import get_process_group_ranks, get_rank

        if not mpu.is_initialized():
            raise LayoutError("parallel_state is not initialised: call initialize_model_parallel first")
        sizes = {
            "tp": mpu.get_tensor_model_parallel_world_size(),
            "cp": mpu.get_context_parallel_world_size(),
            "dp": mpu.get_data_parallel_world_size(),
            "pp": mpu.get_pipeline_model_parallel_world_size(),
            "ep": mpu.get_expert_model_parallel_world_size(),
        }
        actual = {
            "tp": mpu.get_tensor_model_parallel_group(),
            "cp": mpu.get_context_parallel_group(),
            "dp": mpu.get_data_parallel_group(),
            "pp": mpu.get_pipeline_model_parallel_group(),
        }
        for axes in (DEFAULT_ORDER.split("-"), *permutations(AXES)):
            layout = cls(**sizes, order="-".join(axes))
            if all(
                tuple(get_process_group_ranks(group))
                == next(g for g in layout.groups(axis) if get_rank() in g)
                for axis, group in actual.items()
            ):
                return layout
        raise LayoutError(f"no order of {sizes} gives the groups of parallel_state")


def closed_form(expr: sympy.Expr, name: str = "r") -> str:
    """``expr``, a coordinate in ``RANK``, as the dump prints it: ``r//2%2``, with ``name`` for r."""
    if isinstance(expr, sympy.Mod):
        return f"{closed_form(expr.args[0], name)}%{expr.args[1]}"
    if isinstance(expr, sympy.floor):
        return f"{name}//{RANK / expr.args[0]}"
    return name if expr == RANK else str(expr)


def _check_order(order: Any, sizes: Mapping[str, int]) -> None:
    example = f"Write it like {DEFAULT_ORDER}"
    if not isinstance(order, str):
        raise LayoutError(f"order {order!r} is no text. {example}")
    named = order.split("-")
    for axis in named:
        if axis not in AXES:
            raise LayoutError(f"order {order[:100]!r} names {axis[:40]!r}, which is no axis. {example}")
        if named.count(axis) > 1:
            raise LayoutError(f"order {order[:100]!r} names {axis} twice. {example}")
    for axis, size in sizes.items():
        if size > 1 and axis not in named:
            raise LayoutError(f"order {order!r} leaves out {axis}, whose size is {size}. {example}")


def _essence(grid: Grid) -> Grid:
    return tuple((axis, size) for axis, size in grid if size > 1)


def _stride(grid: Grid, axis: str) -> int:
    names = [name for name, _ in grid]
    if axis not in names:
        raise LayoutError(f"{axis!r} is no axis of this grid, which has {', '.join(names)}")
    return prod(size for _, size in grid[: names.index(axis)])


@lru_cache(maxsize=1024)
def _coordinate(grid: Grid, axis: str) -> sympy.Expr:
    stride, size = _stride(grid, axis), dict(grid)[axis]
    if size == 1:
        return sympy.Integer(0)
    expr = RANK if stride == 1 else sympy.floor(RANK / stride)
    slowest = stride * size == prod(n for _, n in grid)
    return expr if slowest else sympy.Mod(expr, size, evaluate=False)


@lru_cache(maxsize=1024)
def _coordinates(grid: Grid, axis: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    ranks = np.arange(prod(size for _, size in grid))
    values = sympy.lambdify(RANK, _coordinate(grid, axis), "numpy")(ranks)
    result = np.broadcast_to(np.asarray(values), ranks.shape).astype(np.int64)
    result.flags.writeable = False
    return result


@lru_cache(maxsize=1024)
def _groups(grid: Grid, axes: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    wanted = tuple(axes)
    leader = np.arange(prod(size for _, size in grid))
    for axis in wanted:
        leader = leader - _coordinates(grid, axis) * _stride(grid, axis)
    members: dict[int, list[int]] = {}
    for rank, first in enumerate(leader.tolist()):
        members.setdefault(first, []).append(rank)
    return tuple(tuple(group) for _, group in sorted(members.items()))

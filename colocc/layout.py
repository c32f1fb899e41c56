"""The rank grid of one module, and its arithmetic.

With sizes n_a in order, fastest first, the stride s_a of an axis is the product of the sizes before
it, and rank r has the coordinate ``floor(r / s_a) mod n_a``: a sympy expression per axis.

    layout = Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp")
    closed_form(layout.coordinate("pp"))    r//2%2
    layout.coordinates("pp")                [0 0 1 1 0 0 1 1]
    layout.groups("pp")                     ((0, 2), (1, 3), (4, 6), (5, 7))

``ep`` is no factor of the product: experts see the ranks tp * cp * dp as tp * ep * expt_dp.

``sp`` and ``zigzag`` say how the sequence of the module's values is cut (sequence.py); they move no
rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from colocc.errors import LayoutError
from colocc.ranks import (
    Grid,
    Groups,
    Ranks,
    coordinate_of,
    evaluated,
    group_of,
    groups_of,
    stride_of,
    trimmed,
)

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("tp", "cp", "ep", "dp", "pp")
DENSE = ("tp", "cp", "pp", "dp")
EXPERT = {"tp": "expt_tp", "ep": "ep", "dp": "expt_dp", "pp": "pp"}
DEFAULT_ORDER = "tp-cp-ep-dp-pp"
FLAGS = ("sp", "zigzag")
LIMIT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The rank grid of one module: axis sizes, and their order, fastest first.

    ``sp``: the sequence is cut over tp, too, as Megatron's sequence parallelism does. ``zigzag``:
    each cp rank holds two chunks of it, from either end, which balances causal attention.

    Raises: LayoutError for a size that is no positive int, an ``ep`` that does not divide cp * dp,
    and a malformed order. An order may leave out axes of size 1; they are appended.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    order: str = DEFAULT_ORDER
    sp: bool = False
    zigzag: bool = False
    _dense: Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for axis in AXES:
            object.__setattr__(self, axis, _size(axis, getattr(self, axis)))
        if self.size > LIMIT:
            product = " * ".join(f"{axis}{getattr(self, axis)}" for axis in DENSE)
            raise LayoutError(f"{product} = {self.size} ranks; a layout has at most {LIMIT}.")
        object.__setattr__(self, "order", _order(self.order, {a: getattr(self, a) for a in AXES}))
        dense = tuple((axis, getattr(self, axis)) for axis in self.order.split("-") if axis != "ep")
        object.__setattr__(self, "_dense", dense)
        self._check_experts()
        for flag in FLAGS:
            if not isinstance(getattr(self, flag), bool):
                raise LayoutError(f"{flag}={getattr(self, flag)!r} is neither True nor False.")

    def _check_experts(self) -> None:
        if (self.cp * self.dp) % self.ep:
            fits = [n for n in range(1, self.cp * self.dp + 1) if self.cp * self.dp % n == 0]
            raise LayoutError(
                f"ep{self.ep} does not divide cp{self.cp} * dp{self.dp} = {self.cp * self.dp} "
                f"ranks (expt_dp = cp * dp / ep). Write {_choice('ep', fits)}."
            )
        if self.ep > 1 and self._torn:
            dense, expert = stride_of(self._dense, "pp"), stride_of(self._expert, "pp")
            raise LayoutError(
                f"order {self.order!r} with ep{self.ep}: stages lie {dense} ranks apart, experts' "
                f"stages {expert}.\nPut pp last, as in {DEFAULT_ORDER}."
            )

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dense axis, fastest first."""
        return dict(self._dense)

    @property
    def _expert(self) -> Grid:
        sizes = {"tp": self.tp, "ep": self.ep, "dp": self.cp * self.dp // self.ep, "pp": self.pp}
        return tuple((EXPERT[a], sizes[a]) for a in self.order.split("-") if a in EXPERT)

    @property
    def _torn(self) -> bool:
        """Whether Megatron's expert view would tear the pipelines; ep1 then keeps the dense one."""
        return self.pp > 1 and stride_of(self._dense, "pp") != stride_of(self._expert, "pp")

    def stride(self, axis: str) -> int:
        """How many ranks apart neighbours on ``axis`` are."""
        return stride_of(self._dense, _known(axis, DENSE))

    def coordinate(self, axis: str) -> sympy.Expr:
        """The coordinate of rank ``RANK`` on ``axis`` as an expression, simplified."""
        return coordinate_of(self.stride(axis), self.sizes[axis], self.size)

    def coordinates(self, axis: str) -> Ranks:
        """The coordinate of every rank on ``axis``.

        Shapes: [size], int64, read-only.
        """
        return _coordinates(self, axis)

    def rank(self, **coords: int | Ranks) -> int | Ranks:
        """The rank at these coordinates, 0 on axes left out; arrays broadcast."""
        grid = self._dense
        sizes = dict(grid)
        total: int | Ranks = 0
        for axis, value in coords.items():
            size = sizes[_known(axis, DENSE)]
            if np.any(np.asarray(value) < 0) or np.any(np.asarray(value) >= size):
                raise LayoutError(f"{axis} = {value} is outside 0..{size - 1} of {self}.")
            total = total + value * stride_of(grid, axis)
        return total

    def groups(self, *axes: str) -> Groups:
        """The groups of ranks that differ on ``axes`` only, each ascending, by first rank."""
        return groups_of(self._dense, tuple(_known(axis, DENSE) for axis in axes))

    def expert_groups(self, *axes: str) -> Groups:
        """As ``groups`` for the experts' axes: expt_tp, ep, expt_dp, pp."""
        names = tuple(_known(axis, tuple(EXPERT.values())) for axis in axes)
        if self._torn:
            dense = {"expt_tp": ("tp",), "ep": (), "expt_dp": ("cp", "dp"), "pp": ("pp",)}
            return groups_of(self._dense, tuple(axis for name in names for axis in dense[name]))
        return groups_of(self._expert, names)

    def same_grid(self, other: Layout) -> bool:
        """Whether all ranks have the same coordinates in both layouts, the experts' included."""
        if trimmed(self._dense) != trimmed(other._dense) or self._torn != other._torn:
            return False
        return self._torn or trimmed(self._expert) == trimmed(other._expert)

    def __str__(self) -> str:
        words = [
            f"{axis}{getattr(self, axis)}"
            for axis in (*DENSE, "ep")
            if getattr(self, axis) > 1 or axis in ("tp", "dp")
        ]
        if not self.same_grid(replace(self, order=DEFAULT_ORDER)):
            order = self.order
            while getattr(self, order[-2:]) == 1 and self.same_grid(
                replace(self, order=order[:-3])
            ):
                order = order[:-3]
            words.append(f"order={order}")
        return " ".join(words + [flag for flag in FLAGS if getattr(self, flag)])

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The inverse of ``str``: ``tp2 pp2 dp2``, also ``tp2,pp2,dp2``, ``order=tp-cp-pp-dp``, and
        ``sp`` and ``zigzag``.

        Raises: LayoutError that shows the offending word.
        """
        if len(text) > 200:
            raise LayoutError(f"{text[:40]!a}... has {len(text)} characters; write at most 200.")
        sizes: dict[str, Any] = {}
        order: str | None = None
        flags: set[str] = set()
        for word in text.replace(",", " ").split():
            if word.startswith("order="):
                if order is not None:
                    raise LayoutError(f"{text!a} gives the order twice; leave out {word!a}.")
                order = word.removeprefix("order=")
                continue
            if word in flags:
                raise LayoutError(f"{text!a} says {word!a} twice; leave one out.")
            if word in FLAGS:
                flags.add(word)
                continue
            axis, size = _word(word, text)
            if axis in sizes:
                raise LayoutError(f"{word!a} in {text!a} gives {axis} twice; leave one out.")
            sizes[axis] = size
        if not sizes:
            raise LayoutError(f"{text!a} names no axis; write it like 'tp2 pp2 dp2'.")
        given = dict.fromkeys(flags, True)
        return cls(**sizes, **given, order=DEFAULT_ORDER if order is None else order)

    @classmethod
    def from_grid(cls, grid: HyperCommGrid) -> Layout:
        """The layout of a Megatron grid; ep comes from its view ``expert``, where it has one."""
        if grid.rank_offset:
            raise LayoutError(
                f"the grid starts at rank {grid.rank_offset}; colocated modules share all ranks: "
                "write rank_offset=0."
            )
        base = list(zip(grid.dim_names, map(int, grid.shape), strict=True))
        sizes = _named(base, f"HyperCommGrid(dim_names={grid.dim_names})")
        if sizes.get("ep", 1) > 1:
            raise LayoutError(
                f"the grid has ep{sizes['ep']} beside its dense axes; register it as "
                "grid.register_view('expert', ...) with expt_tp, ep, expt_dp, pp."
            )
        view = grid._views.get("expert")
        if view is None:
            return cls(**sizes, order="-".join(name for name, _ in base))
        expert = tuple(zip(view.dim_names, map(int, view.shape), strict=True))
        dense = tuple((axis, size) for axis, size in base if axis != "ep")
        sizes["ep"] = dict(expert).get("ep", 1)
        return _search(
            sizes,
            lambda it: (
                trimmed(it._dense) == trimmed(dense) and trimmed(it._expert) == trimmed(expert)
            ),
            f"HyperCommGrid with dims {dict(dense)} and expert view {dict(expert)}",
        )

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> Layout:
        """The layout of a DeviceMesh whose mesh_dim_names are axes."""
        if mesh.mesh_dim_names is None:
            raise LayoutError(f"{mesh} has no mesh_dim_names; name its dims, e.g. ('dp', 'tp').")
        names, ranks = mesh.mesh_dim_names, mesh.mesh.cpu().numpy()
        what = f"DeviceMesh(mesh_dim_names={names})"
        sizes = _named(list(zip(names, ranks.shape, strict=True)), what)
        index: dict[str, Ranks] = dict(zip(names, np.indices(ranks.shape), strict=True))
        index.pop("ep", None)

        def counts(layout: Layout) -> bool:
            return layout.ep == 1 and bool(np.all(layout.rank(**index) == ranks))

        return _search(sizes, counts, f"{what} of ranks {ranks.tolist()}")

    @classmethod
    def from_parallel_state(cls) -> Layout:
        """The layout that megatron.core.parallel_state was initialised with.

        Raises: LayoutError if it is not initialised, or has groups that no layout has.
        """
        import torch.distributed as dist
        from megatron.core import parallel_state as mpu

        if not mpu.model_parallel_is_initialized():
            raise LayoutError(
                "megatron.core.parallel_state is not initialised; call initialize_model_parallel "
                "first, or write the layout."
            )
        dense = {
            "tp": mpu.get_tensor_model_parallel_group(),
            "cp": mpu.get_context_parallel_group(),
            "pp": mpu.get_pipeline_model_parallel_group(),
            "dp": mpu.get_data_parallel_group(with_gtp_remat=False),
        }
        expert = {
            "expt_tp": mpu.get_expert_tensor_parallel_group(),
            "ep": mpu.get_expert_model_parallel_group(),
            "expt_dp": mpu.get_expert_data_parallel_group(with_gtp_remat=False),
        }
        ranks = {
            name: tuple(sorted(dist.get_process_group_ranks(group)))
            for name, group in (dense | expert).items()
        }
        own = dist.get_rank()

        def has(layout: Layout) -> bool:
            return layout.size == dist.get_world_size() and all(
                group_of(own, layout._dense if name in dense else layout._expert, name) == members
                for name, members in ranks.items()
            )

        sizes = {axis: len(ranks[axis]) for axis in (*dense, "ep")}
        return _search(sizes, has, f"megatron.core.parallel_state with the groups {ranks}")


@lru_cache(maxsize=8192)
def _coordinates(layout: Layout, axis: str) -> Ranks:
    return evaluated(layout.coordinate(axis), layout.size)


def _search(sizes: dict[str, Any], fits: Callable[[Layout], bool], what: str) -> Layout:
    """The first layout of these sizes, the default order first, that ``fits``."""
    usual = tuple(DEFAULT_ORDER.split("-"))
    for order in (usual, *itertools.permutations(AXES)):
        try:
            layout = Layout(**sizes, order="-".join(order))
        except LayoutError:
            if order == usual:
                raise
            continue
        if fits(layout):
            return layout
    raise LayoutError(
        f"{what} is no layout: no order of {'-'.join(AXES)} counts its ranks from 0 as a grid. "
        f"Write one, such as Layout(tp=2, dp=4, order={DEFAULT_ORDER!r}), and let colocc build it."
    )


def _size(axis: str, value: object) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 < value <= LIMIT:
        return int(value)
    shown = str(value) if isinstance(value, int) and -LIMIT <= value <= LIMIT else repr(value)[:40]
    raise LayoutError(f"{axis} = {shown}; write a positive int up to {LIMIT}, such as {axis}=2.")


def _order(order: object, sizes: dict[str, int]) -> str:
    """``order`` with the axes appended that it leaves out."""
    if not isinstance(order, str):
        raise LayoutError(f"order is {order!r}; write axis names, such as {DEFAULT_ORDER!r}.")
    names = order.split("-")
    shown = ascii(order[:60])
    for name in names:
        if name not in AXES:
            raise LayoutError(
                f"order {shown} names {name[:20]!a}, which is no axis; "
                f"write the axes fastest first, such as {DEFAULT_ORDER!r}."
            )
        if names.count(name) > 1:
            fixed = "-".join(dict.fromkeys(n for n in names if n in AXES))
            raise LayoutError(f"order {shown} names {name} twice; write {fixed!r}.")
    rest = [axis for axis in AXES if axis not in names]
    full = "-".join([*names, *rest])
    for axis in rest:
        if sizes[axis] > 1:
            raise LayoutError(
                f"order {shown} leaves out {axis}, and {axis} = {sizes[axis]}; write it where its "
                f"ranks belong, such as {full!r}."
            )
    return full


def _word(word: str, text: str) -> tuple[str, int]:
    axis = word.rstrip("0123456789")
    digits = word[len(axis) :]
    where = f"{word[:40]!a} in {text!a}"
    if axis not in AXES:
        raise LayoutError(f"{where} names no axis; write {', '.join(AXES)} with a size: tp2.")
    if not digits or digits[0] == "0":
        raise LayoutError(f"{where} gives {axis} no positive size; write it like {axis}2.")
    if len(digits) > len(str(LIMIT)):
        raise LayoutError(f"{where} gives {axis} {len(digits)} digits; sizes go up to {LIMIT}.")
    return axis, int(digits)


def _named(dims: list[tuple[str, int]], what: str) -> dict[str, Any]:
    for name, _ in dims:
        if name not in AXES:
            raise LayoutError(f"{what} has a dim {name!r}; name its dims {', '.join(AXES)}.")
    return dict(dims)


def _known(axis: str, axes: tuple[str, ...]) -> str:
    if axis not in axes:
        raise LayoutError(f"{axis!r} is not an axis here; write one of {', '.join(axes)}.")
    return axis


def _choice(axis: str, sizes: list[int]) -> str:
    """``ep1, ep2 or ep4``, the largest ones where there are many."""
    words = [f"{axis}{size}" for size in sizes[-6:]]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

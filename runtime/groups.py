"""Process groups for the layouts: opened once, in one order on all ranks, shared where equal.

Before the first group is opened, all ranks compare the text of what they were given (``agree``), so
a rank with another layout is named in under a second instead of hanging all of them.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch.distributed as dist

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.runtime.backend import uses_nccl
from colocc.runtime.lone import open_lone
from colocc.runtime.megatron import prepare_buffers
from colocc.runtime.texts import agree_on, gather_texts

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed.device_mesh import DeviceMesh

    type AnyLayout = Layout | HyperCommGrid | DeviceMesh

DEFAULT_TIMEOUT = timedelta(minutes=10)
Members = tuple[int, ...]
Message = Literal[
    "pipeline",
    "pipeline back",
    "embeddings up",
    "embeddings down",
    "gradients up",
    "gradients down",
]
"""A use whose groups carry messages alone."""
Use = Literal["shared", "host", "agreement"] | Message
Key = tuple[Use, Members]
MESSAGE_BLOCKS = 4


# The fields of a ProcessGroupCollection, and the axes that each group varies over.
DENSE_FIELDS = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"),
    "dp_cp": ("dp", "cp"),
    "intra_dp_cp": ("dp", "cp"),
    "dp_cp_gtp_remat": ("dp", "cp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}
EXPERT_FIELDS = {
    "ep": ("ep",),
    "expt_tp": ("expt_tp",),
    "tp_ep": ("expt_tp", "ep"),
    "tp_ep_pp": ("expt_tp", "ep", "pp"),
    "tp_ep_pp_with_egtp_remat": ("expt_tp", "ep", "pp"),
    "expt_dp": ("expt_dp",),
    "intra_expt_dp": ("expt_dp",),
    "expt_dp_gtp_remat": ("expt_dp",),
}


@dataclass
class _Registry:
    """The open groups of one default group, with how many users each has."""

    groups: dict[Key, dist.ProcessGroup] = field(default_factory=dict)
    users: dict[Key, int] = field(default_factory=dict)
    adopted: set[Key] = field(default_factory=set)


# A rank may be a thread with a default group of its own, so that is the key; it is weak, so that
# what was open goes with its world.
_registries: weakref.WeakKeyDictionary[dist.ProcessGroup, _Registry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _registry() -> _Registry:
    world = _default()
    with _lock:
        return _registries.setdefault(world, _Registry())


def _default() -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world is None:
        raise LayoutError("torch.distributed is not initialised: call init_process_group first")
    return world


def open_groups(
    member_lists: Iterable[Members], *, timeout: timedelta = DEFAULT_TIMEOUT, use: Use = "shared"
) -> dict[Members, dist.ProcessGroup]:
    """Return this rank's groups among ``member_lists``; equal members share one group.

    Collective: every rank calls it with the same lists in the same order. Members ascend. A group
    of one rank opens no communicator, and a group of all ranks is the default group. A group for
    messages runs no collectives: its ranks send unequally often, which torch's own check of
    collectives (TORCH_DISTRIBUTED_DEBUG=DETAIL) counts as ranks out of step.
    """
    registry, rank, world = _registry(), dist.get_rank(), dist.get_world_size()
    mine: dict[Members, dist.ProcessGroup] = {}
    opened = False
    for members in dict.fromkeys(member_lists):
        key: Key = ("shared" if len(members) == 1 else use, members)
        if key not in registry.users:
            opened = opened or len(members) > 1
            group = _open(key, rank, world, timeout)
            registry.users[key] = 0
            if group is not None:
                registry.groups[key] = group
        registry.users[key] += 1
        if rank in members:
            mine[members] = registry.groups[key] if key in registry.groups else _default()
    if opened:
        # A gloo group is open to a rank while its peers still connect: were it closed now, they
        # would fail.
        gather_texts("opened")
    return mine


def _open(key: Key, rank: int, world: int, timeout: timedelta) -> dist.ProcessGroup | None:
    use, members = key
    if len(members) == 1 and world > 1:
        return open_lone(timeout) if rank in members else None
    if len(members) == world and use == "shared":
        return None  # the default group: the registry must not hold its own key
    # new_group is collective over the whole world, members or not.
    backend = "gloo" if use in ("host", "agreement") else None
    options = _messages(timeout) if use in get_args(Message) and uses_nccl() else None
    group = dist.new_group(list(members), timeout=timeout, backend=backend, pg_options=options)
    return group if rank in members else None


def _messages(timeout: timedelta) -> dist.ProcessGroupNCCL.Options:
    """NCCL's options for a group of messages between two ranks.

    Each block of a communicator holds buffers, and a message that waits holds its blocks: a few
    blocks fill a link with whole hidden states. Their stream goes before what computes.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    options.config.min_ctas, options.config.max_ctas = 1, MESSAGE_BLOCKS
    return options


def close_groups(
    member_lists: Iterable[Members],
    *,
    use: Use = "shared",
    world: weakref.ref[dist.ProcessGroup] | None = None,
) -> None:
    """Give back what ``open_groups`` returned; a group closes with its last user.

    ``world`` is the default group under which they were opened: if it is gone, so are they.
    """
    if world is not None and (world() is None or world() is not dist.group.WORLD):
        return
    registry = _registry()
    for members in dict.fromkeys(member_lists):
        key: Key = ("shared" if len(members) == 1 else use, members)
        registry.users[key] -= 1
        if registry.users[key]:
            continue
        del registry.users[key]
        group = registry.groups.pop(key, None)
        if group is None or key in registry.adopted:
            continue
        dist.destroy_process_group(group)


class ProcessGroups(Mapping[str, "ProcessGroupCollection"]):
    """One Megatron ProcessGroupCollection per module; release with ``destroy()`` or ``with``."""

    def __init__(self, layouts: Mapping[str, Layout], timeout: timedelta) -> None:
        self.layouts = dict(layouts)
        self.timeout = timeout
        self._world = weakref.ref(_default())
        shared: list[Members] = []
        pipelines: list[Members] = []
        for name, layout in self.layouts.items():
            for title, groups in _fields(name, layout).items():
                (pipelines if title == "pp" else shared).extend(groups)
        self._members = tuple(dict.fromkeys(shared))
        self._pipelines = tuple(dict.fromkeys(pipelines))
        self._open = open_groups(self._members, timeout=timeout)
        self._stages = open_groups(self._pipelines, timeout=timeout, use="pipeline")
        self._collections = {name: self._collect(name) for name in self.layouts}
        prepare_buffers()

    def _collect(self, name: str) -> ProcessGroupCollection:
        from megatron.core.process_groups_config import ProcessGroupCollection

        rank, collection = dist.get_rank(), ProcessGroupCollection()
        for title, groups in _fields(name, self.layouts[name]).items():
            members = next((group for group in groups if rank in group), None)
            opened = self._stages if title == "pp" else self._open
            # Megatron reads None as "not in this group".
            setattr(collection, title, None if members is None else opened[members])
        for title in ("hcp", "gtp_remat", "expt_gtp_remat", "inter_dist_opt"):
            setattr(collection, title, None)
        return collection

    def __getitem__(self, name: str) -> ProcessGroupCollection:
        return self._collections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._collections)

    def __len__(self) -> int:
        return len(self._collections)

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The open group of exactly these ranks. Raises: LayoutError if none is open here."""
        members = tuple(sorted(ranks))
        if members not in self._open:
            raise LayoutError(
                f"no group of ranks {list(members)} is open on rank {dist.get_rank()}"
            )
        return self._open[members]

    def communicators(self) -> int:
        """How many communicators of its own this rank may open: groups of several ranks, not
        all."""
        world = dist.get_world_size()
        shared = sum(1 for members in self._open if 1 < len(members) < world)
        return shared + sum(1 for members in self._stages if len(members) > 1)

    def destroy(self) -> None:
        """Give the groups back; those that no other ProcessGroups uses are destroyed."""
        close_groups(self._members, world=self._world)
        close_groups(self._pipelines, use="pipeline", world=self._world)
        self._members, self._pipelines = (), ()
        self._open, self._stages, self._collections = {}, {}, {}

    def __enter__(self) -> ProcessGroups:
        return self

    def __exit__(self, *exc: object) -> None:
        self.destroy()


def _fields(name: str, layout: Layout) -> dict[str, tuple[Members, ...]]:
    """All groups of one module's layout, by the field of the collection that they go to."""
    fields = {title: layout.groups(*axes) for title, axes in DENSE_FIELDS.items()}
    fields |= {title: layout.expert_groups(*axes) for title, axes in EXPERT_FIELDS.items()}
    if layout.pp > 1 or name == "language":
        # A pipeline ascends with its pp coordinate, so its ends are the first and the last stage.
        pipelines = layout.groups("pp")
        fields["embd"] = tuple(tuple(sorted({ranks[0], ranks[-1]})) for ranks in pipelines)
        fields["pos_embd"] = tuple((ranks[0],) for ranks in pipelines)
    else:
        # Not None: Megatron would look for the embedding group of parallel_state instead.
        fields["embd"] = fields["pos_embd"] = tuple((rank,) for rank in range(layout.size))
    return fields


def process_groups(
    layouts: Mapping[str, AnyLayout], *, timeout: timedelta = DEFAULT_TIMEOUT
) -> ProcessGroups:
    """Return Megatron's process groups for each module's layout.

    A HyperCommGrid or DeviceMesh may stand for a Layout: the groups that it has are used, and so
    are those of Megatron's ``parallel_state``. ``timeout`` is that of the groups which are opened.
    Collective on the default group.

    Raises: LayoutError, the same on every rank, if the ranks were given different layouts or the
    world is not the product of a layout's axes.
    """
    plain: dict[str, Layout] = {}
    found: list[dist.ProcessGroup] = []
    error = None
    try:
        plain = {name: as_layout(name, layout) for name, layout in layouts.items()}
        check_world(plain, dist.get_world_size() if dist.is_initialized() else None)
        found = _groups_at_hand(layouts.values())
    except Exception as problem:  # noqa: BLE001 - agreed on, then raised on every rank
        error = problem
    agree_on("the layouts", layouts_text(plain), error)
    _adopt(found)
    return ProcessGroups(plain, timeout)


def layouts_text(layouts: Mapping[str, Layout]) -> str:
    """``layouts`` as one line."""
    return ", ".join(f"{name} {layout}" for name, layout in layouts.items())


def as_layout(name: str, layout: Any) -> Layout:
    """``layout``, a Layout, HyperCommGrid or DeviceMesh, as a Layout."""
    if isinstance(layout, Layout):
        return layout
    if hasattr(layout, "dim_names") and hasattr(layout, "rank_offset"):
        return Layout.from_grid(layout)
    if hasattr(layout, "mesh_dim_names"):
        return Layout.from_mesh(layout)
    raise LayoutError(
        f"{name} is laid out by {layout!r}: give a colocc.Layout, such as Layout(tp=2, dp=4), "
        "a HyperCommGrid or a DeviceMesh"
    )


def check_world(layouts: Mapping[str, Layout], world: int | None) -> int:
    """The number of ranks. Raises: LayoutError unless it is the product of every layout's axes."""
    if not layouts:
        raise LayoutError(
            "no layouts: give one for each module, such as {'language': Layout(tp=2)}"
        )
    first = next(iter(layouts))
    for name, layout in layouts.items():
        product = "*".join(str(size) for size in layout.sizes.values())
        if world is not None and layout.size != world:
            raise LayoutError(
                f"{name} ({layout}) has {product} = {layout.size} ranks, the world has {world}. "
                f"Start {layout.size} ranks, or change an axis so that the product is {world}."
            )
        if layout.size != layouts[first].size:
            raise LayoutError(
                f"{name} ({layout}) has {product} = {layout.size} ranks, {first} "
                f"({layouts[first]}) has {layouts[first].size}: all modules are on the same ranks."
            )
    return layouts[first].size


def _groups_at_hand(sources: Iterable[Any]) -> list[dist.ProcessGroup]:
    """The groups that the user's grids, meshes and parallel_state already have."""
    found: list[dist.ProcessGroup] = []
    for source in sources:
        if hasattr(source, "rank_offset"):
            found += list(source._pgs.values())
        elif hasattr(source, "mesh_dim_names"):
            found += [source.get_group(axis) for axis in source.mesh_dim_names]
    if "megatron.core.parallel_state" in sys.modules:
        found += _parallel_state_groups()
    return [group for group in found if group is not dist.group.WORLD]


def _adopt(found: Iterable[dist.ProcessGroup]) -> None:
    """Register groups that colocc did not open; let go those of an earlier call that are gone."""
    registry = _registry()
    # A rank may hold a group that another rank does not, so what is adopted is agreed on.
    mine: dict[Members, dist.ProcessGroup] = {}
    for group in found:
        mine.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    everyone: set[Key] = {("shared", members) for members in _union(mine)}
    for key in registry.adopted - everyone:
        if registry.users[key] == 1:
            del registry.users[key]
            registry.groups.pop(key, None)
            registry.adopted.discard(key)
    for key in everyone:
        if key in registry.users and key not in registry.adopted:
            continue
        if key[1] in mine:
            registry.groups[key] = mine[key[1]]
        registry.adopted.add(key)
        registry.users.setdefault(key, 1)


def _parallel_state_groups() -> list[dist.ProcessGroup]:
    from megatron.core import parallel_state as mpu
    from megatron.core.process_groups_config import ProcessGroupCollection

    if not mpu.is_initialized():
        return []
    names = ("tp", "pp", "mp", "cp", "tp_cp", "dp", "dp_cp", "tp_dp_cp", "ep", "expt_dp", "embd")
    collection = ProcessGroupCollection.use_mpu_process_groups(list(names))
    groups = [getattr(collection, name) for name in names]
    return [group for group in groups if isinstance(group, dist.ProcessGroup)]


def _union(mine: Mapping[Members, dist.ProcessGroup]) -> list[Members]:
    """The member lists that any rank has and of which every member has a group."""
    text = ";".join(",".join(map(str, members)) for members in mine)
    per_rank = [
        {tuple(map(int, part.split(","))) for part in line.split(";") if part}
        for line in gather_texts(text + ";")
    ]
    everyone = sorted(set().union(*per_rank))
    return [m for m in everyone if all(m in per_rank[rank] for rank in m)]

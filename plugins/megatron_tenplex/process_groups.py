"""Put torch's process groups aside and take them up again: the only module that touches c10d's registry.

``destroy_process_group`` and forming groups anew cost communicators (seconds over NCCL) and threads. A set
of groups that will be used again is therefore kept whole, with its entries of the registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

_TABLES = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_to_tag", "tags_to_pg")


@dataclass
class GroupSet:
    """A default group and all groups made under it, not registered while they are put aside."""

    default: Any
    tables: dict[str, dict[Any, Any]]
    attachment: Any = None  # what a framework keeps about these groups


def _world() -> Any:
    return dist.distributed_c10d._world


def present() -> list[Any]:
    """All registered groups of this rank, in the order of their creation."""
    return list(_world().pg_map)


def put_aside() -> GroupSet:
    """Unregister all groups without destroying them; torch is then as before ``init_process_group``."""
    world = _world()
    kept = GroupSet(world.default_pg, {name: dict(getattr(world, name)) for name in _TABLES})
    for name in kept.tables["pg_names"].values():
        dist.distributed_c10d._unregister_process_group(name)
    for table in _TABLES:
        getattr(world, table).clear()
    dist.distributed_c10d._update_default_pg(None)
    return kept


def take_up(kept: GroupSet) -> None:
    """Register groups that were put aside; there must be no others."""
    if dist.is_initialized():
        raise RuntimeError("another default group is in use; put it aside first")
    world = _world()
    for name, entries in kept.tables.items():
        getattr(world, name).update(entries)
    for group, name in kept.tables["pg_names"].items():
        dist.distributed_c10d._register_process_group(name, group)
    dist.distributed_c10d._update_default_pg(kept.default)


def destroy(kept: GroupSet) -> None:
    """Destroy groups that were put aside. None may be in use."""
    take_up(kept)
    dist.destroy_process_group()


def number_groups_from(first: int) -> None:
    """Names of further groups, which count up, start here: they must be the same on all ranks of a group."""
    _world().group_count = first

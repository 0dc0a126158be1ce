"""Write replicas of the training state to the memory of hosts, and start again from them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_tenplex.errors import ReplicaCorruptError, UncoveredRangeError
from megatron_tenplex.executor import execute
from megatron_tenplex.membership import gather_layout
from megatron_tenplex.planner import ReshardPlan, plan_reshard
from megatron_tenplex.ptc import ParallelTensorCollection, Shard, TensorSpec
from megatron_tenplex.tensor_store import TensorStore

if TYPE_CHECKING:
    from megatron_tenplex.reconfigure import Reconfigurator

logger = logging.getLogger(__name__)
_KEPT_VERSIONS = 2


def write_replicas(owner: Reconfigurator) -> int:
    """See :meth:`Reconfigurator.snapshot`."""
    store, world = owner.store, owner.world
    if store is None:
        raise ValueError("snapshot() needs a store: Reconfigurator(..., store=TensorStore(...))")
    local = owner.describe()
    layout = owner.gather(local)
    small = owner.gather_small()
    version = small["iteration"]
    hosts = world.all_gather_json(store.host)
    held = {} if local is None else local.shards
    failure: BaseException | None = None
    try:
        if owner.role is not None:
            store.put(version, owner.role, len(world.members), layout.tensors, held, small)
        for sender, receiver in _partners(hosts, world.members, owner.redundancy):
            _replicate(owner, store, layout, held, small, sender=sender, receiver=receiver)
    except Exception as error:  # reported to all workers, then raised
        failure = error
    world.agree(failure, "writing replicas")
    if hosts.index(store.host) == world.worker:
        store.prune(_KEPT_VERSIONS)
    return version


def _partners(hosts: list[str], members: tuple[int, ...], redundancy: int) -> list[tuple[int, int]]:
    """(worker, worker of another host that keeps its copy), the next hosts in a ring."""
    names = list(dict.fromkeys(hosts))
    of_host = {name: [w for w, host in enumerate(hosts) if host == name] for name in names}
    pairs = []
    for worker in members:
        at, index = names.index(hosts[worker]), of_host[hosts[worker]].index(worker)
        for step in range(1, min(redundancy, len(names) - 1) + 1):
            others = of_host[names[(at + step) % len(names)]]
            pairs.append((worker, others[index % len(others)]))
    return pairs


def _replicate(
    owner: Reconfigurator,
    store: TensorStore,
    layout: ParallelTensorCollection,
    held: dict[Shard, Tensor],
    small: dict[str, Any],
    *,
    sender: int,
    receiver: int,
) -> None:
    """Carry one worker's state to the host of another."""
    me, device = owner.world.worker, owner.transport.device
    shards = layout.shards[sender]
    if me == sender:
        messages = [(receiver, held[s].contiguous().view(-1).view(torch.uint8)) for s in shards]
        owner.transport.exchange(messages, []).wait()
    elif me == receiver:
        sizes = [s.numel * layout.itemsize(s.key) for s in shards]
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        owner.transport.exchange([], [(sender, buffer) for buffer in buffers]).wait()
        state = {
            s: b.view(layout.tensors[s.key].dtype).view((-1,) if s.flat else s.box.shape)
            for s, b in zip(shards, buffers, strict=True)
        }
        role = owner.world.members.index(sender)
        store.put(small["iteration"], role, len(owner.world.members), layout.tensors, state, small)


def resume_from_replicas(owner: Reconfigurator) -> int | None:
    """Fill the freshly built layout from the newest version that intact copies cover. Collective.

    Returns:
        The version; None where no host has any.
    """
    store, world = owner.store, owner.world
    assert store is not None
    found = world.all_gather_json([store.host, store.versions()])
    versions = sorted({v for _, versions in found for v in versions}, reverse=True)
    hosts = [host for host, _ in found]
    failure: UncoveredRangeError | None = None
    for version in versions:
        held, tensors, small, corrupt = _open_share(store, version, hosts, world.worker)
        source = gather_layout(tensors, list(held), world)
        common = next((said for said in world.all_gather_json(small) if said is not None), None)
        try:
            plan = _plan(owner, source, common)
        except UncoveredRangeError as error:
            error.__cause__ = corrupt
            failure = failure or error
            logger.warning("version %d is not complete: %s", version, error)
            continue
        assert common is not None
        _fill(owner, plan, held, common)
        return version
    if failure is not None:
        raise failure
    return None


def _open_share(
    store: TensorStore, version: int, hosts: list[str], worker: int
) -> tuple[dict[Shard, Tensor], dict[str, TensorSpec], dict[str, Any] | None, ReplicaCorruptError | None]:
    """Check and open this worker's share of the copies on its host; corrupt ones are left out."""
    neighbours = [w for w, host in enumerate(hosts) if host == store.host]
    held: dict[Shard, Tensor] = {}
    tensors: dict[str, TensorSpec] = {}
    small: dict[str, Any] | None = None
    corrupt: ReplicaCorruptError | None = None
    for number, rank in enumerate(store.ranks(version)):
        if neighbours[number % len(neighbours)] != worker:
            continue
        try:
            opened = store.open(version, rank)
            tensors.update(store.shards(version, rank)[0])
            small = store.manifest(version, rank)["common"]
        except ReplicaCorruptError as error:
            logger.warning("%s; another copy is used if there is one", error)
            corrupt = error
            continue
        for shard, tensor in opened.items():
            held.setdefault(shard, tensor)
    return held, tensors, small, corrupt


def _plan(
    owner: Reconfigurator, source: ParallelTensorCollection, small: dict[str, Any] | None
) -> ReshardPlan:
    members = owner.world.members
    target = owner.target_layout()
    missing = [key for key in target.tensors if key not in source.tensors]
    if small is None or missing:
        key = missing[0] if missing else next(iter(target.tensors))
        shard = next(s for shards in target.shards for s in shards if s.key == key)
        raise UncoveredRangeError(key, shard.box)
    return plan_reshard(source, target, placement=members, topology=owner.hosts())


def _fill(owner: Reconfigurator, plan: ReshardPlan, held: dict[Shard, Tensor], small: dict[str, Any]) -> None:
    local = owner.describe()
    failure: BaseException | None = None
    try:
        into = {} if local is None else local.shards
        owner.report = execute(plan, held, into, owner.transport, staging_bytes=owner.staging_bytes)
        if local is not None:
            for padding in local.padding:
                padding.zero_()
            owner.apply_small(small)
    except Exception as error:  # reported to all workers, then raised
        failure = error
    owner.world.agree(failure, "resuming from replicas")

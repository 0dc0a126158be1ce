"""Plans carried out by real workers over gloo, without Megatron."""

from __future__ import annotations

import pytest
import torch
from tenplex_oracles import random_pair, same_bits, tensor_of, values_of

from megatron_tenplex import (
    Box,
    ParallelTensorCollection,
    Shard,
    TensorSpec,
    Topology,
    TorchTransport,
    World,
    execute,
    plan_reshard,
)
from megatron_tenplex.executor import view_of
from megatron_tenplex.testing import WorkerFailedError, run_world
from megatron_tenplex.verify import check_target, digest, expected_digests

WORKERS = 3
STAGING = 4096


def fitting_pairs(count):
    """Random pairs for three workers."""
    seed, found = 0, []
    while len(found) < count:
        pair = random_pair(seed)
        seed += 1
        if max(c.world_size for c in pair) == WORKERS:
            found.append(pair)
    return found


def carry_out(store, worker, workers, pairs, relay):
    """Reshard every pair; (all target shards right, most staging, digests agree)."""
    world = World(store, worker, workers)
    transport = TorchTransport(world.data, worker, "cpu")
    right, most = True, 0
    for source, target in pairs:
        whole = values_of(source.tensors)
        plan = plan_reshard(source, target, topology=Topology(2), relay=relay)
        mine = source.shards[worker] if worker < source.world_size else ()
        wanted = target.shards[worker] if worker < target.world_size else ()
        held = {s: tensor_of(s, whole[s.key]) for s in mine}
        into = {s: torch.zeros_like(tensor_of(s, whole[s.key])) for s in wanted}
        digests = expected_digests(source, target, plan.placement, held, world)
        report = execute(plan, held, into, transport, staging_bytes=STAGING)
        check_target(digests, target, into, world)
        right &= all(same_bits(into[s], tensor_of(s, whole[s.key])) for s in into)
        most = max(most, report.staging_bytes)
    return right, most


@pytest.mark.parametrize("relay", [False, True])
def test_tx09_rounds_stay_within_the_staging_memory(relay):
    for right, most in run_world(WORKERS, carry_out, fitting_pairs(40), relay, timeout=90):
        assert right
        assert most <= STAGING


def large(worker_count):
    """A matrix of 8 MiB whose rows move to the other worker, in a layout by rows and one by columns."""
    spec = {"w": TensorSpec((1024, 2048), torch.float32)}
    rows = [[Shard("w", Box((512 * r, 0), (512, 2048)))] for r in range(worker_count)]
    columns = [[Shard("w", Box((0, 1024 * r), (1024, 1024)))] for r in range(worker_count)]
    swapped = [rows[1], rows[0]]
    return [ParallelTensorCollection(spec, shards) for shards in (rows, columns, swapped)]


def released(store, worker, workers):
    """Contiguous and strided pieces in many rounds, the source given back as it is read."""
    world = World(store, worker, workers)
    transport = TorchTransport(world.data, worker, "cpu")
    rows, columns, swapped = large(workers)
    whole = torch.arange(1024.0 * 2048).view(1024, 2048)
    found = []
    for target in (columns, swapped):
        held = {s: tensor_of(s, whole) for s in rows.shards[worker]}
        into = {s: torch.zeros_like(tensor_of(s, whole)) for s in target.shards[worker]}
        plan = plan_reshard(rows, target)
        report = execute(plan, held, into, transport, staging_bytes=1 << 20, release_source=True)
        right = all(same_bits(into[s], tensor_of(s, whole)) for s in into)
        found.append((right, len(held), report.staging_bytes, report.received_bytes))
    return found


def test_tx09_a_source_is_given_back_once_it_is_read():
    for columns, swapped in run_world(2, released, timeout=60):
        assert columns[0]
        assert columns[1] == 0
        assert 0 < columns[2] <= 1 << 20
        assert columns[3] == 512 * 1024 * 4
        assert swapped[0]
        assert swapped[1] == 0
        assert swapped[3] == 512 * 2048 * 4


def changed(store, worker, workers):
    """One bit of one element is wrong on one worker."""
    world = World(store, worker, workers)
    rows, columns, _ = large(workers)
    whole = torch.arange(1024.0 * 2048).view(1024, 2048)
    held = {s: tensor_of(s, whole) for s in rows.shards[worker]}
    into = {s: tensor_of(s, whole) for s in columns.shards[worker]}
    wanted = expected_digests(rows, columns, (0, 1), held, world)
    check_target(wanted, columns, into, world)
    if worker == 1:
        next(iter(into.values())).view(torch.int32)[3, 4] ^= 1
    check_target(wanted, columns, into, world)


def test_tx11_one_changed_bit_is_found_on_every_worker():
    with pytest.raises(WorkerFailedError) as caught:
        run_world(2, changed, timeout=60)
    assert all("content of 1 tensors changed while it moved: w" in t for t in caught.value.failures.values())
    assert len(caught.value.failures) == 2


def test_tx11_digests_add_up_over_any_cut_and_depend_on_the_place():
    values = torch.randn(6, 5)
    shape = (6, 5)
    whole = digest(values, Box((0, 0), shape), shape)
    parts = digest(values[:2], Box((0, 0), (2, 5)), shape) + digest(values[2:], Box((2, 0), (4, 5)), shape)
    assert (whole - parts) % 2**64 == 0
    exchanged = values.clone()
    exchanged[0, 0], exchanged[5, 4] = values[5, 4], values[0, 0]
    assert digest(exchanged, Box((0, 0), shape), shape) != whole


def different_plans(store, worker, workers):
    world = World(store, worker, workers)
    world.agree(ValueError("no room") if worker == 1 else None, "building")


def test_a_failure_of_one_worker_reaches_all():
    with pytest.raises(WorkerFailedError) as caught:
        run_world(3, different_plans, timeout=60)
    failures = caught.value.failures
    assert "ValueError: no room" in failures[1]
    assert all("worker 1 failed at building: ValueError: no room" in failures[w] for w in (0, 2))


def reformed(store, worker, workers):
    """Ranks and sums in default groups of different members."""
    import torch.distributed as dist

    world = World(store, worker, workers)
    found = []
    for members in ([0, 1, 2, 3], [3, 1], [2], [1, 0, 3]):
        role = world.form(members)
        assert role == world.role
        total = torch.tensor(float(worker))
        if role is not None:
            dist.all_reduce(total)
        found.append((role, float(total) if role is not None else None))
    return found


def test_tx12_the_default_group_is_formed_anew_with_other_members_and_ranks():
    results = run_world(4, reformed, timeout=60)
    for number, members in enumerate(([0, 1, 2, 3], [3, 1], [2], [1, 0, 3])):
        for worker, found in enumerate(results):
            role = members.index(worker) if worker in members else None
            assert found[number] == (role, float(sum(members)) if role is not None else None)


def by_copy_service(store, worker, workers):
    """Through Megatron's own gloo copy service."""
    from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService

    from megatron_tenplex import CopyServiceTransport
    from megatron_tenplex.testing import install_cpu_compat

    install_cpu_compat()
    world = World(store, worker, workers)
    world.form(range(workers))
    rows, columns, _ = large(workers)
    whole = torch.arange(1024.0 * 2048).view(1024, 2048)
    held = {s: tensor_of(s, whole) for s in rows.shards[worker]}
    into = {s: torch.zeros_like(tensor_of(s, whole)) for s in columns.shards[worker]}
    execute(plan_reshard(rows, columns), held, into, CopyServiceTransport(GlooCopyService(), worker, "cpu"))
    return all(same_bits(into[s], tensor_of(s, whole)) for s in into)


@pytest.mark.megatron
def test_tx24_megatrons_copy_service_as_transport():
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    import tenplex_jobs  # noqa: F401 - imports Megatron before the workers are forked

    assert run_world(2, by_copy_service, timeout=90) == [True, True]


def test_tensors_of_another_shape_are_refused():
    shard = Shard("w", Box((0, 0), (2, 3)), (1, 4))
    with pytest.raises(ValueError, match="has shape"):
        view_of(shard, torch.zeros(4), Box((0, 1), (1, 2)))
    with pytest.raises(ValueError, match="has shape"):
        view_of(Shard("w", Box((0, 0), (2, 3))), torch.zeros(3, 2), Box((0, 0), (1, 1)))

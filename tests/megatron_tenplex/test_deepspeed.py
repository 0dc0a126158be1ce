"""ZeRO partitions against DeepSpeed's own planner, and a real engine against its uninterrupted run."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed.checkpoint.affine", reason="deepspeed is not installed")
from deepspeed.checkpoint import affine
from deepspeed.checkpoint.affine_transfer import plan_transfer
from tenplex_oracles import mask_of, missing_bytes

from megatron_tenplex import World, lower_bound, plan_reshard
from megatron_tenplex.deepspeed_adapter import zero_layout
from megatron_tenplex.testing import run_world

GROUPS = [
    {"embedding": (37, 8), "layer.weight": (24, 8), "layer.proj": (8, 24)},
    {"layer.bias": (24,), "norm.weight": (8,), "norm.bias": (8,)},
]


def affine_map(layout, key):
    """DeepSpeed's description of a one-dimensional view of ``key``."""
    numel = int(np.prod(layout.tensors[key].shape))
    shapes, pieces = {}, {}
    for rank in range(layout.world_size):
        flat = np.flatnonzero(mask_of(layout, rank, key).reshape(-1))
        shapes[rank] = (len(flat),)
        pieces[rank] = ()
        if len(flat):
            assert flat[-1] - flat[0] + 1 == len(flat)
            pieces[rank] = (
                affine.AffinePiece(
                    shape=(len(flat),),
                    source_offset=int(flat[0]),
                    source_strides=(1,),
                    dest_offset=0,
                    dest_strides=(1,),
                    locations=frozenset({rank}),
                ),
            )
    return affine.ParamAffineMap(logical_shape=(numel,), shard_shapes=shapes, pieces_by_rank=pieces)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 3), (3, 8), (4, 4)])
def test_tx26_coverage_equals_deepspeeds_own_planner(before, after):
    source, target = zero_layout(GROUPS, before), zero_layout(GROUPS, after)
    plan = plan_reshard(source, target)
    for key in (k for k in target.tensors if k.startswith("optimizer.exp_avg.")):
        theirs = plan_transfer(affine_map(target, key), affine_map(source, key))
        remote = sum(int(np.prod(s.shape)) for s in theirs.segments if s.source_rank != s.target_rank)
        ours = sum(m.box.numel for m in plan.moves if m.key == key and m.source != m.target)
        assert ours == remote


def test_tx26_every_element_of_the_optimizer_has_one_rank():
    layout = zero_layout(GROUPS, 4)
    for key in layout.tensors:
        holders = sum(mask_of(layout, rank, key).astype(int) for rank in range(4))
        assert (holders == (4 if key.startswith("model.") else 1)).all()
    sizes = [layout.held_bytes(rank) for rank in range(4)]
    assert max(sizes) - min(sizes) <= 3 * 4 * 8 * len(GROUPS)


def test_tx26_bytes_are_minimal_and_bad_input_is_refused():
    source, target = zero_layout(GROUPS, 4), zero_layout(GROUPS, 3)
    plan = plan_reshard(source, target)
    assert plan.remote_bytes == missing_bytes(source, target, (0, 1, 2)) == lower_bound(source, target)
    with pytest.raises(ValueError, match="occurs twice"):
        zero_layout([{"a": (2,)}, {"a": (2,)}], 2)
    with pytest.raises(ValueError, match="world_size"):
        zero_layout(GROUPS, 0)


def zero_tour(store, worker, workers, stage, precision, sizes, steps):
    """Losses of an engine that changes its number of ranks, and of one that does not."""
    import deepspeed

    from megatron_tenplex.deepspeed_adapter import ZeroReconfigurator

    # DeepSpeed would compile a shared-memory reduction for CPUs here, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def build():
        rank, size = dist.get_rank(), dist.get_world_size()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 8 // size,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": precision == "bf16"},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 20}},
        }
        return deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]

    def step(engine, number):
        if engine is None:
            return None
        rank, size = dist.get_rank(), dist.get_world_size()
        numbers = torch.Generator().manual_seed(number)
        batch = torch.randn(8, 10, generator=numbers).chunk(size)[rank]
        weight = next(engine.module.parameters())
        loss = (engine(batch[:, :7].to(weight.dtype)).float() - batch[:, 7:]).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / size

    world = World(store, worker, workers)
    curves, moved = [], []
    for visited in (sizes[:1], sizes):
        elastic = ZeroReconfigurator(build, world=world)
        curve = []
        for number, dp in enumerate(visited):
            engine = elastic.reconfigure(dp) if number else elastic.start(dp)
            if number:
                moved.append(sum(world.all_gather_json(elastic.report.received_bytes)))
            for _ in range(steps if len(visited) > 1 else steps * len(sizes)):
                curve.append(step(engine, len(curve)))
        curves.append(curve)
    return curves, moved


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16")])
def test_tx26_a_real_engine_goes_on_with_other_numbers_of_ranks(stage, precision):
    results = run_world(4, zero_tour, stage, precision, [2, 4, 2], 4, timeout=200)
    steady, elastic = (
        [max(c[k][i] for c, _ in results if c[k][i] is not None) for i in range(12)] for k in (0, 1)
    )
    gaps = [abs(a - b) for a, b in zip(steady, elastic, strict=True)]
    assert max(gaps) <= (2e-6 if precision == "fp32" else 2e-3)
    assert max(steady) > 1.5 * min(steady)
    model = {"0.weight": (13, 7), "0.bias": (13,), "2.weight": (3, 13), "2.bias": (3,)}
    layouts = [zero_layout([model], dp, precision=precision) for dp in (2, 4, 2)]
    assert results[0][1] == [lower_bound(a, b) for a, b in pairwise(layouts)]

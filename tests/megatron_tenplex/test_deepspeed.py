"""ZeRO partitions against DeepSpeed's own planner, which knows geometry but moves nothing."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("deepspeed.checkpoint.affine", reason="deepspeed is not installed")
from deepspeed.checkpoint import affine
from deepspeed.checkpoint.affine_transfer import plan_transfer
from tenplex_oracles import mask_of, missing_bytes

from megatron_tenplex import lower_bound, plan_reshard
from megatron_tenplex.deepspeed_adapter import zero_layout

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

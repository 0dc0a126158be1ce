"""What an engine's layers share, driven as vLLM drives it, with the device's part on the CPU."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from vllm_moe_offload import MoEOffloadConfig, live
from vllm_moe_offload.pools import LayerHandle
from vllm_moe_offload.residency import REMOTE
from vllm_moe_offload.runtime import ModelOffload
from vllm_moe_offload.steps import Step
from vllm_moe_offload.vllm_layer import _OffloadMixin

LAYERS, EXPERTS, TOP_K = 3, 8, 2


class Plain:
    """Stands for RoutedExperts."""


class Layer(_OffloadMixin, Plain):
    """An expert layer of one matrix an expert, whose kernel reads weights by row, as Triton's does.

    With ``expert_map`` it has the experts whose entry is not -1, and leaves out the others, as Triton's does.
    """

    _plain_class = Plain

    def __init__(self, offload, seed, expert_map=None):
        generator = torch.Generator().manual_seed(seed)
        self.plain = torch.randn(EXPERTS, 4, 4, generator=generator)
        own = list(range(EXPERTS)) if expert_map is None else np.flatnonzero(np.asarray(expert_map) >= 0)
        self.tensors = {"w": self.plain[own].clone()}
        self.offload, self.global_num_experts = offload, EXPERTS
        self._handle = offload.announce(
            LayerHandle(
                f"layer {seed}",
                len(own),
                TOP_K,
                lambda: self.tensors,
                self.replace,
                self._become_plain,
                expert_map,
            )
        )

    def replace(self, tensors):
        self.tensors = dict(tensors)

    def _plain_tiles(self, x):
        return nullcontext()

    def _apply(self, x, topk_weights, topk_ids, row_of_expert=None):
        rows = topk_ids if row_of_expert is None else row_of_expert[topk_ids.long()]
        slots = self.tensors["w"]
        base, stride = slots.data_ptr(), slots.stride(0) * 4
        matrices = [
            torch.frombuffer(bytearray(ctypes.string_at(base + row * stride, 64)), dtype=torch.float32)
            if row != REMOTE
            else torch.zeros(16)
            for row in rows.flatten().tolist()
        ]
        weights = torch.stack(matrices).view(*rows.shape, 4, 4)
        return (torch.einsum("tkhi,ti->tkh", weights, x) * topk_weights[..., None]).sum(1)

    def expected(self, x, topk_weights, topk_ids):
        weights = self.plain[topk_ids.long()]
        return (torch.einsum("tkhi,ti->tkh", weights, x) * topk_weights[..., None]).sum(1)


def build(expert_map=None, **options):
    config = MoEOffloadConfig(**({"cache_fraction": 0.4, "policy": "eam"} | options))
    offload = ModelOffload(config, torch.device("cpu"), direct=True, max_tokens=64, model_id="m")
    layers = [Layer(offload, seed, expert_map) for seed in range(LAYERS)]
    for layer in layers if "gate" in config.prefetch else ():
        layer.top_k = TOP_K
        layer.look_ahead(torch.nn.Linear(4, EXPERTS))
    offload.take_over()
    return offload, layers


def run_step(offload, layers, rng, number, requests, *, ended=(), restarted=(), padding=0):
    """One step; returns the choices ``[tokens, layers, top_k]``."""
    tokens = sum(requests.values())
    step = Step(tokens, number, lambda: list(requests.items()))
    offload.begin_step(step, ended, restarted)
    chosen = []
    for layer in layers:
        ids = torch.from_numpy(
            np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens + padding)])
        ).int()
        x, weights = torch.randn(tokens + padding, 4), torch.rand(tokens + padding, TOP_K)
        output = layer._serve_direct(x, weights, ids)
        assert torch.equal(output[:tokens], layer.expected(x, weights, ids)[:tokens])
        chosen.append(ids[:tokens].numpy())
    offload.end_step()
    return np.stack(chosen, axis=1)


@pytest.mark.parametrize("prefetch", ["none", "eam", "gate", "eam+gate"])
def test_mo20_mo05_layers_compute_exactly_and_every_request_is_traced(prefetch):
    offload, layers = build(prefetch=prefetch, record_trace=True, debug_checks=True)
    rng = np.random.default_rng(0)
    # Prefill of a and b (small and large batches take different paths), decode, b ends, c comes, a restarts.
    plan = [
        ({"a": 1}, (), ()),
        ({"a": 1, "b": 40}, (), ()),
        *[({"b": 1, "a": 1}, (), ())] * 6,
        ({"a": 1, "c": 3}, ["b"], ()),
        ({"c": 1}, (), ["a"]),
        ({"c": 1, "a": 9}, (), ()),
    ]
    seen: dict[str, list[np.ndarray]] = {}
    for number, (requests, ended, restarted) in enumerate(plan):
        for request in restarted:
            seen.pop(request)
        chosen = run_step(
            offload, layers, rng, number, requests, ended=ended, restarted=restarted, padding=number % 3
        )
        start = 0
        for request, tokens in requests.items():
            seen.setdefault(request, []).append(chosen[start : start + tokens])
            start += tokens
    offload.begin_step(None, ["a", "c"], [])
    eams = offload.request_eams()
    assert set(eams) == {"a", "b", "c"}
    for request, parts in seen.items():
        ids = np.concatenate(parts)
        counts = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
        for layer in range(LAYERS):
            np.add.at(counts[layer], ids[:, layer].reshape(-1), 1)
        np.testing.assert_array_equal(eams[request], counts)
        assert (counts.sum(axis=1) == len(ids) * TOP_K).all()
    assert offload.estimators[0].tracer.live == ()
    assert len(offload.estimators[0].collection) == 3
    trace = offload.collect_trace()
    assert len(trace.request) == sum(sum(requests.values()) for requests, _, _ in plan)
    stats = offload.stats()
    assert stats["prefetch"] == prefetch
    assert stats["accesses"] == stats["hits"] + stats["misses"] > 0
    assert stats["misses"] + stats["prefetched"] == stats["copies"] + stats["in_place"]
    assert set(live._COUNTERS) | set(live._GAUGES) <= set(offload._report())
    (cache,) = offload.caches
    assert (cache._promoter is not None) == ("eam" in prefetch)
    assert cache.share.shape == (LAYERS, EXPERTS)


def test_mo03_all_experts_resident_leaves_the_layers_to_the_framework():
    offload, layers = build(cache_fraction=1.0)
    assert offload.caches == []
    assert all(layer._handle.pool == -1 for layer in layers)
    assert all(torch.equal(layer.tensors["w"], layer.plain) for layer in layers)
    assert {type(layer) for layer in layers} == {Plain}
    stats = offload.stats()
    assert stats["num_slots"] == LAYERS * EXPERTS
    assert stats["accesses"] == stats["copies"] == 0


def test_mo02_layers_of_several_shapes_get_a_pool_each_and_share_the_budget():
    config = MoEOffloadConfig(cache_size=6 * 4 * 4 * 4 * 2, policy="lru")
    offload = ModelOffload(config, torch.device("cpu"), direct=True, max_tokens=8, model_id="m")
    for index, size in enumerate((4, 8)):
        held = {"w": torch.randn(EXPERTS, size, 4)}
        offload.announce(
            LayerHandle(f"layer {index}", EXPERTS, TOP_K, lambda held=held: held, held.update, pytest.fail)
        )
    offload.take_over()
    assert [cache.num_slots for cache in offload.caches] == [4, 4]
    assert offload.stats()["num_slots"] == 8


def test_too_little_host_memory_says_what_is_needed_and_there(monkeypatch):
    def no_room(nbytes, **_):
        raise MemoryError(f"arena: cannot map {nbytes} bytes, free memory 0.1 GiB")

    monkeypatch.setattr("vllm_moe_offload.store.PinnedArena", no_room)
    with pytest.raises(MemoryError, match=r"^moe_offload: arena: cannot map \d+ bytes, free memory 0.1 GiB"):
        build()


def test_mo06_the_collection_is_saved_at_the_end_and_refused_for_another_model(tmp_path):
    path = tmp_path / "eams.npz"
    offload, layers = build(eam_path=str(path))
    rng = np.random.default_rng(0)
    run_step(offload, layers, rng, 0, {"a": 2, "b": 3})
    offload.begin_step(None, ["a", "b"], [])
    offload.close()
    again, _ = build(eam_path=str(path))
    np.testing.assert_array_equal(
        again.estimators[0].collection.matrices, offload.estimators[0].collection.matrices
    )
    assert len(again.estimators[0].collection) == 2
    config = MoEOffloadConfig(cache_fraction=0.4, eam_path=str(path))
    other = ModelOffload(config, torch.device("cpu"), direct=True, max_tokens=64, model_id="other")
    Layer(other, 0)
    with pytest.raises(ValueError, match="was recorded with model 'm', not 'other'"):
        other.take_over()


def test_mo15_experts_below_host_memory_come_from_the_file_of_this_model(tmp_path):
    path = tmp_path / "experts"
    options = {"disk_path": str(path), "host_memory": 3 * 4096, "policy": "lru", "cache_fraction": 0.3}
    config = MoEOffloadConfig(**options)

    def start(model_id, seed=0):
        offload = ModelOffload(config, torch.device("cpu"), direct=False, max_tokens=8, model_id=model_id)
        for layer in range(LAYERS):
            Layer(offload, seed + layer)
        offload.take_over()
        return offload

    first = start("m")
    (cache,) = first.caches
    cache.ensure(1, [3, 5])
    assert first.stats()["bytes_disk_to_host"] == 2 * 64
    again = start("m")  # the same weights: the file serves as it is
    assert torch.equal(again.caches[0].store.record(2, 7), cache.store.record(2, 7))
    with pytest.raises(ValueError, match="holds other weights for layer 0 than the model; delete it"):
        start("m", seed=9)
    with pytest.raises(ValueError, match="was written for model 'm', not 'other'"):
        start("other")


@pytest.mark.parametrize("policy", ["lru", "lfu", "eam"])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_mo22_ranks_with_a_part_of_the_experts_add_up_to_the_whole(policy, placement):
    """Two ranks see the same tokens and ids; each offloads its own experts and leaves out the others."""
    experts = np.arange(EXPERTS)
    owner = experts // 5 if placement == "linear" else experts % 2  # 5 and 3, or 4 and 4
    maps = [tuple(np.where(owner == rank, np.cumsum(owner == rank) - 1, -1).tolist()) for rank in range(2)]
    prefetch = "eam" if policy == "eam" else "none"
    ranks = [
        build(map_, policy=policy, prefetch=prefetch, record_trace=True, debug_checks=True) for map_ in maps
    ]
    rng = np.random.default_rng(0)
    for number in range(14):
        tokens = 40 if number in {1, 6} else int(rng.integers(1, 5))
        for offload, _ in ranks:
            offload.begin_step(Step(tokens, number, lambda tokens=tokens: [("a", tokens)]), [], [])
        for layer in range(LAYERS):
            ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens + number % 3)])
            ids = torch.from_numpy(ids).int()
            x, weights = torch.randn(len(ids), 4), torch.rand(len(ids), TOP_K)
            parts = [layers[layer]._serve_direct(x, weights, ids) for _, layers in ranks]
            whole = ranks[0][1][layer].expected(x, weights, ids)
            # One term of each sum is zero or both ranks' terms are added once more: rounding may differ.
            torch.testing.assert_close(parts[0][:tokens] + parts[1][:tokens], whole[:tokens])
        for offload, _ in ranks:
            offload.end_step()
    traces, served = [], []
    for rank, (offload, _) in enumerate(ranks):
        report = offload.stats()
        assert report["accesses"] == report["hits"] + report["misses"] > 0
        assert report["misses"] + report["prefetched"] == report["copies"] + report["in_place"]
        assert report["num_slots"] == int(0.4 * LAYERS * (owner == rank).sum())
        (cache,) = offload.caches
        cache.verify()
        assert (cache.slot_of_expert.numpy()[:, owner != rank] == -1).all()
        traces.append(offload.collect_trace())
        served.append(report["accesses"])
    # Both know the routing of all experts, and each counts accesses to its own.
    np.testing.assert_array_equal(traces[0].expert_ids, traces[1].expert_ids)
    steps = [traces[0].expert_ids[traces[0].step == step] for step in range(14)]
    asked = [np.unique(ids[:, layer]) for ids in steps for layer in range(LAYERS)]
    for rank in range(2):
        assert served[rank] == sum(int((owner[needed] == rank).sum()) for needed in asked)

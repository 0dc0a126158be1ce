"""Waves of the two paths, and refusals by name, without an engine."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload import ExpertCache, HostExpertStore
from vllm_moe_offload.copy_serving import expert_waves, token_waves
from vllm_moe_offload.vllm_layer import _OffloadMixin, _refuse_features, find_gates

CHOICES = st.lists(st.permutations(range(7)).map(lambda order: order[:3]), min_size=1, max_size=20)


@settings(max_examples=80, deadline=None)
@given(CHOICES, st.integers(3, 8))
def test_mo04_token_waves_cover_all_rows_in_order_and_fit(chosen, slots):
    chosen = np.asarray(chosen)
    waves = list(token_waves(chosen, slots))
    assert np.concatenate([np.arange(len(chosen))[wave] for wave in waves]).tolist() == list(
        range(len(chosen))
    )
    assert all(len(np.unique(chosen[wave])) <= slots for wave in waves)


@settings(max_examples=80, deadline=None)
@given(st.sets(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20)), st.integers(1, 6))
def test_mo11_expert_waves_take_each_expert_once_residents_first(needed, resident, slots):
    waves = expert_waves(np.asarray(sorted(needed)), frozenset(resident), slots)
    order = np.concatenate(waves).tolist()
    assert sorted(order) == sorted(needed)
    assert all(len(wave) <= slots for wave in waves)
    here = [expert in resident for expert in order]
    assert here == sorted(here, reverse=True)


class Kernel:
    """Stands for vLLM's Triton kernel: rows by expert_map, absent experts give zeros, one sum at the end."""

    def moe_sum(self, terms, output):
        output.copy_(terms.sum(dim=1))


class Plain:
    """Stands for RoutedExperts without a split over ranks."""

    expert_map = None


class Layer(_OffloadMixin, Plain):
    """One linear expert layer whose weights are the slots of a cache."""

    def __init__(self, cache):
        self.cache, self.kernel = cache, Kernel()
        self.quant_method = SimpleNamespace(
            moe_kernel=SimpleNamespace(fused_experts=self.kernel), apply=self.compute
        )
        self._handle = SimpleNamespace(index=0)
        self._served_map = None

    def compute(self, layer, x, topk_weights, topk_ids, **_):
        rows = topk_ids if self.expert_map is None else self.expert_map[topk_ids.long()]
        weights = self.cache.views["w"][rows.clamp(min=0).long()]
        terms = torch.einsum("tkhi,ti->tkh", weights, x) * topk_weights[..., None]
        terms[rows < 0] = 0
        output = torch.empty_like(x)
        self.kernel.moe_sum(terms, output)
        return output

    def _plain_tiles(self, x):
        return nullcontext()


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_mo11_expert_waves_equal_one_pass_bitwise_and_copy_each_missing_expert_once(slots):
    torch.manual_seed(0)
    store = HostExpertStore([{"w": torch.randn(9, 4, 4)}])
    x, weights = torch.randn(30, 4), torch.rand(30, 2)
    ids = torch.stack([torch.randperm(9)[:2] for _ in range(30)]).int()
    everything = ExpertCache(store, 9)
    everything.preload()
    whole = Layer(everything)._apply(x, weights, everything.slot_of_expert[0][ids.long()])
    cache = ExpertCache(store, slots)
    cache.ensure(0, [8, 7])
    cache.release(0)
    layer = Layer(cache)
    output = layer._run_expert_waves(x, weights, ids, np.arange(9), cache)
    assert torch.equal(output, whole)
    assert cache.stats["copies"] == 9
    assert cache.stats["waves"] == -(-9 // slots) - 1
    assert "moe_sum" not in vars(layer.kernel)
    assert layer.expert_map is None


def parallel(**changes):
    fields = {"enable_expert_parallel": False, "enable_eplb": False, "tensor_parallel_size": 1}
    return SimpleNamespace(**(fields | {"data_parallel_size": 1} | changes))


def config(**changes):
    fields = {
        "parallel_config": parallel(),
        "model_config": SimpleNamespace(),
        "lora_config": None,
        "offload_config": SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=0)),
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        (
            {"parallel_config": parallel(enable_expert_parallel=True, tensor_parallel_size=2)},
            "enable_expert_parallel",
        ),
        ({"parallel_config": parallel(enable_eplb=True)}, "enable_eplb"),
        ({"parallel_config": parallel(data_parallel_size=2)}, "data_parallel_size"),
        ({"parallel_config": parallel(prefill_context_parallel_size=2)}, "prefill_context_parallel_size"),
        ({"lora_config": object()}, "enable_lora"),
        ({"model_config": SimpleNamespace(enable_sleep_mode=True)}, "enable_sleep_mode"),
        ({"offload_config": SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=2))}, "cpu_offload_gb"),
        (
            {"offload_config": SimpleNamespace(prefetch=SimpleNamespace(offload_group_size=4))},
            "offload_group_size",
        ),
        ({"weight_transfer_config": object()}, "weight_transfer_config"),
        *[
            ({"parallel_config": parallel(**{name: True})}, name)
            for name in ("enable_dbo", "enable_elastic_ep")
        ],
    ],
)
def test_features_that_break_offload_are_refused_by_name(changes, feature):
    _refuse_features(config(), direct=False)
    with pytest.raises(NotImplementedError, match=feature):
        _refuse_features(config(**changes), direct=False)


def test_mo22_expert_parallelism_is_served_by_a_device_that_serves_misses_only():
    split = config(parallel_config=parallel(enable_expert_parallel=True, tensor_parallel_size=2))
    _refuse_features(split, direct=True)
    with pytest.raises(NotImplementedError, match=r"enable_expert_parallel\) unless .*miss='direct'"):
        _refuse_features(split, direct=False)


def test_monolithic_kernels_are_refused_by_name():
    class RoutesItself:
        is_monolithic = True

    layer = Layer(None)
    layer.quant_method = RoutesItself()
    with pytest.raises(NotImplementedError, match=r"RoutesItself .*--moe-backend triton"):
        layer._refuse_monolithic()


def test_mo13_formats_that_the_kernel_cannot_read_from_slots_are_refused_by_name():
    layer = Layer(None)
    layer.offload = SimpleNamespace(device=torch.device("cuda"))
    layer._refuse_kernel({"w13_weight": torch.zeros(4, 2, 2), "w13_weight_scale": torch.zeros(4, 2, 1)})
    with pytest.raises(NotImplementedError, match=r"w2_weight_scale has one number an expert"):
        layer._refuse_kernel({"w13_weight": torch.zeros(4, 2, 2), "w2_weight_scale": torch.zeros(4)})
    layer.quant_method.moe_kernel.fused_experts = object()
    with pytest.raises(NotImplementedError, match=r"kernel object would depend .*--moe-backend triton"):
        layer._refuse_kernel({"w13_weight": torch.zeros(4, 2, 2)})


class OffloadedModule(_OffloadMixin, torch.nn.Module):
    def __init__(self):
        torch.nn.Module.__init__(self)
        self.top_k = 2
        self._handle = SimpleNamespace(predictor=None)


@pytest.mark.parametrize("place", ["runner.gate", "block.gate", "block.router"])
def test_mo21_the_gate_is_found_where_vllm_models_keep_it(place):
    model = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"runner": torch.nn.ModuleDict()})})
    block = model["block"]
    block["runner"]["routed_experts"] = layer = OffloadedModule()
    with pytest.raises(NotImplementedError, match=r"gate of block.runner.routed_experts .*found none"):
        find_gates(model)
    gate = torch.nn.Linear(4, 5)
    owner, name = place.split(".")
    (block if owner == "block" else block["runner"]).register_module(name, gate)
    find_gates(model)
    x = torch.randn(3, 4)
    assert torch.equal(layer._handle.predictor.predict(x), gate(x).topk(2).indices)


def test_mo21_a_router_that_chooses_by_biased_scores_is_predicted_by_these():
    layer = OffloadedModule()
    layer.e_score_correction_bias = torch.tensor([0.0, 0.0, 5.0])
    layer.look_ahead(lambda x: (x, None))  # vLLM's linear layers return a pair
    assert layer._handle.predictor.predict(torch.tensor([[3.0, 2.0, -9.0]])).tolist() == [[2, 0]]

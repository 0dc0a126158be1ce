"""Tokens and logprobs are bitwise those of plain vLLM, for every family and number of slots."""

from __future__ import annotations

import pytest

import vllm_moe_offload
from tests.support.tiny_models import write_tiny_model
from tests.vllm_moe_offload.engines import engine, generate

pytestmark = pytest.mark.vllm

# Family -> MoE layers, slot counts (of 8 experts a layer, top-2).
CASES = {
    "qwen3_moe": (3, [2, 3, 5, 8, 12, 24]),
    "mixtral": (3, [2, 7, 24]),
    "olmoe": (3, [9]),
    "gpt_oss": (3, [3]),
    "deepseek_v2": (2, [4]),
    "deepseek_v3": (2, [5]),
}


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    folder = write_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    with engine(folder) as llm:
        modules = {type(module).__name__ for module in _modules(llm)}
        plain = generate(llm)
    layers, slots = CASES[request.param]
    return folder, layers, slots, plain, modules


def _modules(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return list(worker.get_model().modules())


def test_mo01_without_the_key_no_class_of_ours_is_instantiated(family):
    *_, modules = family
    assert any("RoutedExperts" in name for name in modules)
    assert not any(name.startswith("Offloaded") for name in modules)


def test_mo03_bitwise_equal_for_every_number_of_slots(family):
    folder, layers, slots, plain, modules = family
    for count in slots:
        options = {"cache_fraction": count / (8 * layers), "policy": "lru", "debug_checks": True}
        vllm_moe_offload.moved_bytes()
        with engine(folder, options) as llm:
            assert generate(llm) == plain, f"{count} slots"
            (report,) = vllm_moe_offload.stats(llm)
            if count == 8 * layers:
                # All resident: not one module of ours, so a step is vLLM's own.
                assert {type(module).__name__ for module in _modules(llm)} == modules
                with pytest.raises(RuntimeError, match="all experts have a slot, so there is no cache"):
                    vllm_moe_offload.get_cache(llm)
            else:
                _check_mo02_slots(llm, vllm_moe_offload.get_cache(llm), count)
        assert report["num_slots"] == count
        assert report["num_layers"] == layers
        _check_mo16_counters(report)
        # MO-04: distinct experts of a prefill exceed few slots.
        assert (report["waves"] > 0) == (count < 8)
        assert (report["accesses"] > 0) == (count < 8 * layers)
        assert vllm_moe_offload.moved_bytes()["dram->hbm"] == report["bytes_host_to_device"]
        assert vllm_moe_offload.moved_bytes()["dram->hbm"] == 0


def test_mo21_a_look_ahead_through_the_next_gate_changes_no_result(family):
    """The runner holds the gate of Qwen3 and DeepSeek, the block that of Mixtral; gpt-oss has a router."""
    folder, _, _, plain, _ = family
    if folder.name.startswith(("olmoe", "deepseek_v2")):
        return  # their gates are where those of Mixtral and DeepSeek-V3 are
    options = {"slots_per_layer": 6, "policy": "lru", "prefetch": "gate", "debug_checks": True}
    with engine(folder, options) as llm:
        assert generate(llm) == plain
        (report,) = vllm_moe_offload.stats(llm)
    assert report["prefetch"] == "gate"
    assert report["prefetched"] >= report["prefetch_used"] > 0
    _check_mo16_counters(report)


def _check_mo02_slots(llm, cache, count):
    ours = [module for module in _modules(llm) if type(module).__name__.startswith("Offloaded")]
    assert len(ours) == cache.store.num_layers
    nbytes = 0
    for name, view in cache.views.items():
        assert view.shape[0] == count
        nbytes += view.nbytes
        for module in ours:
            assert getattr(module, name).data_ptr() == view.data_ptr()
    assert nbytes == count * cache.store.layout.expert_nbytes


def _check_mo16_counters(report):
    assert report["bytes_host_to_device"] == report["copies"] * report["expert_nbytes"]
    assert report["accesses"] == report["hits"] + report["late"] + report["misses"]

"""On one GPU: results equal plain vLLM, eager and with its default graphs; tiles, tracing, memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_moe_offload
from tests.support.tiny_models import write_tiny_model
from tests.vllm_moe_offload.engines import PROMPTS, engine, generate

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

EXPERTS, LAYERS = 16, 3
FAMILIES = {
    "qwen3_moe": {"num_experts": EXPERTS, "num_experts_per_tok": 4},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
}
# Four prompts of 5 to 14 tokens: 38 tokens in the first step use nearly all 16 experts of a layer.
SLOTS = {"qwen3_moe": [4, 7, 20, 48], "mixtral": [2, 9, 48]}
MODES = {
    "eager": {"enforce_eager": True},
    "graphs": {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}},
}


def gpu_engine(folder, options=None, **arguments):
    return engine(
        folder,
        options,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=8,
        **arguments,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = write_tiny_model(
        request.param, tmp_path_factory.mktemp(request.param), **FAMILIES[request.param]
    )
    return request.param, folder


@pytest.mark.parametrize("mode", MODES)
def test_mo03_mo12_bitwise_equal_on_a_gpu(family, mode):
    """Also with vLLM's default graphs, which stay as they are; a second plain engine is the control."""
    name, folder = family
    with gpu_engine(folder, **MODES[mode]) as llm:
        plain = generate(llm, tokens=16)
        graphs = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    if mode == "graphs":
        assert graphs.name == "FULL_AND_PIECEWISE"
        with gpu_engine(folder, **MODES[mode]) as llm:
            assert generate(llm, tokens=16) == plain, "plain vLLM differs from itself"
    slots = SLOTS[name] if mode == "eager" else SLOTS[name][1:]
    for count in slots:
        options = {"cache_fraction": count / (EXPERTS * LAYERS), "policy": "lru", "debug_checks": True}
        with gpu_engine(folder, options, **MODES[mode]) as llm:
            assert generate(llm, tokens=16) == plain, f"{count} slots, {mode}"
            compilation = llm.llm_engine.vllm_config.compilation_config
            assert compilation.cudagraph_mode == graphs
            assert not any("moe" in op for op in compilation.splitting_ops or ())
            (report,) = vllm_moe_offload.stats(llm)
            if count < EXPERTS * LAYERS:
                _check_mo02(vllm_moe_offload.get_cache(llm), count)
        assert report["num_slots"] == count
        assert (report["accesses"] > 0) == (count < EXPERTS * LAYERS)
        assert report["accesses"] == report["hits"] + report["misses"]
        assert report["misses"] + report["prefetched"] == report["copies"] + report["in_place"]
        assert report["bytes_host_to_device"] == report["copies"] * report["expert_nbytes"]


@pytest.mark.parametrize("mode", MODES)
def test_mo22_two_ranks_of_experts_equal_plain_vllm_with_two(tmp_path, mode):
    """Expert parallelism: each rank has half of the experts, and slots for some of these."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = write_tiny_model("qwen3_moe", tmp_path, **FAMILIES["qwen3_moe"], moe_intermediate_size=64)
    arguments = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "distributed_executor_backend": "mp",
        **MODES[mode],
    }
    with gpu_engine(folder, **arguments) as llm:
        plain = generate(llm, tokens=16)
    options = {"cache_fraction": 0.3, "policy": "lru", "debug_checks": True}
    with gpu_engine(folder, options, **arguments) as llm:
        assert generate(llm, tokens=16) == plain
        ranks = vllm_moe_offload.stats(llm)
    assert len(ranks) == 2
    for report in ranks:
        assert report["num_experts"] == EXPERTS // 2
        assert report["accesses"] == report["hits"] + report["misses"]
        assert report["misses"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_mo21_a_look_ahead_changes_no_result(family, mode):
    """Predicted experts are pulled on a side stream beside the running layer, which the graphs record."""
    name, folder = family
    with gpu_engine(folder, **MODES[mode]) as llm:
        plain = generate(llm, tokens=16)
    options = {"cache_fraction": 0.4, "policy": "lru", "prefetch": "gate", "debug_checks": True}
    with gpu_engine(folder, options, **MODES[mode]) as llm:
        assert generate(llm, tokens=16) == plain, f"{name}, {mode}"
        (report,) = vllm_moe_offload.stats(llm)
    assert report["prefetched"] >= report["prefetch_used"] > 0
    assert report["misses"] + report["prefetched"] == report["copies"] + report["in_place"]


def test_mo03_copies_by_the_host_equal_plain_vllm_without_graphs(family):
    name, folder = family
    with gpu_engine(folder) as llm:
        plain = generate(llm, tokens=16)
    options = {"cache_fraction": SLOTS[name][1] / (EXPERTS * LAYERS), "policy": "lru", "debug_checks": True}
    with gpu_engine(folder, {**options, "miss": "copy"}) as llm:
        assert generate(llm, tokens=16) == plain
        (report,) = vllm_moe_offload.stats(llm)
    assert report["waves"] > 0
    assert report["misses"] == report["copies"] > 0


def write_fp8_blocks(folder: Path) -> Path:
    """Quantise experts and attention of a tiny model in blocks of 128 x 128, as DeepSeek-V3's are."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [
        name for name in tensors if re.search(r"(experts\.\d+\.\w+|self_attn\.\w)_proj\.weight$", name)
    ]:
        weight = tensors.pop(name).float()
        rows, columns = weight.shape
        blocks = weight.view(rows // 128, 128, columns // 128, 128)
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
        tensors[name] = (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.view(rows // 128, columns // 128).float()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_mo13_experts_in_fp8_blocks_equal_plain_vllm_bitwise(tmp_path, mode):
    folder = write_tiny_model(
        "qwen3_moe",
        tmp_path,
        hidden_size=128,
        moe_intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
    )
    write_fp8_blocks(folder)
    arguments = {"moe_backend": "triton", **MODES[mode]}
    with gpu_engine(folder, **arguments) as llm:
        plain = generate(llm, tokens=16)
    options = {"cache_fraction": 9 / 48, "policy": "lru", "debug_checks": True}
    with gpu_engine(folder, options, **arguments) as llm:
        assert generate(llm, tokens=16) == plain
        cache = vllm_moe_offload.get_cache(llm)
        assert cache.views["w13_weight"].dtype == torch.float8_e4m3fn
        assert any("scale" in name for name in cache.views)
        assert vllm_moe_offload.stats(llm)[0]["misses"] > 0


def test_mo05_tracing_under_graphs_counts_every_token_once(family):
    _, folder = family
    options = {"cache_fraction": 0.4, "policy": "eam", "record_trace": True}
    with gpu_engine(folder, options, **MODES["graphs"]) as llm:
        generate(llm, tokens=12)
        trace = vllm_moe_offload.collect_trace(llm)
        generate(llm, [{"prompt_token_ids": [5, 6, 7]}], tokens=2)
        eams = vllm_moe_offload.request_eams(llm)
        (report,) = vllm_moe_offload.stats(llm)
    for index, prompt in enumerate(PROMPTS):
        tokens = len(prompt["prompt_token_ids"]) + 12 - 1
        matrix = eams[str(index)]
        assert (matrix.sum(axis=1) == tokens * trace.top_k).all(), index
        place = trace.request_ids.index(str(index))
        assert (trace.eam(place) == matrix).all()
    assert report["accesses"] > 0


def _check_mo02(cache, count):
    assert cache.device.type == "cuda"
    assert cache.num_slots == count
    for view in cache.views.values():
        assert view.shape[0] == count
        assert view.is_cuda
    assert cache.store.record(0, 0).is_pinned()


def test_trap7_tiles_are_those_of_the_plain_shape(family, monkeypatch):
    """Whatever the number of slots, vLLM's kernel runs with the config it would pick for all experts."""
    _, folder = family
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    used: list[tuple[int, tuple]] = []
    original = triton_moe.invoke_fused_moe_triton_kernel

    def spy(a, b, *args, **kwargs):
        config = next(argument for argument in args if isinstance(argument, dict))
        used.append((args[0].shape[0], tuple(sorted(config.items()))))
        return original(a, b, *args, **kwargs)

    monkeypatch.setattr(triton_moe, "invoke_fused_moe_triton_kernel", spy)
    with gpu_engine(folder) as llm:
        used.clear()
        generate(llm)
        plain = set(used)
    with gpu_engine(folder, {"cache_fraction": 5 / 48, "policy": "lru"}) as llm:
        used.clear()
        generate(llm)
    assert set(used) == plain


def test_mo11_each_missing_expert_moves_at_most_once_per_layer_pass(family):
    _, folder = family
    with gpu_engine(folder, {"cache_fraction": 6 / 48, "policy": "lru"}) as llm:
        before = vllm_moe_offload.stats(llm)[0]
        generate(llm, [{"prompt_token_ids": list(range(2, 100))}], tokens=1)
        after = vllm_moe_offload.stats(llm)[0]
    moved, missed = (after[name] - before[name] for name in ("copies", "misses"))
    assert 0 < moved <= missed <= EXPERTS * LAYERS


def test_mo10_experts_are_created_on_the_host(tmp_path):
    """Loading takes device memory for what is not an expert and, at a time, for one layer of experts."""
    folder = write_tiny_model(
        "qwen3_moe",
        tmp_path,
        hidden_size=512,
        moe_intermediate_size=512,
        num_experts=32,
        num_hidden_layers=6,
    )
    with gpu_engine(folder, {"slots_per_layer": 4, "policy": "lru"}, load_format="safetensors") as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        cache = vllm_moe_offload.get_cache(llm)
        other = sum(
            parameter.nbytes
            for name, parameter in worker.get_model().named_parameters()
            if not name.endswith(("w13_weight", "w2_weight"))
        )
        layer = 32 * cache.store.layout.nbytes
        slots = cache.num_slots * cache.store.layout.nbytes
        # The allocator reserves memory in blocks of up to 20 MiB for each size class.
        used = worker.model_runner.model_memory_usage
        assert used <= other + slots + layer + (40 << 20)
        assert used < other + slots + 3 * layer

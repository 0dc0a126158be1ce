"""Tracing in the real engine, with a small KV cache, chunked prefill, prefix caching and many requests."""

from __future__ import annotations

import numpy as np
import pytest

import vllm_moe_offload
from tests.support.tiny_models import write_tiny_model
from tests.vllm_moe_offload.engines import engine, generate

pytestmark = pytest.mark.vllm
LAYERS, EXPERTS, TOP_K, SLOTS = 3, 8, 2, 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run: lengths of prompts and outputs, trace, matrices, counters; then a request that flushes."""
    folder = write_tiny_model("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))
    prompts = [{"prompt_token_ids": [(11 * i + j) % 250 + 2 for j in range(3 + 9 * i)]} for i in range(6)]
    arguments = {
        "max_num_batched_tokens": 16,  # prompts of up to 48 tokens are computed in chunks
        "max_num_seqs": 4,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "block_size": 32,
    }
    options = {"cache_fraction": SLOTS / (LAYERS * EXPERTS), "policy": "eam", "record_trace": True}
    with engine(folder, **arguments) as llm:
        plain = generate(llm, prompts)
    with engine(folder, options, **arguments) as llm:
        outputs = generate(llm, prompts)
        report = vllm_moe_offload.stats(llm)[0]
        trace = vllm_moe_offload.collect_trace(llm)
        generate(llm, prompts[:1], tokens=1)
        generate(llm, prompts[:1], tokens=1)
        eams = vllm_moe_offload.request_eams(llm)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        (live,) = vllm_moe_offload.vllm_runner._offload_of_worker(worker).estimators
        yield {
            "plain": plain,
            "outputs": outputs,
            "report": report,
            "trace": trace,
            "eams": eams,
            "live": live.tracer.live,
            "prompts": prompts,
        }


def test_mo05_tracing_changes_no_result(run):
    assert run["outputs"] == run["plain"]


def test_mo05_row_sums_are_tokens_computed_times_top_k(run):
    for index, prompt in enumerate(run["prompts"]):
        # The last sampled token is never computed; nothing is cached at the first use of a prompt.
        tokens = len(prompt["prompt_token_ids"]) + 8 - 1
        matrix = run["eams"][str(index)]
        assert matrix.shape == (LAYERS, EXPERTS)
        assert (matrix.sum(axis=1) == tokens * TOP_K).all(), index


def test_mo05_no_request_state_is_left(run):
    # vLLM reports a finished request with the next step: of three batches only the last one may be live.
    assert len(run["live"]) <= 1
    assert set(run["eams"]) >= {str(index) for index in range(7)}


def test_mo17_trace_and_matrices_agree(run):
    trace = run["trace"]
    assert trace.num_layers == LAYERS
    assert trace.num_experts == EXPERTS
    for index, name in enumerate(trace.request_ids):
        np.testing.assert_array_equal(trace.eam(index), run["eams"][name])


def test_mo17_replay_hits_equal_the_engine(run):
    result = vllm_moe_offload.replay(run["trace"], num_slots=SLOTS, policy="eam")
    for name in ("accesses", "hits", "misses", "evictions"):
        assert getattr(result, name) == run["report"][name], name
    assert result.bytes_moved == run["report"]["copies"]

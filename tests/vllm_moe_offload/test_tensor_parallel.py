"""Two ranks, each with its own part of every expert and its own slots."""

from __future__ import annotations

import pytest

import vllm_moe_offload
from tests.support.tiny_models import write_tiny_model
from tests.vllm_moe_offload.engines import engine, generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_mo14_two_ranks_give_what_plain_vllm_gives_with_two(tmp_path):
    folder = write_tiny_model("qwen3_moe", tmp_path, moe_intermediate_size=64)
    arguments = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(folder, **arguments) as llm:
        plain = generate(llm)
    with engine(folder, {"cache_fraction": 5 / 24, "policy": "lru"}, **arguments) as llm:
        assert generate(llm) == plain
        ranks = vllm_moe_offload.stats(llm)
        eams = vllm_moe_offload.request_eams(llm)
    assert len(ranks) == 2
    assert ranks[0] == ranks[1] | {"stall_seconds": ranks[0]["stall_seconds"]}
    assert ranks[0]["num_slots"] == 5
    assert ranks[0]["expert_nbytes"] == 3 * 64 * 64 * 2 // 2
    assert ranks[0]["misses"] > 0
    assert ranks[0]["bytes_host_to_device"] == ranks[0]["copies"] * ranks[0]["expert_nbytes"]
    assert isinstance(eams, dict)

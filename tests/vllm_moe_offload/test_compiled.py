"""With torch.compile the expert step is one opaque op, and results equal compiled plain vLLM."""

from __future__ import annotations

import pytest

from tests.support.tiny_models import write_tiny_model
from tests.vllm_moe_offload.engines import engine, generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_mo12_compiled_is_bitwise_equal_to_compiled_plain(tmp_path):
    folder = write_tiny_model("mixtral", tmp_path)
    with engine(folder, enforce_eager=False) as llm:
        plain = generate(llm)
    for slots in (5, 24):
        with engine(folder, {"cache_fraction": slots / 24}, enforce_eager=False) as llm:
            assert generate(llm) == plain, f"{slots} of 24 slots"

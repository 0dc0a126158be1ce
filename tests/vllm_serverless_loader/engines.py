"""Engines on tiny models for these tests: one at a time, shut down before the next one starts."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

PROMPTS = [{"prompt_token_ids": [(7 * i + j * j) % 250 + 2 for j in range(5 + 3 * i)]} for i in range(4)]


def greedy_ids(model: str | Path, extra: dict[str, Any] | None = None, **arguments: Any) -> list[list[int]]:
    """Start vLLM on ``model``, answer a few prompts greedily, shut down.

    ``extra`` goes to our loader; None is vLLM's own.
    """
    from vllm import LLM, SamplingParams

    if extra is not None:
        arguments |= {"load_format": "serverless_llm", "model_loader_extra_config": extra}
    settings = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "seed": 0,
    }
    llm = LLM(model=str(model), **(settings | arguments))
    try:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        # vLLM's groups are torn down when the old engine is collected, which must not hit the next engine.
        gc.collect()

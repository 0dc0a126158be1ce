"""Engines on tiny models for these tests: one at a time, shut down before the next one starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPTS = [{"prompt_token_ids": [(7 * i + j * j) % 250 + 2 for j in range(5 + 3 * i)]} for i in range(4)]


@contextmanager
def engine(model: str | Path, options: dict[str, Any] | None = None, **arguments: Any) -> Iterator[Any]:
    """A vLLM engine in this process; ``options`` go to the plugin."""
    from vllm import LLM

    if options is not None:
        arguments["additional_config"] = {"moe_offload": options}
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
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        # vLLM's groups are torn down when the old engine is collected, which must not hit the next engine.
        gc.collect()


def generate(llm: Any, prompts: list[Any] | None = None, tokens: int = 8) -> list[Any]:
    """Greedy ids and the logprobs of the three likeliest tokens at each position."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=3, ignore_eos=True, detokenize=False)
    outputs = llm.generate(PROMPTS if prompts is None else prompts, params, use_tqdm=False)
    return [
        (
            list(output.outputs[0].token_ids),
            [
                {token: entry.logprob for token, entry in place.items()}
                for place in output.outputs[0].logprobs
            ],
        )
        for output in outputs
    ]

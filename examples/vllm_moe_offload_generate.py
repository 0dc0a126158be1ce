"""Generate with a quarter of the experts in slots, on a tiny random model; runs on a CPU in seconds.

python examples/vllm_moe_offload_generate.py [MODEL_FOLDER]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# One process, little memory: only for the CPU build of vLLM, which otherwise starts three processes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    from vllm import LLM, SamplingParams

    import vllm_moe_offload
    from tests.support.tiny_models import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1] if len(sys.argv) > 1 else str(write_tiny_model("qwen3_moe", folder))
        llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            distributed_executor_backend="uni",
            additional_config={"moe_offload": {"cache_fraction": 0.25}},
        )
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], params)
        print("tokens:", list(outputs[0].outputs[0].token_ids))
        for name, value in vllm_moe_offload.stats(llm)[0].items():
            print(f"{name:>22}: {value}")


if __name__ == "__main__":
    main()

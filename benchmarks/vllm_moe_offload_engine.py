"""What the plugin costs on a CPU: plain vLLM, all experts in slots, a quarter of them.

    python benchmarks/vllm_moe_offload_engine.py [--out DIR] [--rounds 12]

examples/tiny_moe (6 layers x 32 experts, top-4), greedy, 4 requests at once, vLLM's CPU build. One engine an
arm, all in this process; they generate in turn, every second round backwards. Host memory and "device" memory
are one here, so the figure of interest is that of all experts resident. Times are of the processor, so that
other programs count little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common import RESULTS, Headline, interleaved, write_result

MODEL = Path(__file__).parents[1] / "examples" / "tiny_moe" / "model"
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "all resident": {"cache_fraction": 1.0},
    "a quarter resident, eam": {"cache_fraction": 0.25},
    "a quarter resident, lru": {"cache_fraction": 0.25, "policy": "lru"},
}
REQUESTS, TOKENS = 4, 64


def start(options: dict[str, Any] | None) -> Any:
    """An engine in this process."""
    from vllm import LLM

    more = {} if options is None else {"additional_config": {"moe_offload": options}}
    return LLM(
        model=str(MODEL),
        enforce_eager=True,
        max_model_len=256,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        seed=0,
        **more,
    )


def generate(llm: Any) -> list[list[int]]:
    """Ids of four greedy answers."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [(7 * row + j * j) % 90 + 3 for j in range(12)]} for row in range(REQUESTS)
    ]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    import vllm_moe_offload

    engines = {arm: start(options) for arm, options in ARMS.items()}
    ids = {arm: generate(llm) for arm, llm in engines.items()}
    samples = interleaved(
        {arm: partial(generate, llm) for arm, llm in engines.items()},
        repeats=arguments.rounds,
        clock=process_time,
    )
    rows, hit_rate = [], {}
    for arm, times in samples.items():
        # Of the same round: what slows one arm mostly slows its neighbours too.
        ratios = [value / plain for value, plain in zip(times, samples["plain"], strict=True)]
        note = f"ids equal plain: {ids[arm] == ids['plain']}"
        if ARMS[arm] is not None and (counters := vllm_moe_offload.stats(engines[arm])[0])["accesses"]:
            hit_rate[arm] = counters["hits"] / counters["accesses"]
            note += f", hit rate {hit_rate[arm]:.3f}"
        target = "<= 1.03" if arm == "all resident" else ""
        median = statistics.median(ratios)
        low, high = statistics.quantiles(ratios, n=20)[::18] if len(ratios) > 1 else (median, median)
        rows.append(Headline(f"processor time, {arm}", median, "x plain", low, high, target, note))
        step = statistics.median(times) / TOKENS * 1e3
        print(
            f"{arm}: {step:.2f} ms a step, {median:.3f} ({low:.3f} to {high:.3f}) x plain, {note}", flush=True
        )
    write_result(
        "vllm_moe_offload_engine",
        question="What does the plugin cost on a CPU where nothing is gained by it?",
        headline=rows,
        samples=samples,
        folder=arguments.out,
        workload={"requests": REQUESTS, "tokens": TOKENS, "rounds": arguments.rounds},
        hit_rate=hit_rate,
    )
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

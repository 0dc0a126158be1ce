"""What the plugin costs on a CPU: plain vLLM, all experts in slots, a quarter of them.

    python benchmarks/vllm_moe_offload_engine.py [--out DIR] [--rounds 3]

examples/tiny_moe (6 layers x 32 experts, top-4), greedy, 4 requests at once, vLLM's CPU build. Engines
cannot run side by side in one process: the arms take turns, a new engine each time, and every second round
goes backwards. Host memory and "device" memory are one here, so the figure of interest is that of all
experts resident. Times are of the processor, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common import RESULTS, Headline, write_result

MODEL = Path(__file__).parents[1] / "examples" / "tiny_moe" / "model"
ARMS = {
    "plain": None,
    "all_resident": {"cache_fraction": 1.0},
    "quarter_resident": {"cache_fraction": 0.25},
}
REQUESTS, TOKENS, REPEATS = 4, 96, 3


def run(options: dict | None) -> tuple[list[float], list[list[int]], dict]:
    """Processor seconds of each repeat, the ids, and the plugin's counters of an engine of its own."""
    from vllm import LLM, SamplingParams

    import vllm_moe_offload

    more = {} if options is None else {"additional_config": {"moe_offload": options}}
    llm = LLM(
        model=str(MODEL),
        enforce_eager=True,
        max_model_len=256,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        seed=0,
        **more,
    )
    try:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [(7 * row + j * j) % 90 + 3 for j in range(12)]} for row in range(REQUESTS)
        ]
        llm.generate(prompts, params, use_tqdm=False)
        times, ids = [], []
        for _ in range(REPEATS):
            start = time.process_time()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            times.append(time.process_time() - start)
            ids = [list(output.outputs[0].token_ids) for output in outputs]
        counters = {} if options is None else vllm_moe_offload.stats(llm)[0]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return times, ids, counters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    samples: dict[str, list[float]] = {arm: [] for arm in ARMS}
    ids: dict[str, list[list[int]]] = {}
    hit_rate = {}
    for turn in range(arguments.rounds):
        for arm in list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]:
            times, ids[arm], counters = run(ARMS[arm])
            samples[arm] += times
            if counters.get("accesses"):
                hit_rate[arm] = counters["hits"] / counters["accesses"]
            print(f"{arm}: {statistics.median(times):.3f} s", flush=True)
    plain = statistics.median(samples["plain"])
    rows = []
    for arm, times in samples.items():
        ratios = [value / plain for value in times]
        note = f"ids equal plain: {ids[arm] == ids['plain']}"
        if arm in hit_rate:
            note += f", hit rate {hit_rate[arm]:.3f}"
        target = "<= 1.03" if arm == "all_resident" else ""
        median = statistics.median(ratios)
        rows.append(
            Headline(f"processor time, {arm}", median, "x plain", min(ratios), max(ratios), target, note)
        )
    write_result(
        "vllm_moe_offload_engine",
        question="What does the plugin cost on a CPU where nothing is gained by it?",
        headline=rows,
        samples=samples,
        folder=arguments.out,
        workload={"requests": REQUESTS, "tokens": TOKENS, "rounds": arguments.rounds, "repeats": REPEATS},
        hit_rate=hit_rate,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

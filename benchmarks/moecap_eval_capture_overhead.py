"""What does recording cost on a CPU, by time per output token?

    python benchmarks/moecap_eval_capture_overhead.py [--out DIR] [--budget 90]

One engine on examples/tiny_moe whose recording is switched on and off, in turn, so that both arms share
everything else; each batch size gets a third of the seconds left after the engine's start. Processor time
includes counting what was recorded. The GPU's figures are in moecap_eval_gpu.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common import RESULTS, Headline, write_result
from moecap_eval import paired_ratio
from moecap_eval.engines import vllm as engine

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny_moe" / "model"
BATCHES, TOKENS = (1, 8, 32), 48
MIN_REPEATS = 2
ARMS = {"not recorded": True, "recorded": False, "not recorded again": True}  # name -> paused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds in all")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.budget
    engine.limit_threads(1)
    llm = engine.open_llm(str(MODEL), max_num_seqs=max(BATCHES), enable_prefix_caching=False)
    headline, samples = [], {}
    for position, batch in enumerate(BATCHES):
        until = time.perf_counter() + (deadline - time.perf_counter()) / (len(BATCHES) - position)
        wall: dict[str, list[float]] = {arm: [] for arm in ARMS}
        cpu: dict[str, list[float]] = {arm: [] for arm in ARMS}
        turn = 0
        while time.perf_counter() < until or turn <= MIN_REPEATS:
            names = list(ARMS)[turn % 3 :] + list(ARMS)[: turn % 3]
            for arm in names:
                llm.collective_rpc("moecap_pause", args=(ARMS[arm],))
                begin = time.process_time()
                per_token = time_per_token(llm, batch)
                engine.drain_steps(llm)
                if turn:  # the first turn warms up
                    wall[arm].append(per_token)
                    cpu[arm].append(time.process_time() - begin)
            turn += 1
        samples |= {f"batch {batch}, seconds per token, {arm}": values for arm, values in wall.items()}
        samples |= {f"batch {batch}, processor seconds, {arm}": values for arm, values in cpu.items()}
        for what, seconds in (("time per token", wall), ("processor time", cpu)):
            cost = paired_ratio(seconds["not recorded"], seconds["recorded"])
            control = paired_ratio(seconds["not recorded"], seconds["not recorded again"])
            note = f"{1e3 * statistics.median(wall['not recorded']):.2f} ms a token, {turn - 1} pairs; not "
            note += f"recorded against itself: {control.low:.4f} to {control.high:.4f}"
            headline.append(
                Headline(
                    f"{what}, recorded over not, batch {batch}",
                    cost.value,
                    "x",
                    cost.low,
                    cost.high,
                    target="bound <= 1.01",
                    note=note,
                )
            )
            print(headline[-1], flush=True)
    write_result(
        "moecap_eval_capture_overhead",
        question="What does recording cost on a CPU, by time per output token?",
        headline=headline,
        samples=samples,
        folder=arguments.out,
    )
    return 0


def time_per_token(llm: object, batch: int) -> float:
    """Mean seconds of each output token after the first."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts = [f"sort {number:05d}=" for number in range(batch)]
    outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[attr-defined]
    spans = [output.metrics.last_token_ts - output.metrics.first_token_ts for output in outputs]
    return statistics.mean(spans) / (TOKENS - 1)


if __name__ == "__main__":
    sys.exit(main())

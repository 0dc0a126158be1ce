"""Does the harness report the throughput that `vllm bench throughput` reports, for the same requests?

    python benchmarks/moecap_eval_vllm_bench.py [--out DIR] [--repeats 16]

Two engines in one process with the same arguments: a plain one, timed by the loop of `vllm bench
throughput`, and a recording one, timed as `moecap run` does. The model is examples/tiny_moe; the loop of
vLLM gets the lengths of the answers, so that both generate the same number of tokens. They work in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common import RESULTS, Headline, write_result
from moecap_eval import ArmConfig, RunContext, load_hardware, paired_ratio
from moecap_eval.engines import vllm as engine
from moecap_eval.workloads.text_generation import TextGeneration

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny_moe"
PARAMS = {
    "model": str(EXAMPLE / "model"),
    "tasks": str(EXAMPLE / "tasks"),
    "limit": 96,
    "max_new_tokens": 24,
    "concurrency": 32,
    "threads": 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--repeats", type=int, default=16)
    arguments = parser.parse_args()
    hardware = load_hardware("cpu-reference")
    workload, context = TextGeneration(), RunContext(7, Path(), hardware, PARAMS)
    system = workload.open(ArmConfig("recorded"), context)
    items = workload.items(PARAMS, 7)
    answers = engine.generate(
        system.llm, [item.payload.prompt for item in items], max_new_tokens=PARAMS["max_new_tokens"]
    )
    tokens = sum(len(answer.token_ids) for answer in answers)
    plain = engine.open_llm(
        PARAMS["model"],
        profile=False,
        max_num_seqs=PARAMS["concurrency"],
        enable_prefix_caching=False,
        seed=7,
    )
    peer = peer_of(
        plain, [(item.payload.prompt, len(a.token_ids)) for item, a in zip(items, answers, strict=True)]
    )

    def harness() -> float:
        begin = system.clock()
        result = system.run(items)
        seconds = system.clock() - begin
        if result.work != tokens:
            raise RuntimeError(f"{result.work} tokens, expected {tokens}")
        return seconds

    arms: dict[str, Callable[[], float]] = {"vllm bench": peer, "moecap": harness}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(arguments.repeats + 1):
        for name in list(arms) if turn % 2 else list(arms)[::-1]:
            begin = time.process_time()
            seconds = arms[name]()
            if turn:  # the first turn warms up
                wall[name].append(seconds)
                cpu[name].append(time.process_time() - begin)
    rate = paired_ratio(wall["moecap"], wall["vllm bench"])  # throughput is inverse to time
    work = paired_ratio(cpu["vllm bench"], cpu["moecap"])
    note = f"{tokens} tokens a run, {tokens / statistics.median(wall['vllm bench']):.0f} tokens/s"
    write_result(
        "moecap_eval_vllm_bench",
        question="Does the harness report the throughput of `vllm bench throughput` for the same requests?",
        headline=[
            Headline(
                "throughput, moecap over vllm bench",
                rate.value,
                "x",
                rate.low,
                rate.high,
                target="interval within [0.98, 1.02]",
                note=note,
            ),
            Headline(
                "processor time of a whole run, reading the records included",
                work.value,
                "x",
                work.low,
                work.high,
                note="moecap over vllm bench",
            ),
        ],
        samples={
            **{f"{name}, seconds": values for name, values in wall.items()},
            **{f"{name}, processor seconds": values for name, values in cpu.items()},
        },
        folder=arguments.out,
        tokens=tokens,
    )
    print(rate, work, sep="\n")
    return 0


def peer_of(llm: object, requests: list[tuple[str, int]]) -> Callable[[], float]:
    """The timing loop of `vllm bench throughput` over texts and output lengths."""
    from vllm.benchmarks import throughput
    from vllm.benchmarks.datasets import SampleRequest

    samples = [
        SampleRequest(prompt=text, prompt_len=len(text) + 1, expected_output_len=length)
        for text, length in requests
    ]

    def run() -> float:
        seconds, _ = throughput._run_vllm_requests(
            llm,
            samples,
            n=1,
            disable_detokenize=False,
            do_profile=False,
            prequeue_requests=False,
            enable_lora=False,
        )
        return float(seconds)

    return run


if __name__ == "__main__":
    sys.exit(main())

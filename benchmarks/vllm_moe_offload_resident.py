"""All experts resident against plain vLLM on a GPU: two engines in one process that decode in turn.

    python benchmarks/vllm_moe_offload_resident.py [--out DIR] [--layers 8] [--rounds 12] [--budget 110]

Model, routing and graphs are those of vllm_moe_offload_gpu.py. Both engines are started before anything is
timed. In a round they decode in turn, plain twice: before and after the other. The ratio of a round is the
median step of the one with all experts resident over the mean of plain's two; plain's second median over its
first is the control.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import vllm_moe_offload_gpu as gpu
from benchmarks.common import RESULTS, Headline, write_result

ARMS = ("plain", "ours_100")
STEPS, SECONDS = 60, 2.0


def start(arm: str, folder: Path, layers: int) -> Any:
    """An engine with a small KV cache, so that two fit."""
    from vllm import LLM

    return LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=max(gpu.BATCHES),
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        enforce_eager=gpu.DEVICE == "cpu",
        distributed_executor_backend="uni",
        compilation_config={"cudagraph_capture_sizes": list(gpu.BATCHES)},
        seed=0,
        **gpu.engine_arguments(arm, layers),
    )


def workspaces() -> Any:
    """What vLLM's kernels borrow memory from; the next engine replaces it, recorded graphs point to it."""
    from vllm.v1.worker import workspace

    return workspace.current_workspace_manager() if workspace.is_workspace_manager_initialized() else None


def one_round(engines: dict[str, Any], strategy: gpu.Replayed, batch: int) -> dict[str, dict[str, Any]]:
    """Steps and ids of plain, all resident, and plain again."""
    order = {"plain": "plain", "ours_100": "ours_100", "plain_again": "plain"}
    found = {}
    for turn, arm in order.items():
        strategy.step.zero_()
        found[turn] = gpu.run_steps(engines[arm], batch, STEPS, SECONDS)
    return found


def summary(batch: int, rounds: list[dict[str, dict[str, Any]]]) -> list[Headline]:
    """Ratios of the rounds, with the lowest and the highest."""
    medians = [{arm: statistics.median(found["step_ms"]) for arm, found in turn.items()} for turn in rounds]
    ours = [2 * turn["ours_100"] / (turn["plain"] + turn["plain_again"]) for turn in medians]
    control = [turn["plain_again"] / turn["plain"] for turn in medians]
    equal = all(turn["ours_100"]["ids"] == turn["plain"]["ids"] for turn in rounds)
    plain = [turn["plain"] for turn in medians]
    return [
        Headline(f"batch {batch}: plain", statistics.median(plain), "ms/step", min(plain), max(plain)),
        Headline(
            f"batch {batch}: all resident",
            statistics.median(ours),
            "x plain",
            min(ours),
            max(ours),
            "<= 1.03",
            f"ids equal plain: {equal}",
        ),
        Headline(
            f"batch {batch}: plain again (control)",
            statistics.median(control),
            "x plain",
            min(control),
            max(control),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--budget", type=float, default=110, help="seconds; no round begins after them")
    arguments = parser.parse_args()
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {line}", flush=True)

    from vllm.model_executor.model_loader import dummy_loader

    dummy_loader.initialize_dummy_weights = gpu.fast_dummy_weights
    strategy = gpu.Replayed(arguments.layers)
    gpu.register(strategy)
    engines, kept = {}, []
    with tempfile.TemporaryDirectory() as name:
        gpu.write_config(Path(name), arguments.layers)
        for arm in ARMS:
            engines[arm] = start(arm, Path(name), arguments.layers)
            kept.append(workspaces())
            say(f"{arm} started")
    strategy.load(gpu.routing("topic_local", arguments.layers))
    for batch in gpu.BATCHES:
        one_round(engines, strategy, batch)
    measured: dict[int, list[dict[str, dict[str, Any]]]] = {batch: [] for batch in gpu.BATCHES}
    for turn in range(arguments.rounds):
        if turn and time.perf_counter() - began > arguments.budget:
            say(f"no time left after {turn} rounds")
            break
        for batch, rounds in measured.items():
            rounds.append(one_round(engines, strategy, batch))
    rows = [row for batch, rounds in measured.items() for row in summary(batch, rounds)]
    for row in rows:
        say(f"{row.what}: {row.value:.3f} ({row.low:.3f} to {row.high:.3f}) {row.unit} {row.note}")
    write_result(
        "vllm_moe_offload_resident",
        question="What does the plugin cost on a GPU that holds all experts?",
        headline=rows,
        samples={
            f"{arm}, batch {batch}": [ms / 1e3 for found in rounds for ms in found[arm]["step_ms"]]
            for batch, rounds in measured.items()
            for arm in ("plain", "ours_100", "plain_again")
        },
        folder=arguments.out,
        layers=arguments.layers,
        rounds=len(measured[1]),
        graphs={
            arm: llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name
            for arm, llm in engines.items()
        },
        device_memory_bytes=torch.cuda.memory_allocated() if gpu.DEVICE == "cuda" else None,
    )
    # The result is written: taking two engines apart in order would only take time.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

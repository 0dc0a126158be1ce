"""How long does a client wait while its request moves: rounds against stop-and-replay?

python benchmarks/vllm_serverless_loader_migration.py [--out FOLDER] [--engine vllm|simulated] [--repeats N]
    [--budget SECONDS]

``vllm`` (default): two real engines, each with a process of its own, float32 on the CPU; a random dense model
of 20 M parameters, whose prefill of 2048 tokens takes about a hundred decode steps. Every prompt is new to
both. ``simulated``: engines with the step and prefill times of an 8B model on one GPU (20 ms a step, 0.1 ms a
prefilled token). Pause: from the stop of the source to the first token of the destination. Stop-and-replay
stops the source first, as a migration without rounds must.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from vllm_serverless_loader import RequestState, SimulatedEngine, TokenRouter  # noqa: E402

STEP_S, PREFILL_S = 0.02, 1e-4
# One core for each engine; nothing is fetched or reported.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


async def one(
    source: Any, destination: Any, request: RequestState, before: int, *, rounds: bool, gap: int
) -> dict[str, float]:
    """Serve, move once after ``before`` tokens; the client's pause in seconds."""
    router = TokenRouter(source)
    arrivals: list[float] = []

    async def client() -> None:
        async for _ in router.generate(request):
            arrivals.append(time.perf_counter())

    stream = asyncio.ensure_future(client())
    while len(arrivals) < before:
        await asyncio.sleep(STEP_S / 4)
    if rounds:
        report = await router.migrate(destination, max_gap_tokens=gap)
        moved = report.requests[0]
        found = {"pause_s": moved.pause_s, "rounds": len(moved.rounds)}
        found["last_round_s"] = moved.rounds[-1].seconds
    else:
        # Without rounds nothing of the context is at the destination when the source stops.
        router_live = next(iter(router._live.values()))
        begin = time.perf_counter()
        await router._stop(router_live)
        router._start(router_live, destination)
        await router_live.moved.wait()
        found = {"pause_s": time.perf_counter() - begin, "rounds": 0, "last_round_s": 0.0}
    steps = [b - a for a, b in itertools.pairwise(arrivals[:before])]
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    return {**found, "step_s": statistics.median(steps)}


def simulated(context: int, rounds: bool) -> dict[str, float]:
    def engine() -> SimulatedEngine:
        return SimulatedEngine(step_s=STEP_S, prefill_s_per_token=PREFILL_S)

    prompt = tuple(range(context))
    request = RequestState("r", prompt, sampling={"max_tokens": 12 + int(context * PREFILL_S / STEP_S) + 60})
    return asyncio.run(one(engine(), engine(), request, 8, rounds=rounds, gap=4))


def measure(
    run: Callable[[int, bool], dict[str, float]], contexts: list[int], repeats: int, deadline: float
) -> tuple[list, dict]:
    """Arms and contexts take turns; no turn begins after ``deadline``, but three are made."""
    found: dict[tuple[int, bool], list[dict[str, float]]] = {
        (context, rounds): [] for context in contexts for rounds in (True, False)
    }
    for turn in range(repeats):
        if turn >= 3 and time.monotonic() > deadline:
            break
        for context, rounds in list(found) if turn % 2 == 0 else list(found)[::-1]:
            found[context, rounds].append(run(context, rounds))
    headline: list[Headline] = []
    samples: dict[str, list[float]] = {}
    for context in contexts:
        moved, replayed = found[context, True], found[context, False]
        for rows, name in ((moved, "rounds"), (replayed, "stop and replay")):
            pauses = [row["pause_s"] for row in rows]
            samples[f"pause, context {context}, {name}"] = pauses
            headline.append(summary(f"pause at context {context}, {name}", pauses, "s"))
        samples[f"last round's prefill, context {context}"] = [row["last_round_s"] for row in moved]
        samples[f"decode step, context {context}"] = [row["step_s"] for row in moved]
        samples[f"rounds (count), context {context}"] = [row["rounds"] for row in moved]
        ratios = [a["pause_s"] / b["pause_s"] for a, b in zip(replayed, moved, strict=True)]
        target = ">= 3" if context >= 2048 else ""
        what = f"pause of stop and replay over rounds, context {context}"
        headline.append(summary(what, ratios, "x", target))
        bound = [row["pause_s"] / (2 * row["step_s"] + row["last_round_s"]) for row in moved]
        what = f"pause over (two steps + last round's prefill), context {context}"
        headline.append(summary(what, bound, "x", "<= 1"))
        print(context, [round(row.value or 0, 4) for row in headline[-4:]], flush=True)
    return headline, samples


def summary(what: str, values: list[float], unit: str, target: str = "") -> Headline:
    return Headline(what, statistics.median(values), unit, min(values), max(values), target)


def write_model(folder: Path) -> Path:
    """A random dense model large enough that a prefill takes many decode steps."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def on_vllm(folder: Path, repeats: int, budget: float) -> tuple[list[Headline], dict[str, list[float]]]:
    """Two real engines that serve all repetitions; every prompt is new to both."""
    from vllm_serverless_loader import VLLMEngine

    deadline = time.monotonic() + budget
    model = str(write_model(folder / "model"))

    def start() -> VLLMEngine:
        return VLLMEngine.start(
            model,
            dtype="float32",
            block_size=32,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=4096,
            disable_log_stats=True,
        )

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    engines: list[VLLMEngine] = []
    turn = iter(range(10**6))

    def run(context: int, rounds: bool) -> dict[str, float]:
        number = next(turn)
        prompt = tuple((7 * number + 3 * j + j * j) % 1000 + 2 for j in range(context))
        sampling = {"max_tokens": 480, "ignore_eos": True, "temperature": 0.0}
        request = RequestState(f"r{number}", prompt, sampling=sampling)
        return loop.run_until_complete(one(*engines, request, 12, rounds=rounds, gap=8))

    async def both() -> None:
        for _ in range(2):
            engines.append(start())

    try:
        loop.run_until_complete(both())
        run(200, True)
        return measure(run, [512, 1024, 2048], repeats, deadline)
    finally:
        for engine in engines:
            engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--engine", choices=["simulated", "vllm"], default="vllm")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which no turn begins")
    options = parser.parse_args()
    if options.engine == "vllm":
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with tempfile.TemporaryDirectory() as folder:
            headline, samples = on_vllm(Path(folder), options.repeats, options.budget)
    else:
        deadline = time.monotonic() + options.budget
        headline, samples = measure(simulated, [512, 2048, 4096, 8192], options.repeats, deadline)
    suffix = "_vllm" if options.engine == "vllm" else ""
    simulated_times = {"step_s": STEP_S, "prefill_s_per_token": PREFILL_S}
    write_result(
        f"vllm_serverless_loader_migration{suffix}",
        question="How long does a client wait while its request moves: rounds against stop-and-replay?",
        headline=headline,
        samples=samples,
        folder=options.out,
        parameters={"engine": options.engine} | ({} if suffix else simulated_times),
    )


if __name__ == "__main__":
    main()

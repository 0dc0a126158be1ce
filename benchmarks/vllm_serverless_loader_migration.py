"""How long does a client wait while its request moves: rounds against stop-and-replay?

python benchmarks/vllm_serverless_loader_migration.py [--out FOLDER] [--engine simulated|vllm] [--repeats N]

``vllm``: two real engines, each with a process of its own, on examples/tiny_moe (float32, CPU), prompts of up
to 120 tokens. ``simulated`` (default): engines with the step and prefill times of an 8B model on one GPU (20
ms a step, 0.1 ms a prefilled token), contexts of 512 to 8192 tokens. Pause: from the stop of the source to
the first token of the destination. Stop-and-replay stops the source first, as a migration without rounds
must.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from vllm_serverless_loader import RequestState, SimulatedEngine, TokenRouter  # noqa: E402

STEP_S, PREFILL_S = 0.02, 1e-4


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
    await stream
    return {**found, "step_s": statistics.median(steps)}


def simulated(context: int, rounds: bool) -> dict[str, float]:
    def engine() -> SimulatedEngine:
        return SimulatedEngine(step_s=STEP_S, prefill_s_per_token=PREFILL_S)

    prompt = tuple(range(context))
    request = RequestState("r", prompt, sampling={"max_tokens": 12 + int(context * PREFILL_S / STEP_S) + 60})
    return asyncio.run(one(engine(), engine(), request, 8, rounds=rounds, gap=4))


def measure(
    run: Callable[[int, bool], dict[str, float]], contexts: list[int], repeats: int
) -> tuple[list, dict]:
    headline: list[Headline] = []
    samples: dict[str, list[float]] = {}
    for context in contexts:
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for turn in range(repeats):
            for rounds in (True, False) if turn % 2 == 0 else (False, True):
                found[rounds].append(run(context, rounds))
        for rounds, name in ((True, "rounds"), (False, "stop and replay")):
            pauses = [row["pause_s"] for row in found[rounds]]
            samples[f"pause, context {context}, {name}"] = pauses
            headline.append(
                Headline(
                    f"pause at context {context}, {name}",
                    statistics.median(pauses),
                    "s",
                    min(pauses),
                    max(pauses),
                )
            )
        ratios = [a["pause_s"] / b["pause_s"] for a, b in zip(found[False], found[True], strict=True)]
        target = ">= 3" if context >= 2048 else ""
        median = statistics.median(ratios)
        what = f"pause of stop and replay over rounds, context {context}"
        headline.append(Headline(what, median, "x", min(ratios), max(ratios), target))
        bound = [row["pause_s"] / (2 * row["step_s"] + row["last_round_s"]) for row in found[True]]
        what = f"pause over (two steps + last round's prefill), context {context}"
        headline.append(Headline(what, statistics.median(bound), "x", min(bound), max(bound), "<= 1"))
        print(context, [round(row.value or 0, 4) for row in headline[-4:]], flush=True)
    return headline, samples


def on_vllm(repeats: int) -> tuple[list[Headline], dict[str, list[float]]]:
    """Two real engines that serve all repetitions; every prompt is new to both."""
    from vllm_serverless_loader import VLLMEngine

    def start() -> VLLMEngine:
        return VLLMEngine.start(
            str(ROOT / "examples/tiny_moe/model"),
            dtype="float32",
            block_size=32,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=256,
            disable_log_stats=True,
        )

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    engines: list[VLLMEngine] = []
    turn = iter(range(10**6))

    def run(context: int, rounds: bool) -> dict[str, float]:
        number = next(turn)
        prompt = tuple((7 * number + 3 * j + j * j) % 250 + 2 for j in range(context))
        sampling = {"max_tokens": 100, "ignore_eos": True, "temperature": 0.0}
        request = RequestState(f"r{number}", prompt, sampling=sampling)
        return loop.run_until_complete(one(*engines, request, 20, rounds=rounds, gap=8))

    async def both() -> None:
        engines.extend((start(), start()))

    loop.run_until_complete(both())
    try:
        run(40, True)
        return measure(run, [120], repeats)
    finally:
        for engine in engines:
            engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--engine", choices=["simulated", "vllm"], default="simulated")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.engine == "vllm":
        headline, samples = on_vllm(options.repeats)
    else:
        headline, samples = measure(simulated, [512, 2048, 4096, 8192], options.repeats)
    suffix = "_vllm" if options.engine == "vllm" else ""
    write_result(
        f"vllm_serverless_loader_migration{suffix}",
        question="How long does a client wait while its request moves: rounds against stop-and-replay?",
        headline=headline,
        samples=samples,
        folder=options.out,
        parameters={"engine": options.engine, "step_s": STEP_S, "prefill_s_per_token": PREFILL_S},
    )


if __name__ == "__main__":
    main()

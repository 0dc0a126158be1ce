"""Live change of layout against saving and loading a checkpoint through memory, on CPUs over gloo.

python benchmarks/megatron_tenplex_reshard.py [--repeats N] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.common import RESULTS, Headline, write_result
from megatron_tenplex import GPTShape, ParallelConfig, Reconfigurator, World
from megatron_tenplex.testing import install_cpu_compat, run_world
from megatron_tenplex.testing.checkpoint import load_checkpoint, save_checkpoint
from megatron_tenplex.testing.gpt import GPTJob

WORKERS = 4
TOUR = ("tp=2,pp=2", "tp=4", "tp=2,dp=2", "tp=2,pp=2")
ARMS = ("live", "checkpoint", "live, prepared")


def measure(store, worker, workers, job: GPTJob, options) -> dict[str, list[float]]:
    """Seconds of each arm by turns, the whole pause: until the new layout holds all state.

    One job goes round all layouts, by each arm in turn. As one would for a load, models are built without
    initial weights after the first, in all arms.
    """
    warnings.filterwarnings("ignore")
    world = World(store, worker, workers, timeout=120)
    built: list[ParallelConfig] = []

    def build(parallel):
        built.append(parallel)
        return replace(job, initialize=len(built) == 1)(parallel)

    elastic = Reconfigurator(build, world=world, staging_bytes=64 << 20)
    state = elastic.start(ParallelConfig.parse(TOUR[0]), resume=False)
    job.step(state, elastic.parallel)
    del state
    seconds: dict[str, list[float]] = {}

    def change(arm: str, after: ParallelConfig) -> float:
        if arm == "live, prepared":
            elastic.prepare(after, shadow=True)
            elastic.planning.wait()
        world.agree(None, "starting")
        started = time.perf_counter()
        if arm == "checkpoint":
            save_checkpoint(elastic.state, options.folder)
            elastic.start(after, resume=False)
            elastic.describe()  # makes Adam's state, without which describing for a load asserts
            load_checkpoint(elastic.state, options.folder)
        else:
            elastic.reconfigure(after)
        world.agree(None, "changing")
        return time.perf_counter() - started

    begun = time.monotonic()
    for turn in range(options.repeats + 1):
        if turn > 1 and max(world.all_gather_json(time.monotonic() - begun)) > options.budget:
            break
        for arm in ARMS[turn % 3 :] + ARMS[: turn % 3]:
            for before, after in pairwise(TOUR):
                took = change(arm, ParallelConfig.parse(after))
                if turn:  # the first turn warms up
                    seconds.setdefault(f"{arm} {before} -> {after}", []).append(took)
                    if arm != "checkpoint":
                        for stage, value in elastic.report.seconds.items():
                            seconds.setdefault(f"{arm} {before} -> {after}: {stage}", []).append(value)
        if worker == 0:
            print(f"turn {turn} done after {time.monotonic() - begun:.0f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=110, help="seconds after which no turn starts")
    parser.add_argument("--quick", action="store_true", help="a small model; writes no result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    install_cpu_compat()
    shape = GPTShape(2, 64, 4, 256) if options.quick else GPTShape(12, 576, 8, 8192)
    job = GPTJob(shape, global_batch_size=2, num_samples=64)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        options.folder = Path(folder) / "checkpoint"
        results = run_world(WORKERS, measure, job, options, timeout=1000)
    samples = {
        name: [max(turns) for turns in zip(*(r[name] for r in results), strict=True)]
        for name in results[0]
        if all(name in r for r in results)
    }
    headline = []
    for arm in ("live", "live, prepared"):
        for before, after in pairwise(TOUR):
            theirs, ours = (samples[f"{name} {before} -> {after}"] for name in ("checkpoint", arm))
            ratios = [c / live for c, live in zip(theirs, ours, strict=True)]
            headline.append(
                Headline(
                    f"checkpoint through /dev/shm against {arm}, {before} -> {after}",
                    statistics.median(theirs) / statistics.median(ours),
                    "x",
                    min(ratios),
                    max(ratios),
                    ">= 5",
                    f"{statistics.median(theirs):.2f} s against {statistics.median(ours):.2f} s",
                )
            )
    for before, after in pairwise(TOUR):
        plain, shadow = (samples[f"{arm} {before} -> {after}"] for arm in ("live", "live, prepared"))
        shares = [b / a for a, b in zip(plain, shadow, strict=True)]
        headline.append(
            Headline(
                f"pause with a shadow over the plain pause, {before} -> {after}",
                statistics.median(shadow) / statistics.median(plain),
                "",
                min(shares),
                max(shares),
                "< 0.25",
            )
        )
    for row in headline:
        print(f"{row.what}: {row.value:.2f}{row.unit} ({row.low:.2f} to {row.high:.2f}) {row.note}")
    if not options.quick:
        write_result(
            "megatron_tenplex_reshard",
            question="How much shorter is the pause of a live change than of a checkpoint through memory?",
            headline=headline,
            samples=samples,
            folder=options.out,
            parameters=shape.num_parameters,
            workers=WORKERS,
        )


if __name__ == "__main__":
    main()

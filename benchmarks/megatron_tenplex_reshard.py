"""Live change of layout against saving and loading a checkpoint through memory, on CPUs over gloo.

python benchmarks/megatron_tenplex_reshard.py [--repeats N] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.common import RESULTS, Headline, write_result
from megatron_tenplex import GPTShape, ParallelConfig, Reconfigurator, World
from megatron_tenplex.testing import install_cpu_compat, run_world
from megatron_tenplex.testing.checkpoint import load_checkpoint, save_checkpoint
from megatron_tenplex.testing.gpt import GPTJob

WORKERS = 2
PAIRS = (("tp=2", "pp=2"), ("pp=2", "dp=2"), ("dp=2", "tp=2"))


def measure(store, worker, workers, job: GPTJob, options) -> dict[str, list[float]]:
    """Seconds of each arm by turns, the whole pause: until the new layout holds all state."""
    warnings.filterwarnings("ignore")
    world = World(store, worker, workers, timeout=120)
    elastic = Reconfigurator(job, world=world, staging_bytes=64 << 20)
    seconds: dict[str, list[float]] = {}

    def start(text):
        state = elastic.start(ParallelConfig.parse(text), resume=False)
        job.step(state, elastic.parallel)
        world.agree(None, "starting")

    def live(before, after):
        elastic.reconfigure(ParallelConfig.parse(after))
        seconds.setdefault(f"live move {before} -> {after}", []).append(elastic.report.seconds["move"])

    def checkpoint(before, after):
        del before
        save_checkpoint(elastic.state, options.folder)
        elastic.start(ParallelConfig.parse(after), resume=False)
        elastic.describe()  # makes Adam's state, without which describing for a load asserts
        load_checkpoint(elastic.state, options.folder)

    begun = time.monotonic()
    for turn in range(options.repeats + 1):
        if turn > 1 and max(world.all_gather_json(time.monotonic() - begun)) > options.budget:
            break
        arms = [("live", live), ("checkpoint", checkpoint)]
        for before, after in PAIRS:
            for name, change in arms if turn % 2 else reversed(arms):
                start(before)
                started = time.perf_counter()
                change(before, after)
                world.agree(None, "changing")
                if turn:  # the first turn warms up
                    seconds.setdefault(f"{name} {before} -> {after}", []).append(
                        time.perf_counter() - started
                    )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no turn starts")
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
        name: [max(turns) for turns in zip(*(r[name] for r in results), strict=True)] for name in results[0]
    }
    headline = []
    for before, after in PAIRS:
        arms = [samples[f"{arm} {before} -> {after}"] for arm in ("checkpoint", "live")]
        ratios = [c / live for c, live in zip(*arms, strict=True)]
        headline.append(
            Headline(
                f"checkpoint through /dev/shm against live, {before} -> {after}",
                statistics.median(arms[0]) / statistics.median(arms[1]),
                "x",
                min(ratios),
                max(ratios),
                ">= 5",
                f"{statistics.median(arms[0]):.2f} s against {statistics.median(arms[1]):.2f} s",
            )
        )
    for row in headline:
        print(f"{row.what}: {row.value:.1f}x ({row.low:.1f} to {row.high:.1f}), {row.note}")
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

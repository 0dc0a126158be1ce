"""How near the disk's own rate does a table on disk deliver windows?

    python benchmarks/rl_replay_gear_disk.py [--folder DIR] [--trajectories 4000]

Saves a table of trajectories of 1000 steps of 112 bytes to DIR, then reads random whole trajectories and
windows of 20 with 1 to 16 threads past the page cache, in turns with the same from the page cache (mmap) and
against what tiered_memory measures of the disk (O_DIRECT, sequential). Writes rl_replay_gear_disk.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import RESULTS, Headline, interleaved, write_result
from benchmarks.rl_replay_gear_windows import STEPS, ours, trajectory
from rl_replay_gear import ColdTable, Uniform, Window, load_table, save_table
from rl_replay_gear.randomness import CounterGenerator
from tiered_memory import measure_bandwidth

CASES = ((STEPS, 64), (20, 256))
THREADS = (1, 4, 16)


def reading(source: Any, length: int, batch: int) -> Callable[[], Any]:
    """Take one random batch of ``source``."""
    selector, window, counter = Uniform(), Window(length, 0, "head"), iter(range(10**9))
    anchor = "uniform" if length < STEPS else "start"

    def read() -> None:
        generator = CounterGenerator(length, next(counter))
        chosen = source.select(selector, batch, anchor=anchor, generator=generator)
        source.collect(chosen, window)

    return read


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--trajectories", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    samples: dict[str, list[float]] = {}
    headline: list[Headline] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = ours(options.trajectories, trajectory())
        save_table(table, f"{folder}/table")
        del table
        probe = measure_bandwidth("disk_read", path=folder, nbytes=1 << 29)
        headline.append(Headline("sequential O_DIRECT read of the disk", probe.bytes_per_s / 1e9, "GB/s"))
        cold = {n: ColdTable(f"{folder}/table", threads=n) for n in THREADS}
        mapped = load_table(f"{folder}/table", mmap=True)
        for length, batch in CASES:
            nbytes = batch * length * 112
            arms = {f"{n} threads": reading(source, length, batch) for n, source in cold.items()}
            arms["mmap (page cache)"] = reading(mapped, length, batch)
            seconds = interleaved(arms, repeats=options.repeats)
            label = f"L={length}, B={batch}"
            samples |= {f"{label}: {arm}": values for arm, values in seconds.items()}
            for arm, values in seconds.items():
                rates = sorted(nbytes / value / probe.bytes_per_s for value in values)
                note = f"{nbytes / median(values) / 1e9:.2f} GB/s"
                headline.append(
                    Headline(f"{label}, {arm}: share of the disk's rate", median(rates), "x", rates[0],
                             rates[-1], "", note)
                )  # fmt: skip
                print(headline[-1], flush=True)
        for source in cold.values():
            source.close()
    path = write_result(
        "rl_replay_gear_disk",
        question="How near the disk's own rate does a table on disk deliver windows?",
        headline=headline,
        samples=samples,
        folder=options.out,
        probe=list(probe.samples),
    )
    if options.folder is not None:  # a path of this machine
        path.write_text(path.read_text().replace(str(options.folder), "DIR"))
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())

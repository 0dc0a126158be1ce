"""Windows per CPU second against DeepMind Reverb, which runs as it is meant to: server and learner apart.

    python benchmarks/rl_replay_gear_reverb.py --reverb-python PATH [--trajectories 300]

PATH is the Python of an environment with Reverb (see rl_replay_gear_reverb_peer.py); it has a TensorFlow of
its own, so it cannot share this one's. Both hold the same number of trajectories of 1000 steps of 97 bytes;
Reverb has an item for every window. CPU seconds of all processes count on both sides; turns of some seconds
alternate. Writes rl_replay_gear_reverb.json after every case.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import RESULTS, Headline, write_result
from benchmarks.rl_replay_gear_windows import STEP_BYTES, STEPS, ours, trajectory
from rl_replay_gear import Uniform, Window
from rl_replay_gear.randomness import CounterGenerator

PEER = Path(__file__).with_name("rl_replay_gear_reverb_peer.py")
CASES = ((20, 256, 8), (20, 2048, 1), (STEPS, 64, 8))  # length, batch, and batches asked for at once


class Reverb:
    """The learner process."""

    def __init__(self, python: Path, trajectories: int, length: int, batch: int) -> None:
        command = [str(python), str(PEER), "learner", str(trajectories), str(length), str(batch)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self._line() != "ready":
            raise RuntimeError(f"the Reverb process ended: run {' '.join(command)} to see why")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def take(self, batches: int, seconds: float) -> tuple[float, float, int]:
        """CPU and wall seconds of ``batches`` batches, again until ``seconds`` are over; and their number."""
        assert self.process.stdin is not None
        used = [0.0, 0.0, 0]
        while used[1] < seconds:
            self.process.stdin.write(f"{batches}\n")
            self.process.stdin.flush()
            cpu, wall = map(float, self._line().split())
            used = [used[0] + cpu, used[1] + wall, used[2] + batches]
        return used[0], used[1], int(used[2])

    def close(self) -> None:
        """End it and its server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def measure(
    python: Path,
    *,
    trajectories: int,
    length: int,
    batch: int,
    calls: int,
    repeats: int,
    seconds: float,
) -> tuple[dict[str, list[float]], Headline]:
    table, selector = ours(trajectories, trajectory()), Uniform()
    window, anchor = Window(length, 0, "head"), "uniform" if length < STEPS else "start"
    counter = iter(range(10**9))

    def gear() -> tuple[float, float]:
        begin, used = time.perf_counter(), time.process_time()
        for _ in range(50 * calls):
            generator: Any = CounterGenerator(1, next(counter))
            chosen = table.select(selector, batch, anchor=anchor, generator=generator)  # type: ignore[arg-type]
            table.collect(chosen, window)["obs"]
        return (time.process_time() - used) / (50 * calls), (time.perf_counter() - begin) / (50 * calls)

    peer = Reverb(python, trajectories, length, batch)

    def reverb() -> tuple[float, float]:
        cpu, wall, taken = peer.take(calls, seconds)
        return cpu / taken, wall / taken

    try:
        gear(), reverb()
        turns = [(gear(), reverb()) for _ in range(repeats)]
    finally:
        peer.close()
    label = f"L={length}, B={batch}"
    ratios = sorted(theirs[0] / mine[0] for mine, theirs in turns)
    nbytes = batch * length * STEP_BYTES
    rates = [nbytes / median(turn[arm][0] for turn in turns) / 1e9 for arm in (0, 1)]
    note = f"{rates[0]:.2f} against {rates[1]:.3f} GB per CPU second"
    samples = {
        f"{label}: {arm}, {clock} s a call": [turn[i][j] for turn in turns]
        for i, arm in enumerate(("gear", "Reverb"))
        for j, clock in enumerate(("CPU", "wall"))
    }
    target = ">= 20, aim 30" if length == 20 else ""
    row = Headline(f"{label}: gear / Reverb", median(ratios), "x", ratios[0], ratios[-1], target, note)
    return samples, row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reverb-python", type=Path, required=True)
    parser.add_argument("--trajectories", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one turn of Reverb")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples: dict[str, list[float]] = {}
    headline = []
    for length, batch, calls in CASES:
        found, row = measure(
            options.reverb_python, trajectories=options.trajectories, length=length, batch=batch,
            calls=calls, repeats=options.repeats, seconds=options.seconds,
        )  # fmt: skip
        samples |= found
        headline.append(row)
        print(row, flush=True)
        path = write_result(
            "rl_replay_gear_reverb",
            question="How many windows per CPU second, against Reverb with its server in another process?",
            headline=headline,
            samples=samples,
            folder=options.out,
            peer={"dm-reverb": "0.14.0", "tensorflow": "2.15", "trajectories": options.trajectories},
        )
        # The path of the other Python is this machine's own.
        path.write_text(path.read_text().replace(str(options.reverb_python), "PATH"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast are windows, inserts and prioritised draws on a CPU, against TorchRL, cpprb and plain copies?

    python benchmarks/rl_replay_gear_windows.py [--quick]

3000 trajectories of 1000 steps of 97 bytes (obs 17 float32, action 6 float32, reward float32, done uint8),
one thread, CPU seconds, all arms in turn in one process. Payload bytes count, padding does not. TorchRL:
memmap storage and SliceSampler. cpprb (if it is importable) has no windows: it is asked for as many single
steps by index, which is the least it could do for them. Writes rl_replay_gear_windows.json; about three
minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, Headline, interleaved, write_result
from rl_replay_gear import (
    ColumnSpec,
    PrefixSumTree,
    Prioritized,
    TableSpec,
    TrajectoryTable,
    Uniform,
    Window,
)
from rl_replay_gear.randomness import CounterGenerator

STEPS, STEP_BYTES = 1000, 97
COLUMNS = (
    ColumnSpec("obs", (17,)),
    ColumnSpec("action", (6,)),
    ColumnSpec("reward"),
    ColumnSpec("done", (), torch.uint8),
)


def trajectory() -> dict[str, torch.Tensor]:
    return {
        "obs": torch.randn(STEPS, 17),
        "action": torch.randn(STEPS, 6),
        "reward": torch.randn(STEPS),
        "done": torch.zeros(STEPS, dtype=torch.uint8),
    }


def ours(count: int, one: Mapping[str, torch.Tensor]) -> TrajectoryTable:
    table = TrajectoryTable(TableSpec(COLUMNS, count * STEPS, count), memory="host")
    for _ in range(count):
        table.write(one)
    return table


def torchrl_buffer(count: int, one: Mapping[str, torch.Tensor], folder: str) -> Any:
    """TorchRL's memory-mapped storage with its slice sampler; trajectories by an id, ends cached."""
    from tensordict import TensorDict
    from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(count * STEPS, scratch_dir=folder),
        sampler=SliceSampler(slice_len=20, traj_key="episode", cache_values=True, strict_length=False),
        batch_size=20,
    )
    for number in range(count):
        episode = torch.full((STEPS,), number)
        buffer.extend(TensorDict({**one, "episode": episode}, batch_size=[STEPS]))
    return buffer


def cpprb_buffer(count: int, one: Mapping[str, torch.Tensor]) -> Any:
    try:
        from cpprb import ReplayBuffer
    except ImportError:
        return None
    fields = {
        "obs": {"shape": 17}, "action": {"shape": 6}, "reward": {}, "done": {"dtype": np.uint8},
    }  # fmt: skip
    buffer = ReplayBuffer(count * STEPS, fields)
    arrays = {name: value.numpy() for name, value in one.items()}
    for _ in range(count):
        buffer.add(**arrays)
    return buffer


def rate(seconds: list[float], nbytes: float) -> list[float]:
    return [nbytes / s / 1e9 for s in seconds]


def ratio(seconds: Mapping[str, list[float]], fast: str, slow: str) -> tuple[float, float, float]:
    """How many times faster, turn by turn: median, least, most."""
    values = sorted(b / a for a, b in zip(seconds[fast], seconds[slow], strict=True))
    return median(values), values[0], values[-1]


def windows(
    table: TrajectoryTable, torchrl: Any, cpprb: Any, *, batch: int, length: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    selector = Uniform()
    window = Window(length, 0, "head")
    anchor: Any = "uniform" if length < STEPS else "start"
    random = np.random.default_rng(0)
    counter = iter(range(10**9))
    calls = max(1, 2_000 // (batch * length // 1000 + 1) // 4)
    rows = batch * length
    source = torch.empty(400_000_000 // 8, dtype=torch.int64)
    target = torch.empty(rows * STEP_BYTES // 8, dtype=torch.int64)

    def gear() -> None:
        for _ in range(calls):
            generator = CounterGenerator(1, next(counter))
            table.collect(table.select(selector, batch, anchor=anchor, generator=generator), window)["obs"]

    def row_gather() -> None:
        words = table.storage[0]
        for _ in range(calls):
            begin = torch.from_numpy(random.integers(0, len(words) - length, batch))
            words.index_select(0, (begin[:, None] + torch.arange(length)).flatten())

    def copy() -> None:
        for _ in range(calls):
            begin = int(random.integers(0, len(source) - len(target)))
            target.copy_(source[begin : begin + len(target)])

    arms: dict[str, Callable[[], Any]] = {"gear": gear, "row gather": row_gather, "memcpy": copy}
    if torchrl is not None:
        torchrl._sampler.slice_len = length
        few = max(1, calls // 10)

        def slices() -> None:
            for _ in range(few):
                torchrl.sample(rows)

        arms["TorchRL SliceSampler"] = slices
    if cpprb is not None:

        def steps() -> None:
            for _ in range(calls):
                cpprb.sample(rows)

        arms["cpprb"] = steps
    seconds = interleaved(arms, repeats=repeats, clock=time.process_time)
    per_call = {arm: [s / calls for s in values] for arm, values in seconds.items()}
    if torchrl is not None:
        name = "TorchRL SliceSampler"
        per_call[name] = [s / few for s in seconds[name]]
    return per_call, {"payload_bytes": rows * STEP_BYTES}


def window_rows(
    label: str, seconds: Mapping[str, list[float]], nbytes: int, goals: Mapping[str, str]
) -> list[Headline]:
    out = []
    for other, target in goals.items():
        if other in seconds:
            value, low, high = ratio(seconds, "gear", other)
            mine, theirs = (median(rate(seconds[arm], nbytes)) for arm in ("gear", other))
            note = f"{mine:.2f} against {theirs:.2f} GB per CPU second"
            out.append(Headline(f"{label}: gear / {other}", value, "x", low, high, target, note))
            print(f"{label}: gear / {other}: {value:.2f}x ({low:.2f} to {high:.2f}), {note}", flush=True)
    return out


def inserts(
    one: Mapping[str, torch.Tensor], repeats: int, folder: str
) -> tuple[dict[str, list[float]], list[Headline]]:
    table = ours(200, one)
    arms: dict[str, Callable[[], Any]] = {
        "gear": lambda: [table.write(one) for _ in range(100)],
        "memcpy": lambda: [{n: v.clone() for n, v in one.items()} for _ in range(100)],
    }
    try:
        from tensordict import TensorDict

        buffer = torchrl_buffer(200, one, folder)
        episode = TensorDict({**one, "episode": torch.zeros(STEPS, dtype=torch.int64)}, batch_size=[STEPS])
        arms["TorchRL extend"] = lambda: [buffer.extend(episode) for _ in range(100)]
    except ImportError:
        pass
    seconds = interleaved(arms, repeats=repeats, clock=time.process_time)
    rows = []
    for other, target in (("TorchRL extend", ">= 10"), ("memcpy", "")):
        if other in seconds:
            value, low, high = ratio(seconds, "gear", other)
            note = f"{100 / median(seconds['gear']):.0f} trajectories of 97 kB per CPU second"
            rows.append(Headline(f"insert: gear / {other}", value, "x", low, high, target, note))
            print(rows[-1], flush=True)
    return {f"insert 100: {arm}": values for arm, values in seconds.items()}, rows


def draws(repeats: int, count: int) -> tuple[dict[str, list[float]], list[Headline]]:
    """1024 exact draws, with their update, from trees of 1e5 and 1e7 leaves."""
    random = torch.Generator().manual_seed(0)
    arms: dict[str, Callable[[], Any]] = {}
    for leaves in (10**5, count):
        tree = PrefixSumTree(leaves)
        tree.update(torch.arange(leaves), torch.rand(leaves, dtype=torch.float64, generator=random))
        u = [torch.rand(1024, dtype=torch.float64, generator=random) for _ in range(20)]
        weights = torch.rand(1024, dtype=torch.float64, generator=random)
        arms[f"draw of {leaves:.0e}"] = lambda tree=tree, u=u: [tree.draw(x) for x in u]

        def with_update(tree: PrefixSumTree = tree, u: Any = u, weights: Any = weights) -> None:
            for x in u:
                index = torch.unique(tree.draw(x)[0])
                tree.update(index, weights[: len(index)])

        arms[f"draw + update of {leaves:.0e}"] = with_update
    seconds = {
        arm: [s / 20 for s in values]
        for arm, values in interleaved(arms, repeats=repeats, clock=time.process_time).items()
    }
    rows = []
    for arm, values in seconds.items():
        ms = sorted(1e3 * s for s in values)
        target = "<= 1" if arm == f"draw of {count:.0e}" else ""
        rows.append(Headline(f"1024 prioritised: {arm}", median(ms), "ms CPU", ms[0], ms[-1], target))
        print(rows[-1], flush=True)
    return {f"1024 {arm}": values for arm, values in seconds.items()}, rows


def stored_steps(repeats: int) -> tuple[dict[str, list[float]], list[Headline]]:
    """Write one trajectory and take 64 windows of 20 by priority, with 1e5 and 1e7 steps stored."""
    arms: dict[str, Callable[[], Any]] = {}
    one = {"x": torch.zeros(100)}
    for steps in (10**5, 10**7):
        table = TrajectoryTable(TableSpec((ColumnSpec("x"),), steps, steps // 100), memory="host")
        for _ in range(steps // 100):
            table.write(one)
        selector = Prioritized()

        def step(table: TrajectoryTable = table, selector: Prioritized = selector) -> None:
            for number in range(50):
                table.write(one, priority=1.0 + number)
                table.collect(table.select(selector, 64), Window(20, 0, "head"))

        arms[f"{steps:.0e} steps"] = step
    seconds = interleaved(arms, repeats=repeats, clock=time.process_time)
    value, low, high = ratio(seconds, "1e+05 steps", "1e+07 steps")
    row = Headline("write + sample 64x20: time at 1e7 / at 1e5 stored steps", value, "x", low, high, "<= 1.5")
    print(row, flush=True)
    return {f"50 online steps: {arm}": values for arm, values in seconds.items()}, [row]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="300 trajectories, 3 repeats, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, repeats = (300, 3) if options.quick else (3000, 7)
    one = trajectory()
    samples: dict[str, list[float]] = {}
    headline: list[Headline] = []
    with tempfile.TemporaryDirectory() as folder:
        for found, rows in (
            inserts(one, repeats, f"{folder}/insert"), draws(repeats, 10**7), stored_steps(repeats),
        ):  # fmt: skip
            samples |= found
            headline += rows
        table = ours(count, one)
        try:
            torchrl = torchrl_buffer(count, one, f"{folder}/windows")
        except ImportError:
            torchrl = None
        cpprb = cpprb_buffer(count, one)
        for batch, length, goals in (
            (256, 20, {"TorchRL SliceSampler": ">= 5, aim 10", "cpprb": ">= 2", "row gather": ">= 2"}),
            (2048, 20, {"TorchRL SliceSampler": ">= 10", "cpprb": ">= 2", "row gather": ">= 3"}),
            (64, 1000, {"memcpy": ">= 0.8", "TorchRL SliceSampler": "", "cpprb": ""}),
        ):
            label = f"L={length}, B={batch}"
            seconds, facts = windows(table, torchrl, cpprb, batch=batch, length=length, repeats=repeats)
            samples |= {f"{label}: {arm}": values for arm, values in seconds.items()}
            headline += window_rows(label, seconds, facts["payload_bytes"], goals)
    if not options.quick:
        write_result(
            "rl_replay_gear_windows",
            question="How fast are windows, inserts and prioritised draws on one CPU thread, against peers?",
            headline=headline,
            samples=samples,
            folder=options.out,
            unit="CPU seconds a call",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What does a table over several processes of a host cost: exchange or mapped shards, host or GPU memory?

    python benchmarks/rl_replay_gear_sharded.py [--processes 2] [--budget 60] [--out DIR] [--quick]

(not installed: PYTHONPATH=plugins:. before it). Starts the processes itself: NCCL with one GPU each where
there are as many GPUs, else gloo on the CPU. Checks first that all exchanges give the bits of one table that
holds the shards in rank order, and that draws follow the global weights. Then times, in turns: whole
``collect`` calls over an all-to-all exchange and over mapped shards, against as large a batch from the
process's own shard; on GPUs also the gather from the peer's memory alone, against a copy over the link.
Writes rl_replay_gear_sharded_gpu.json (or _cpu.json) after every stage.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import RESULTS, Headline, interleaved, write_result
from rl_replay_gear import (
    ColumnSpec,
    Prioritized,
    ShardedTable,
    TableSpec,
    TrajectoryTable,
    Uniform,
    Window,
)
from rl_replay_gear.exchange import GlobalSelection
from rl_replay_gear.randomness import CounterGenerator
from rl_replay_gear.selection import Selection

SMALL = (ColumnSpec("x", (3,), fill=-1.0), ColumnSpec("who", (), torch.int64), ColumnSpec("big", (80,)))
CASES = (("112 B rows", 28, 20, 8192), ("112 B rows", 28, 1000, 512), ("1024 B rows", 256, 1000, 256))
STEPS = 1000
REPEATS = 7


class Run:
    """One process: its rank, its device, and what it found."""

    def __init__(self, rank: int, size: int, *, gpu: bool, out: Path, budget: float, quick: bool) -> None:
        self.rank, self.size, self.out, self.quick = rank, size, out, quick
        self.gpu = gpu
        self.device = torch.device("cuda", rank) if self.gpu else torch.device("cpu")
        self.end = time.monotonic() + budget
        self.headline: list[Headline] = []
        self.samples: dict[str, list[float]] = {}
        self.checks: list[dict[str, Any]] = []
        self.peers_mapped = False

    def arms(self) -> list[tuple[str, str]]:
        """Memory and exchange of the tables compared.

        Mapped device memory comes last, and only once its bits were right: a kernel that reads where it may
        not takes down every later stage of its process.
        """
        memories = ["pinned", "device"] if self.gpu else ["host"]
        arms = [(memory, exchange) for memory in memories for exchange in ("all_to_all", "mapped")]
        return [arm for arm in arms if arm != ("device", "mapped") or self.peers_mapped]

    def check(self, name: str, ok: bool, **facts: Any) -> None:
        """Record what all processes found."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, ok)
        self.checks.append({"check": name, "ok": all(every), **facts})
        if self.rank == 0:
            print("ok  " if all(every) else "FAIL", name, facts, flush=True)

    def write(self) -> None:
        """Write what there is."""
        if self.rank == 0:
            write_result(
                f"rl_replay_gear_sharded_{'gpu' if self.gpu else 'cpu'}",
                question="What does a table over several processes of one host cost, exchanged or mapped?",
                headline=[
                    Headline(
                        "checks that hold", sum(item["ok"] for item in self.checks), f"of {len(self.checks)}"
                    ),
                    *self.headline,
                ],
                samples=self.samples,
                folder=self.out,
                checks=self.checks,
                failed=[item["check"] for item in self.checks if not item["ok"]],
                processes=self.size,
                backend=dist.get_backend(),
            )

    def any_error(self, error: str) -> bool:
        """Whether a stage failed in any process."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, error)
        return any(every)

    def time_left(self) -> bool:
        """Whether all processes may start another stage."""
        left = torch.tensor([int(time.monotonic() < self.end)], device=self.device)
        dist.all_reduce(left, op=dist.ReduceOp.MIN)
        return bool(left.item())


def small_shard(table: TrajectoryTable, rank: int) -> TrajectoryTable:
    random = np.random.default_rng(rank)
    for number in range(4 + 3 * rank):
        n = int(random.integers(1, 9))
        table.write(
            {
                "x": torch.from_numpy(random.normal(size=(n, 3)).astype(np.float32)),
                "who": torch.full((n,), 100 * rank + number),
                "big": torch.full((n, 80), float(number)),
            },
            priority=float(random.integers(0, 5)),
        )
    return table


def same_bits(run: Run, memory: Any, exchange: Any) -> None:
    """GR-15: the batch of every rank is its part of the batch of one table."""
    spec = TableSpec(SMALL, 500, 50)
    sharded = ShardedTable(small_shard(TrajectoryTable(spec, memory=memory, shared=True), run.rank),
                           exchange=exchange)  # fmt: skip
    whole = TrajectoryTable(spec, memory="host")
    for rank in range(run.size):
        small_shard(whole, rank)
    equal, window = True, Window(4, -2, "around")
    for number, make in enumerate((Uniform, lambda: Prioritized(0.7, over="steps"))):
        mine, theirs = make(), make()
        for turn in range(5):
            chosen = sharded.select(mine, 16, generator=CounterGenerator(number, turn))
            expected = whole.select(theirs, 16 * run.size, generator=CounterGenerator(number, turn))
            batch = sharded.collect(chosen, window, device=run.device)
            reference = whole.collect(expected, window)
            part = slice(16 * run.rank, 16 * (run.rank + 1))
            for name in batch:
                equal &= torch.equal(batch[name].cpu(), reference[name][part])
                equal &= torch.equal(batch.timesteps[name].cpu(), reference.timesteps[name][part])
    run.check(f"bits of one table: {memory}, {exchange}", equal, exchange=sharded.exchange)


def peer_memory(run: Run) -> None:
    """Shards in GPU memory, read in place; where that works, the arms that need it follow."""
    same_bits(run, "device", "mapped")
    run.peers_mapped = run.checks[-1]["ok"]


def law(run: Run) -> None:
    """GR-14: frequencies follow the global weights."""
    sharded = ShardedTable(small_shard(TrajectoryTable(TableSpec(SMALL, 500, 50), memory="host"), run.rank))
    selector = Prioritized(1.0)
    counts: dict[int, int] = {}
    for turn in range(60):
        handles = sharded.select(selector, 500, generator=CounterGenerator(7, turn)).handles
        for handle, count in zip(*torch.unique(handles, return_counts=True), strict=True):
            counts[int(handle)] = counts.get(int(handle), 0) + int(count)
    every: list[Any] = [None] * run.size
    weights = dict(zip(sharded.table.handles().tolist(), sharded.table.priorities().tolist(), strict=True))
    dist.all_gather_object(every, (counts, weights))
    weight = {handle: value for _, part in every for handle, value in part.items()}
    drawn = {handle: sum(part.get(handle, 0) for part, _ in every) for handle in weight}
    scale = sum(drawn.values()) / sum(weight.values())
    positive = [handle for handle, value in weight.items() if value > 0]
    statistic = sum((drawn[h] - scale * weight[h]) ** 2 / (scale * weight[h]) for h in positive)
    freedom = len(positive) - 1
    never = all(drawn[h] == 0 for h in weight if weight[h] == 0)
    ok = never and statistic < freedom + 4.5 * (2 * freedom) ** 0.5
    run.check("law of the draw over shards", ok, chi_square=statistic, freedom=freedom)


def shard_of(run: Run, floats: int, memory: Any, rows: int) -> TrajectoryTable:
    """A shard in memory that others may map, of trajectories of 1000 steps."""
    spec = TableSpec((ColumnSpec("obs", (floats,)),), rows, rows // STEPS)
    table = TrajectoryTable(spec, memory=memory, shared=True)
    block = torch.randn(STEPS, floats)
    for _ in range(rows // STEPS):
        table.write({"obs": block})
    return table


def picks(run: Run, table: TrajectoryTable, batch: int, length: int, owner: str) -> GlobalSelection:
    """Whole windows (padding would flatter) of trajectories anywhere, or of the next process's shard only."""
    random = torch.Generator().manual_seed(1)
    count = len(table)
    slots = torch.randint(0, count, (run.size, batch), generator=random)
    anchors = torch.randint(0, STEPS - length + 1, (run.size, batch), generator=random)
    shards = torch.randint(0, run.size, (run.size, batch), generator=random)
    if owner == "next":
        shards = ((torch.arange(run.size) + 1) % run.size)[:, None].expand(-1, batch)
    handles = table.handles()[slots] & ((1 << 51) - 1) | (shards << 51)
    return GlobalSelection(
        handles[run.rank].contiguous(), anchors[run.rank].contiguous(), torch.ones(batch).double(), None,
        handles.contiguous(), anchors.contiguous(),
    )  # fmt: skip


def measure(run: Run, name: str, floats: int, length: int, batch: int) -> None:
    rows = 100_000 if run.quick else 1_000_000
    batch = batch // 16 if run.quick else batch
    window = Window(length)
    arms: dict[str, Callable[[], Any]] = {}
    tables = {}
    for memory, exchange in run.arms():
        if memory not in tables:
            tables[memory] = shard_of(run, floats, memory, rows)
        table = ShardedTable(tables[memory], exchange=exchange)
        chosen = picks(run, tables[memory], batch, length, "any")

        def collect(table: ShardedTable = table, chosen: GlobalSelection = chosen) -> None:
            table.collect(chosen, window, device=run.device)

        arms[f"{memory}, {exchange}"] = collect
    for memory, table in tables.items():
        chosen = picks(run, table, batch, length, "any")
        own = Selection(
            chosen.handles & ((1 << 51) - 1) | (run.rank << 51), chosen.anchors, chosen.probability
        )

        def alone(table: TrajectoryTable = table, own: Selection = own) -> None:
            table.collect(own, window, device=run.device)

        arms[f"{memory}, own shard"] = alone
        arms[f"{memory}, one process alone"] = alone if run.rank == 0 else lambda: None
    seconds = interleaved(arms, repeats=REPEATS, warm_up=2, synchronize=lambda: settle(run))
    label = f"{name}, L={length}, B={batch} a process"
    run.headline = [row for row in run.headline if not row.what.startswith(label)]  # of a run with fewer arms
    nbytes = batch * length * tables[next(iter(tables))].storage[0].shape[1] * 8
    run.samples |= {f"{label}: {arm}": values for arm, values in seconds.items()}
    for memory in tables:
        exchanges = [exchange for where, exchange in run.arms() if where == memory]
        for exchange in exchanges:
            a, b = seconds[f"{memory}, {exchange}"], seconds[f"{memory}, own shard"]
            compare(run, f"{label}, {memory}: {exchange} / own shard", a, b, nbytes=nbytes)
        if "mapped" not in exchanges:
            continue
        mapped, exchanged = seconds[f"{memory}, mapped"], seconds[f"{memory}, all_to_all"]
        compare(run, f"{label}, {memory}: mapped / all_to_all", mapped, exchanged, nbytes=nbytes)
        alone_times = [value * run.size for value in seconds[f"{memory}, one process alone"]]
        what = f"{label}, {memory}: all processes together, mapped / one process alone"
        compare(run, what, mapped, alone_times, nbytes=nbytes, target=f">= {0.9 * run.size:.1f}")


def compare(
    run: Run, what: str, mine: list[float], theirs: list[float], *, nbytes: int, target: str = ""
) -> None:
    """Rate of ``mine`` over that of ``theirs``, turn by turn."""
    ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
    rates = [nbytes / median(values) / 1e9 for values in (mine, theirs)]
    note = f"{rates[0]:.1f} against {rates[1]:.1f} GB/s of row bytes a process"
    run.headline.append(Headline(what, median(ratios), "x", ratios[0], ratios[-1], target, note))
    if run.rank == 0:
        print(f"{what}: {median(ratios):.2f}x, {note}", flush=True)


def link(run: Run, floats: int, length: int, batch: int) -> None:
    """Every process reads the next one's GPU memory: the gather alone and whole calls, against a copy."""
    rows = 100_000 if run.quick else 2_000_000
    table = shard_of(run, floats, "device", rows)
    sharded = ShardedTable(table, exchange="mapped")
    chosen = picks(run, table, batch, length, "next")
    window = Window(length)
    plan = table.plan(window)
    exchange: Any = sharded._rows
    bounds = [part.to(run.device) for part in exchange._exchange_bounds(chosen, plan, {0: plan})]
    owner = (chosen.handles >> 51).to(run.device)
    peer: Tensor = exchange.shards[(run.rank + 1) % run.size][0].flatten()
    nbytes = batch * length * table.storage[0].shape[1] * 8
    source = peer[: min(nbytes // 8, peer.numel())]
    target = torch.empty_like(source, device=run.device)
    times = max(1, nbytes // source.nbytes)
    arms: dict[str, Callable[[], Any]] = {
        "copy over the link": lambda: [target.copy_(source) for _ in range(times)],
        "gather over the link": lambda: exchange._gather(plan.reads[0], owner, bounds[0], "auto"),
        "collect over the link": lambda: sharded.collect(chosen, window, device=run.device),
    }
    seconds = interleaved(arms, repeats=REPEATS, warm_up=2, synchronize=lambda: settle(run))
    copy = [value * nbytes / (source.nbytes * times) for value in seconds["copy over the link"]]
    label = f"{floats * 4} B rows, L={length}, B={batch}"
    run.samples |= {f"{label}: {arm}": values for arm, values in seconds.items()}
    for arm, target_text in (("gather over the link", ">= 0.6"), ("collect over the link", "")):
        what = f"{label}: {arm} / copy over the link"
        compare(run, what, seconds[arm], copy, nbytes=nbytes, target=target_text)


def settle(run: Run) -> None:
    if run.gpu:
        torch.cuda.synchronize(run.device)
    dist.barrier()


def work(run: Run) -> int:
    stages: list[Callable[[], object]] = [lambda arm=arm: same_bits(run, *arm) for arm in run.arms()]  # type: ignore[misc]
    stages.append(lambda: law(run))
    stages += [lambda case=case: measure(run, *case) for case in CASES]  # type: ignore[misc]
    if run.gpu:
        stages += [
            lambda: peer_memory(run),
            lambda: link(run, 256, 1000, 1024),
            lambda: link(run, 28, 20, 32768),
        ]
        stages += [lambda case=case: measure(run, *case) for case in CASES]  # type: ignore[misc]
    for number, stage in enumerate(stages):
        if not run.time_left():
            run.check("all stages within the budget", False)
            break
        try:
            stage()
            error = ""
        except Exception as failure:  # e.g. no access to peer memory: the other stages still count
            error = "".join(traceback.format_exception(failure))[-1500:]
        if run.any_error(error):
            run.check(f"stage {number} of {len(stages)}", False, error=error)
        run.write()
    return int(any(not item["ok"] for item in run.checks))


def start(options: argparse.Namespace) -> int:
    """The processes; a failure of one ends all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank), "--store", f"{folder}/store"])
            for rank in range(options.processes)
        ]
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                time.sleep(5)
                for process in processes:
                    process.kill()
            time.sleep(0.1)
        return max(abs(process.wait()) for process in processes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; no stage starts later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is None:
        return start(options)
    del sys.argv[-4:]  # the result's command is what started this process's parent
    torch.set_num_threads(1)  # as torchrun has it: threads of several processes would share cores
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= options.processes
    if on_gpus:
        torch.cuda.set_device(options.rank)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{options.store}",
        rank=options.rank,
        world_size=options.processes,
        timeout=timedelta(seconds=60),
        **({"device_id": torch.device("cuda", options.rank)} if on_gpus else {}),
    )
    code = work(
        Run(
            options.rank,
            options.processes,
            gpu=on_gpus,
            out=options.out,
            budget=options.budget,
            quick=options.quick,
        )
    )
    dist.barrier()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())

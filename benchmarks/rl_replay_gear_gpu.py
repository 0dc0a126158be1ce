"""Is collection on a GPU right, and how near the limits of the links is it?

    python benchmarks/rl_replay_gear_gpu.py --out DIR      (not installed: PYTHONPATH=plugins:. before it)

Needs torch, Triton and NumPy; numba where it is. Checks GPU against CPU first: windows of every dtype from
pinned, device and pageable memory and from two tiers at once, a column past 2^31 bytes, prefetch while
trajectories are overwritten, draws from a tree on the device against the CPU's and their law. Then times,
interleaved: 4096 draws out of 1e8 priorities with and without their update, the host's share of a call, and
collection from pinned memory against a pinned copy and against a CPU gather with a copy, and from device
memory. Writes rl_replay_gear_gpu.json after every stage; about 30 seconds on an H100.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, Headline, interleaved, write_result
from rl_replay_gear import (
    ColumnSpec,
    GraphedCollect,
    PrefixSumTree,
    Prioritized,
    Selection,
    TableSpec,
    TrajectoryLoader,
    TrajectoryTable,
    Uniform,
    Window,
)
from rl_replay_gear.randomness import CounterGenerator
from rl_replay_gear.spec import DTYPES

DEVICE = "cuda"
COPY_BYTES = 1 << 28
REPEATS = 9
DT_COLUMNS = (  # 97 bytes a step, in rows of 112
    ColumnSpec("obs", (17,)),
    ColumnSpec("action", (6,)),
    ColumnSpec("reward"),
    ColumnSpec("done", (), torch.uint8),
)
WIDE_COLUMNS = (ColumnSpec("obs", (256,)),)  # 1024 bytes a step


def check(results: list[dict[str, Any]], name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Record what ``run`` found; a crash is a result too, and the others still run."""
    try:
        found = run()
    except Exception as error:
        found = {"ok": False, "error": "".join(traceback.format_exception_only(error))[-600:]}
        traceback.print_exc()
    results.append({"check": name, **found})
    print("ok  " if found["ok"] else "FAIL", name, {k: v for k, v in found.items() if k != "ok"}, flush=True)


def random_steps(columns: tuple[ColumnSpec, ...], steps: int, generator: torch.Generator) -> dict[str, Any]:
    out = {}
    for column in columns:
        shape = (column.rows(steps), *column.shape)
        raw = torch.randint(0, 100, shape, generator=generator)
        out[column.name] = raw % 2 == 0 if column.dtype is torch.bool else raw.to(column.dtype)
    return out


def filled(
    columns: tuple[ColumnSpec, ...], trajectories: int, steps: int, memory: Any, *, ragged: bool = False
) -> TrajectoryTable:
    spec = TableSpec(columns, trajectories * steps, trajectories)
    table = TrajectoryTable(spec, memory=memory)
    generator = torch.Generator().manual_seed(0)
    block = random_steps(columns, steps, generator)
    for number in range(trajectories):
        length = 1 + (number * 7919) % steps if ragged else steps
        table.write({c.name: block[c.name][: c.rows(length)] for c in columns}, priority=1.0 + number % 7)
    return table


def same_bits(memory: Any) -> dict[str, Any]:
    """Every dtype, three windows: a batch on the GPU equals the CPU's."""
    columns = tuple(
        ColumnSpec(f"{name}{i}", shape, dtype, fill=3.0, final=i == 1)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate([(), (3,), (5, 7), (70,)])
    )
    table = filled(columns, 40, 60, memory, ragged=True)
    reference = filled(columns, 40, 60, "host", ragged=True)
    compared = 0
    for window in (Window(20, -19, "head"), Window(7, 0, "tail"), Window(33, -5, "around")):
        generator = CounterGenerator(window.length)
        selection = table.select(Uniform(), 257, generator=generator)
        batch = table.collect(selection, window, device=DEVICE)
        expected = reference.collect(selection, window)
        for name in batch:
            if not torch.equal(batch[name].cpu(), expected[name]):
                return {"ok": False, "column": name, "window": str(window)}
            compared += 1
        if not torch.equal(batch.mask["float320"].cpu(), expected.mask["float320"]):
            return {"ok": False, "column": "mask"}
        if not torch.equal(batch.timesteps["float320"].cpu(), expected.timesteps["float320"]):
            return {"ok": False, "column": "timesteps"}
    return {"ok": True, "tensors": compared}


def two_tiers() -> dict[str, Any]:
    """GR-30: pixels in pinned memory, scalars on the device, one batch."""
    columns = (
        ColumnSpec("pixels", (3, 32, 32), torch.uint8, memory="pinned"),
        ColumnSpec("reward", memory="device", fill=2.0),
        ColumnSpec("action", (4,), memory="device"),
    )
    table = filled(columns, 30, 50, "pinned", ragged=True)
    reference = filled(tuple(replace(c, memory=None) for c in columns), 30, 50, "host", ragged=True)
    selection = table.select(Uniform(), 99, generator=CounterGenerator(3))
    window = Window(12, -6, "around")
    there, expected = table.collect(selection, window, device=DEVICE), reference.collect(selection, window)
    here = table.collect(selection, window, device="cpu")
    tiers = sorted({words.device.type for words in table.storage})
    ok = tiers == ["cpu", "cuda"] and all(
        torch.equal(there[name].cpu(), expected[name]) and torch.equal(here[name], expected[name])
        for name in expected
    )
    return {"ok": ok, "tiers": tiers}


def selector_on_device() -> dict[str, Any]:
    """``Prioritized(device="cuda")`` draws the CPU's items, with writes, removals and updates in between."""
    table = filled(DT_COLUMNS, 200, 20, "pinned", ragged=True)
    here, there = Prioritized(), Prioritized(device=DEVICE)
    differing, most = 0, 0.0
    for step in range(20):
        a = table.select(here, 256, generator=CounterGenerator(5, step))
        b = table.select(there, 256, generator=CounterGenerator(5, step))
        differing += int((a.handles != b.handles).sum())
        assert a.weight is not None
        assert b.weight is not None
        most = max(most, float((a.weight / b.weight - 1).abs().max()))
        table.update_priorities(a.handles, torch.rand(256) * 10)
        table.remove(int(table.handles()[0]))
    return {"ok": differing <= 2 and most < 1e-5, "differing_of_5120": differing, "weights_relative": most}


def graphed_bits() -> dict[str, Any]:
    """GR-29: replayed batches equal eager ones, from both tiers, several windows, while rows change."""
    compared = 0
    for memory in ("pinned", "device"):
        table = filled(DT_COLUMNS, 60, 80, memory, ragged=True)
        windows = {"obs": Window(20, -19, "head"), "action": Window(5), "done": Window(20, -19, "head")}
        collect = GraphedCollect(table, windows, 65, buffers=2)
        for step in range(12):
            chosen = table.select(Uniform(), 65, generator=CounterGenerator(8, step))
            replayed, eager = collect(chosen), table.collect(chosen, windows, device=DEVICE)
            for name in eager:
                pairs = (
                    (replayed[name], eager[name]),
                    (replayed.mask[name], eager.mask[name]),
                    (replayed.timesteps[name], eager.timesteps[name]),
                )
                if not all(torch.equal(a, b) for a, b in pairs):
                    return {"ok": False, "memory": memory, "column": name, "step": step}
                compared += len(pairs)
            if replayed.bytes_read != eager.bytes_read or not torch.equal(replayed.handles, chosen.handles):
                return {"ok": False, "memory": memory, "step": step, "what": "handles or bytes"}
            block = random_steps(DT_COLUMNS, 30 + step, torch.Generator().manual_seed(step))
            table.write(block)
    return {"ok": True, "tensors": compared}


def past_2_gib(table: TrajectoryTable) -> dict[str, Any]:
    selection = table.select(Uniform(), 512, generator=CounterGenerator(1))
    last = table.handles()[-64:]
    anchors = torch.full((64,), int(table.lengths()[-1]) - 20)
    far = Selection(last, anchors, torch.ones(64))
    ok = True
    for chosen in (selection, far):
        a = table.collect(chosen, Window(20), device=DEVICE)["obs"].cpu()
        ok = ok and torch.equal(a, table.collect(chosen, Window(20))["obs"])
    return {"ok": ok and table.nbytes > 2**31, "bytes": table.nbytes}


def overwritten_while_prefetching() -> dict[str, Any]:
    """Trajectories hold one value each; a torn batch would mix two."""
    table = TrajectoryTable(TableSpec((ColumnSpec("x", (512,)),), 4000, 40), memory="pinned")
    for number in range(40):
        table.write({"x": torch.full((100, 512), float(number))})
    loader = TrajectoryLoader(table, Uniform(), Window(90, -45, "around"), 256, device=DEVICE, prefetch=2)
    torn = 0
    for number in range(40, 240):
        batch = next(loader)
        inside = batch.mask["x"]
        values = batch["x"].mean(-1)
        low = torch.where(inside, values, torch.inf).amin(1)
        high = torch.where(inside, values, -torch.inf).amax(1)
        torn += int((low != high).sum())
        table.write({"x": torch.full((100, 512), float(number))})
    return {"ok": torn == 0, "torn": torn, "redrawn": loader.redrawn}


def prefetch_changes_nothing() -> dict[str, Any]:
    table = filled(DT_COLUMNS, 200, 300, "pinned", ragged=True)
    runs = []
    for prefetch in (0, 2):
        loader = TrajectoryLoader(
            table, Prioritized(), Window(20, -19, "head"), 128, device=DEVICE, prefetch=prefetch, seed=4
        )
        runs.append([next(loader) for _ in range(20)])
    ok = all(
        torch.equal(a.handles, b.handles) and torch.equal(a["obs"], b["obs"])
        for a, b in zip(*runs, strict=True)
    )
    return {"ok": ok}


def tree_on_device() -> dict[str, Any]:
    """Unit weights past 2^24 are all reached; random weights agree with the CPU but for boundary rounding."""
    count = 2**24 + 4097
    tree = PrefixSumTree(count, device=DEVICE)
    tree.update(torch.arange(count, device=DEVICE), torch.ones(count, dtype=torch.float64, device=DEVICE))
    index = torch.arange(count - 2**20, count, device=DEVICE)
    exact = bool(torch.equal(tree.draw((index.double() + 0.5) / count)[0], index))
    weights = torch.rand(300_000, dtype=torch.float64)
    weights[torch.rand(300_000) < 0.2] = 0
    device, host = PrefixSumTree(300_000, device=DEVICE), PrefixSumTree(300_000)
    for t in (device, host):
        t.update(torch.arange(300_000, device=t.device), weights.to(t.device))
    for step in range(20):
        at = torch.randperm(300_000)[:1000]
        value = torch.rand(1000, dtype=torch.float64) * 10.0 ** (step % 5)
        weights[at] = value
        device.update(at.to(DEVICE), value.to(DEVICE))
        host.update(at, value)
    u = torch.rand(200_000, dtype=torch.float64)
    found, weight = device.draw(u.to(DEVICE))
    differing = int((found.cpu() != host.draw(u)[0]).sum())
    zero = int((weights[found.cpu()] == 0).sum())
    return {
        "ok": exact and differing <= 2 and zero == 0 and torch.equal(weight.cpu(), weights[found.cpu()]),
        "unit_weights_exact": exact,
        "differing_of_200000": differing,
        "zero_weight_drawn": zero,
        "relative_total_error": abs(device.total / float(weights.sum()) - 1),
        "minimum_equal": device.minimum == float(weights[weights > 0].min()),
    }


def law_on_device() -> dict[str, Any]:
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 4.0, 1e-3, 3.0], dtype=torch.float64)
    tree = PrefixSumTree(7, device=DEVICE)
    tree.update(torch.arange(7, device=DEVICE), weights.to(DEVICE))
    draws = 4_000_000
    u = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(tree.draw(u.to(DEVICE))[0], minlength=7).cpu().double()
    expected = weights / weights.sum() * draws
    kept = weights > 0
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    return {"ok": statistic < 30.9 and int(counts[2]) == 0, "chi_square_5_dof": statistic}  # p = 1e-5


def checks(wide: TrajectoryTable) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for memory in ("pinned", "device", "host"):
        check(results, f"same bits from {memory} memory", lambda memory=memory: same_bits(memory))
    check(results, "columns in two tiers", two_tiers)
    check(results, "prioritised selector on the device", selector_on_device)
    check(results, "batches replayed from a graph", graphed_bits)
    check(results, "a column past 2^31 bytes", lambda: past_2_gib(wide))
    check(results, "no torn batch while trajectories are overwritten", overwritten_while_prefetching)
    check(results, "prefetch changes nothing", prefetch_changes_nothing)
    check(results, "tree on the device", tree_on_device)
    check(results, "law of draws on the device", law_on_device)
    return results


def selections(table: TrajectoryTable, batch: int, window: int, count: int = 8) -> list[Selection]:
    anchor: Any = "uniform" if window < int(table.lengths()[0]) else "start"
    out = []
    for seed in range(count):
        chosen = table.select(Uniform(), batch, anchor=anchor, generator=CounterGenerator(9, seed))
        # Whole windows: padding would flatter the rate of useful bytes.
        out.append(
            Selection(
                chosen.handles,
                chosen.anchors.clamp(max=int(table.lengths()[0]) - window),
                chosen.probability,
            )
        )
    return out


def collect_arms(
    table: TrajectoryTable, device_table: TrajectoryTable, batch: int, length: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Arms that each move 8 batches (or copy as many row bytes), and the row bytes of one call."""
    chosen = selections(table, batch, length)
    chosen_device = [
        Selection(
            device_table.handles()[torch.randint(0, len(device_table), (batch,))], s.anchors, s.probability
        )
        for s in chosen
    ]
    window = Window(length)
    row_bytes = table.storage[0].shape[1] * 8
    nbytes = batch * length * row_bytes
    source = torch.empty(nbytes * 8 // 8, dtype=torch.int64, pin_memory=True)
    target = torch.empty_like(source, device=DEVICE)
    there = torch.empty_like(target)
    out = table.collect(chosen[0], window, device=DEVICE).buffers

    def run(which: TrajectoryTable, picks: list[Selection], backend: Any) -> None:
        for selection in picks:
            which.collect(selection, window, device=DEVICE, backend=backend, out=out)

    def graphed(which: TrajectoryTable, picks: list[Selection]) -> Callable[[], Any]:
        collect = GraphedCollect(which, window, batch)
        return lambda: [collect(selection) for selection in picks]

    arms = {
        "pinned copy": lambda: target.copy_(source, non_blocking=True),
        "collect from pinned": lambda: run(table, chosen, "triton"),
        "CPU gather + copy": lambda: run(table, chosen, "torch"),
        "device copy": lambda: there.copy_(target),
        "collect from device": lambda: run(device_table, chosen_device, "triton"),
        "graphed collect from pinned": graphed(table, chosen),
        "graphed collect from device": graphed(device_table, chosen_device),
    }
    return arms, dict.fromkeys(arms, 8 * nbytes)


CASES = (
    ("112 B rows", 20, 256), ("112 B rows", 20, 2048), ("112 B rows", 20, 8192), ("112 B rows", 1000, 64),
    ("112 B rows", 1000, 256), ("112 B rows", 1000, 1024), ("1024 B rows", 20, 256),
    ("1024 B rows", 20, 2048), ("1024 B rows", 100, 512), ("1024 B rows", 1000, 64),
)  # fmt: skip


def measure_collection(
    tables: dict[str, tuple[TrajectoryTable, TrajectoryTable]],
    case: tuple[str, int, int],
    headline: list[Headline],
) -> dict[str, list[float]]:
    name, length, batch = case
    arms, nbytes = collect_arms(*tables[name], batch, length)
    seconds = interleaved(arms, repeats=REPEATS, warm_up=2, synchronize=torch.cuda.synchronize)
    label = f"{name}, L={length}, B={batch}"
    rate = {arm: [nbytes[arm] / s / 1e9 for s in values] for arm, values in seconds.items()}
    print(label, {arm: f"{median(values):.1f} GB/s" for arm, values in rate.items()}, flush=True)
    wide_goal = ">= 0.85" if name.startswith("1024") or length == 1000 else ">= 0.80"
    for a, b, target in [
        ("collect from pinned", "pinned copy", wide_goal),
        ("collect from pinned", "CPU gather + copy", ">= 3"),
        ("collect from device", "device copy", ""),
        ("graphed collect from pinned", "pinned copy", wide_goal),
        ("graphed collect from pinned", "CPU gather + copy", ">= 3"),
        ("graphed collect from device", "device copy", ">= 0.6"),
    ]:
        values = sorted(x / y for x, y in zip(rate[a], rate[b], strict=True))
        note = f"{median(rate[a]):.1f} against {median(rate[b]):.1f} GB/s of row bytes, whole calls"
        headline.append(
            Headline(f"{label}: {a} / {b}", median(values), "x", values[0], values[-1], target, note)
        )
    return {f"{label}: {arm}": values for arm, values in seconds.items()}


def measure_calls(table: TrajectoryTable, headline: list[Headline]) -> dict[str, list[float]]:
    """Host time of a call: batches so small that the GPU is never waited for."""
    chosen = table.select(Uniform(), 16, generator=CounterGenerator(2))
    window = Window(1)
    out = table.collect(chosen, window, device=DEVICE).buffers

    def collect() -> None:
        for _ in range(100):
            table.collect(chosen, window, device=DEVICE, out=out)

    seconds = interleaved(
        {"collect": collect}, repeats=REPEATS, warm_up=2, synchronize=torch.cuda.synchronize
    )
    us = sorted(1e4 * value for value in seconds["collect"])
    headline.append(Headline("host time of a collect call", median(us), "us", us[0], us[-1]))
    print(f"collect: {median(us):.0f} us of host time", flush=True)
    profile = cProfile.Profile()
    profile.runcall(collect)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(18)
    lines = [line[:110] for line in text.getvalue().splitlines() if line.strip()]
    print("\n".join(lines[3:22]), flush=True)
    return {"100 collect calls of 16 rows": seconds["collect"]}


def measure_draws(headline: list[Headline]) -> dict[str, list[float]]:
    count, draws, rounds = 10**8, 4096, 50
    tree = PrefixSumTree(count, device=DEVICE)
    step = 10**7
    weights = torch.rand(count, dtype=torch.float64, device=DEVICE)
    begin = time.perf_counter()
    tree.update(torch.arange(count, device=DEVICE), weights)
    torch.cuda.synchronize()
    built = time.perf_counter() - begin
    u = [torch.rand(draws, dtype=torch.float64, device=DEVICE) for _ in range(rounds)]
    cumulative = weights.cumsum(0)
    found, _ = tree.draw(u[0])
    expected = torch.searchsorted(cumulative, u[0] * cumulative[-1], right=True)
    differing = int((found != expected).sum())
    flat_u = u[0]
    at = [torch.randperm(step, device=DEVICE)[:draws] * (count // step) for _ in range(rounds)]
    values = torch.rand(draws, dtype=torch.float64, device=DEVICE)

    def with_update() -> None:
        for i in range(rounds):
            tree.draw(u[i])
            tree.update(at[i], values)

    arms: dict[str, Callable[[], Any]] = {
        "4096 draws": lambda: [tree.draw(x) for x in u],
        "4096 draws + update": with_update,
        "flat cumsum + searchsorted (2 rounds)": lambda: [
            torch.searchsorted(torch.cumsum(weights, 0), flat_u) for _ in range(2)
        ],
    }
    seconds = interleaved(arms, repeats=REPEATS, warm_up=1, synchronize=torch.cuda.synchronize)
    per_call = {
        "4096 draws": [s / rounds for s in seconds["4096 draws"]],
        "4096 draws + update": [s / rounds for s in seconds["4096 draws + update"]],
        "flat cumsum + searchsorted": [s / 2 for s in seconds["flat cumsum + searchsorted (2 rounds)"]],
    }
    for arm, target in zip(per_call, ("<= 0.2", "", ""), strict=True):
        ms = sorted(1e3 * s for s in per_call[arm])
        note = (
            f"1e8 float64 priorities on the device; tree {tree.nbytes / 1e9:.2f} GB, built in {built:.2f} s"
        )
        headline.append(Headline(f"{arm} of 1e8", median(ms), "ms", ms[0], ms[-1], target, note))
        print(arm, f"{median(ms):.3f} ms", flush=True)
    headline.append(
        Headline(
            "of 4096 draws, other than a flat float64 cumsum's", differing, "", target="boundary rounding"
        )
    )
    return {f"1e8: {arm}": values for arm, values in per_call.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; no stage starts later")
    options = parser.parse_args()
    begin = time.perf_counter()
    np.random.seed(0)
    torch.manual_seed(0)
    tables = {
        "112 B rows": (filled(DT_COLUMNS, 3000, 1000, "pinned"), filled(DT_COLUMNS, 3000, 1000, "device")),
        "1024 B rows": (
            filled(WIDE_COLUMNS, 2200, 1000, "pinned"),
            filled(WIDE_COLUMNS, 2200, 1000, "device"),
        ),
    }
    print(f"tables filled in {time.perf_counter() - begin:.0f} s", flush=True)
    found = checks(tables["1024 B rows"][0])
    headline: list[Headline] = []
    samples: dict[str, list[float]] = {}
    failed = [item["check"] for item in found if not item["ok"]]
    stages: list[Callable[[], dict[str, list[float]]]] = [
        lambda: measure_draws(headline),
        lambda: measure_calls(tables["112 B rows"][0], headline),
        *(lambda case=case: measure_collection(tables, case, headline) for case in CASES),
    ]
    for number, stage in enumerate(stages):
        if time.perf_counter() - begin > options.budget:
            failed.append(f"{len(stages) - number} stages not started within {options.budget:.0f} s")
            break
        try:
            samples |= stage()
        except Exception as error:
            failed.append("".join(traceback.format_exception_only(error))[-600:])
            traceback.print_exc()
        path = write_result(
            "rl_replay_gear_gpu",
            question="Does collection on the GPU give the CPU's bits, and how near the links' limits is it?",
            headline=headline,
            samples=samples,
            folder=options.out,
            checks=found,
            failed=failed,
            seconds=time.perf_counter() - begin,
        )
    print(f"{path}: {len(found)} checks, failed: {failed or 'none'}, {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

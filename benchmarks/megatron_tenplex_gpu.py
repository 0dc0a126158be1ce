"""Change the layout of a GPT with at least 1 B parameters on two GPUs: TP2 <-> PP2 <-> DP2, live.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 benchmarks/megatron_tenplex_gpu.py --budget 90 --out DIR

Stages (``--only`` picks), all of which rewrite the result file so that a cut-off keeps what is done: link
peak (NCCL send and receive of one contiguous tensor), the six directions at full size (the first round makes
groups and layouts, the second is as it comes, the third is prepared ahead), torch_dist through /dev/shm, a
DeepSpeed engine on 2, 1 and 2 ranks, losses of a small model over 20 steps after each direction against the
uninterrupted run. Needs megatron-core (a Python 3.12 wheel exists); no TransformerEngine, no Apex.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
import traceback
import warnings
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.common import RESULTS, Headline, write_result
from megatron_tenplex import GPTShape, ParallelConfig, Reconfigurator, World
from megatron_tenplex.layout import PRESETS
from megatron_tenplex.testing import install_cpu_compat
from megatron_tenplex.testing.checkpoint import load_checkpoint, save_checkpoint
from megatron_tenplex.testing.gpt import GPTJob

NAME = "megatron_tenplex_gpu"
TOUR = ("tp=2", "pp=2", "dp=2", "tp=2", "dp=2", "pp=2", "tp=2")  # all six directions
SMALL = GPTShape(4, 128, 4, 256)


class Run:
    """The result so far; rank 0 writes it after every stage."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.deadline = out, time.monotonic() + budget
        self.headline: list[Headline] = []
        self.samples: dict[str, list[float]] = {}
        self.more: dict[str, object] = {"stages": {}, "directions": []}

    def left(self) -> float:
        """Seconds of the budget, as the slower of the ranks sees them."""
        seconds = torch.tensor([self.deadline - time.monotonic()])
        WORLD.control.allreduce([seconds], dist.AllreduceOptions()).wait()
        return float(seconds) / WORLD.num_workers

    def stage(self, name: str, function, *args) -> None:
        """Run one stage; an error is recorded and the next stage goes on if all ranks met it."""
        started = time.perf_counter()
        try:
            function(self, *args)
            said = "ok"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if WORLD.worker == 0:
                traceback.print_exc()
        self.more["stages"][name] = {"outcome": said[:300], "seconds": time.perf_counter() - started}
        if WORLD.worker == 0:
            print(f"{name}: {said[:200]} ({time.perf_counter() - started:.1f} s)", flush=True)
        self.save()

    def save(self) -> None:
        """Write what is known so far."""
        if WORLD.worker == 0:
            write_result(
                NAME,
                question="How fast does a GPT of over 1 B parameters change its layout on two GPUs?",
                headline=self.headline,
                samples=self.samples,
                folder=self.out,
                **self.more,
            )


def both_ways(transport, nbytes: int, repeats: int = 5) -> list[float]:
    """Bytes/s each way of one contiguous message to the other worker and one from it."""
    other = 1 - WORLD.worker
    out, into = (torch.zeros(nbytes, dtype=torch.uint8, device=transport.device) for _ in range(2))
    rates = []
    for turn in range(repeats + 2):
        synchronize()
        started = time.perf_counter()
        transport.exchange([(other, out)], [(other, into)]).wait()
        synchronize()
        if turn > 1:
            rates.append(nbytes / (time.perf_counter() - started))
    return rates


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def link_peak(run: Run, transport, nbytes: int) -> None:
    """NCCL send and receive at once, one tensor of about the size that a change moves."""
    rates = both_ways(transport, nbytes)
    run.samples["link_peak_bytes_per_s"] = rates
    peak = statistics.median(rates)
    run.headline.append(
        Headline(
            "link peak, send + receive, each way", peak / 1e9, "GB/s", min(rates) / 1e9, max(rates) / 1e9
        )
    )


def losses(run: Run, precision: str, steps: int) -> None:
    """A tour through all six directions, ``steps`` steps after each, against the uninterrupted run."""
    job = GPTJob(SMALL, seq_length=32, global_batch_size=4, micro_batch_size=2, precision=precision)
    curves = []
    for tour in (TOUR[:1], TOUR):
        elastic = Reconfigurator(job, world=WORLD, verify=True)
        state = elastic.start(ParallelConfig.parse(tour[0]), resume=False)
        curve = [job.step(state, elastic.parallel)[0] for _ in range(steps)]
        for after in tour[1:]:
            state = elastic.reconfigure(ParallelConfig.parse(after))
            curve += [job.step(state, elastic.parallel)[0] for _ in range(steps)]
        curve += [job.step(state, elastic.parallel)[0] for _ in range(len(TOUR) * steps - len(curve))]
        curves.append(curve)
        del elastic, state
    gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
    run.samples[f"loss difference {precision}"] = gaps
    run.more[f"loss_difference_{precision}"] = {
        f"{before} -> {after}": max(gaps[(i + 1) * steps : (i + 2) * steps])
        for i, (before, after) in enumerate(pairwise(TOUR))
    }
    run.headline.append(
        Headline(
            f"largest loss difference, {precision}, {steps} steps after each of six changes",
            max(gaps),
            "nats",
            target="2e-6" if precision == "fp32" else "",
            note=f"losses {curves[0][0]:.3f} to {curves[0][-1]:.3f}",
        )
    )


def directions(run: Run, job: GPTJob, rounds: int) -> None:
    """All six directions in three rounds or more: first visit, as it comes, prepared with a shadow."""
    built: list[ParallelConfig] = []

    def build(parallel):
        built.append(parallel)
        return replace(job, initialize=len(built) == 1)(parallel)

    elastic = Reconfigurator(build, world=WORLD, staging_bytes=1 << 30)
    begun = time.perf_counter()
    state = elastic.start(ParallelConfig.parse(TOUR[0]), resume=False)
    say(f"start {time.perf_counter() - begun:.2f} s")
    begun = time.perf_counter()
    job.step(state, elastic.parallel)
    synchronize()
    say(f"first step {time.perf_counter() - begun:.2f} s")
    run.more["parameters"] = job.shape.num_parameters
    rows = run.more["directions"]
    kinds = ["first", *(["as it comes", "prepared"] * rounds)]
    for turn, kind in enumerate(kinds):
        for before, after in pairwise(TOUR):
            if turn and run.left() < 8:
                run.more["note"] = f"stopped by the budget in round {turn}"
                summarise(run)
                return
            parallel = ParallelConfig.parse(after)
            begun = time.perf_counter()
            if kind == "prepared":
                elastic.prepare(parallel, shadow=True)
                elastic.planning.wait()
            row = {"round": turn, "kind": kind, "direction": f"{before} -> {after}"}
            row["prepare_s"] = time.perf_counter() - begun
            row |= one_change(elastic, job, parallel)
            rows.append(row)
            say(f"{kind} {row['direction']} {row['pause_s']:.2f} s {row['seconds']}")
            run.save()
    summarise(run)


def one_change(elastic: Reconfigurator, job: GPTJob, parallel: ParallelConfig) -> dict[str, object]:
    """The pause by stages, bytes of the busiest rank, and the first step afterwards."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    WORLD.agree(None, "starting together")
    started = time.perf_counter()
    state = elastic.reconfigure(parallel)
    synchronize()
    pause = time.perf_counter() - started
    started = time.perf_counter()
    loss, _ = job.step(state, elastic.parallel)
    synchronize()
    first_step = time.perf_counter() - started
    report = elastic.report
    everyone = WORLD.all_gather_json(
        [report.sent_bytes, report.received_bytes, report.seconds["move"], pause]
    )
    busiest = max(max(sent, received) for sent, received, *_ in everyone)
    move = max(m for *_, m, _ in everyone)
    return {
        "busiest_bytes": busiest,
        "move_s": move,
        "bytes_per_s": busiest / move,
        "pause_s": max(p for *_, p in everyone),
        "first_step_s": first_step,
        "seconds": {k: round(v, 5) for k, v in report.seconds.items()},
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        "loss": loss,
    }


def say(text: str) -> None:
    """Print on one rank."""
    if WORLD.worker == 0:
        print(text, flush=True)


def summarise(run: Run) -> None:
    """Headline rows over the rounds after the first; rates only where a GB or more moves."""
    rows = [row for row in run.more["directions"] if row["round"] > 0]
    peak = statistics.median(run.samples["link_peak_bytes_per_s"])
    for kind, direction in dict.fromkeys((row["kind"], row["direction"]) for row in rows):
        chosen = [row for row in rows if (row["kind"], row["direction"]) == (kind, direction)]
        pauses = [row["pause_s"] for row in chosen]
        name = f"{direction}, {kind}"
        run.samples[f"pause {name}"] = pauses
        run.samples[f"move {name}"] = [row["move_s"] for row in chosen]
        gigabytes = chosen[0]["busiest_bytes"] / 1e9
        note = f"{gigabytes:.2f} GB by the busiest rank"
        run.headline.append(
            Headline(f"pause {name}", statistics.median(pauses), "s", min(pauses), max(pauses), note=note)
        )
        if gigabytes >= 1 or not torch.cuda.is_available():
            shares = [row["bytes_per_s"] / peak for row in chosen]
            what = f"share of the link peak {name}"
            run.headline.append(
                Headline(what, statistics.median(shares), "", min(shares), max(shares), ">= 0.8")
            )


def checkpoint(run: Run, job: GPTJob, folder: Path) -> None:
    """torch_dist: save in one layout, build the other, load: the same change through shared memory."""
    needed = 16 * job.shape.num_parameters
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed")
    elastic = Reconfigurator(job, world=WORLD)
    for before, after in (("tp=2", "pp=2"), ("pp=2", "tp=2")):
        state = elastic.start(ParallelConfig.parse(before), resume=False)
        job.step(state, elastic.parallel)
        synchronize()
        started = time.perf_counter()
        save_checkpoint(state, folder)
        synchronize()
        saved = time.perf_counter() - started
        del state
        state = elastic.start(ParallelConfig.parse(after), resume=False)
        elastic.describe()  # makes Adam's state, without which describing for a load asserts
        built = time.perf_counter() - started - saved
        load_checkpoint(state, folder)
        synchronize()
        total = time.perf_counter() - started
        for name, seconds in (("save", saved), ("build", built), ("load", total - saved - built)):
            run.samples.setdefault(f"torch_dist {name}", []).append(seconds)
        rows = [r for r in run.more["directions"] if r["direction"] == f"{before} -> {after}"]
        for kind in ("as it comes", "prepared"):
            pauses = [row["pause_s"] for row in rows if row["kind"] == kind]
            if not pauses:
                continue
            run.headline.append(
                Headline(
                    f"torch_dist through /dev/shm against live ({kind}), {before} -> {after}",
                    total / statistics.median(pauses),
                    "x",
                    target=">= 10",
                    note=f"{total:.2f} s; building included on both sides",
                )
            )
        del state
    if WORLD.worker == 0:
        shutil.rmtree(folder, ignore_errors=True)


def deepspeed_engine(run: Run, width: int, steps: int) -> None:
    """ZeRO-1 in fp32 on 2, 1 and 2 ranks against the uninterrupted run on two."""
    import deepspeed

    from megatron_tenplex import ZeroReconfigurator

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes

    def build():
        rank, size = dist.get_rank(), dist.get_world_size()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
        torch.manual_seed(3)
        layers = [torch.nn.Linear(width, width) for _ in range(8)]
        model = torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.GELU())))
        config = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 8 // size,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        return deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]

    def step(engine, number):
        total = torch.zeros(1)
        if engine is not None:
            batch = torch.randn(8, width, generator=torch.Generator().manual_seed(number))
            mine = batch.chunk(dist.get_world_size())[dist.get_rank()].to(engine.device)
            loss = (engine(mine) - mine.roll(1, 1)).square().mean()
            engine.backward(loss)
            engine.step()
            total[0] = float(loss) / dist.get_world_size()
        return sum(WORLD.all_gather_json(float(total)))

    curves, pauses = [], []
    for visited in ((2,), (2, 1, 2)):
        elastic = ZeroReconfigurator(build, world=WORLD, staging_bytes=1 << 30)
        curve = []
        for number, dp in enumerate(visited):
            started = time.perf_counter()
            engine = elastic.reconfigure(dp) if number else elastic.start(dp)
            synchronize()
            if number:
                pauses.append(max(WORLD.all_gather_json(time.perf_counter() - started)))
            curve += [step(engine, len(curve) + i) for i in range(steps * 3 // len(visited))]
        curves.append(curve)
    gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
    run.samples |= {"loss difference deepspeed": gaps, "pause deepspeed": pauses}
    run.headline.append(
        Headline(
            "largest loss difference, DeepSpeed ZeRO-1 on 2, 1 and 2 ranks",
            max(gaps),
            "",
            target="2e-6",
            note=f"{8 * width * (width + 1) / 1e6:.0f} M parameters, fp32, pauses "
            + " and ".join(f"{p:.2f} s" for p in pauses),
        )
    )


def main() -> None:
    global WORLD  # noqa: PLW0603 - the process's one world
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=90, help="seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--model", default="gpt3-xl", choices=[*PRESETS, "tiny"])
    parser.add_argument("--rounds", type=int, default=1, help="of each kind, after the first visits")
    parser.add_argument("--only", nargs="+", help="names of stages, e.g. link directions", default=[])
    parser.add_argument("--steps", type=int, default=20, help="after each change, for the loss curves")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    install_cpu_compat()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))
    WORLD = World(store, rank, size, timeout=60, kept_groups=6)
    from megatron_tenplex.transport import TorchTransport

    run = Run(options.out, options.budget)
    transport = TorchTransport(WORLD.data, WORLD.worker)
    gpu = torch.cuda.is_available()
    job = GPTJob(
        SMALL if options.model == "tiny" else PRESETS[options.model],
        seq_length=512 if gpu else 16,
        global_batch_size=4,
        num_samples=4096,
        precision="bf16",
    )
    stages = (
        ("link", 0, link_peak, (transport, 2 << 30 if gpu else 8 << 20)),
        ("directions", 0, directions, (job, options.rounds)),
        ("checkpoint", 30, checkpoint, (job, Path("/dev/shm/tenplex_benchmark"))),
        ("deepspeed", 15, deepspeed_engine, (4096 if gpu else 64, 7)),
        ("losses", 30, losses, ("fp32", options.steps)),
        ("losses_bf16", 30, losses, ("bf16", options.steps)),
    )
    for name, seconds, function, arguments in stages:
        if (not options.only or name in options.only) and run.left() > seconds:
            run.stage(name, function, *arguments)
            gc.collect()
    if rank == 0:
        print(json.dumps([[h.what, h.value, h.unit] for h in run.headline]))
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()  # dist_checkpointing keeps a process that would outlive us
    os._exit(0)  # NCCL's threads may wait for communicators that are gone


if __name__ == "__main__":
    main()

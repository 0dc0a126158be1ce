"""Which policy starts models fastest on bursty traces, and how long does a decision take?

python benchmarks/vllm_serverless_loader_scheduler.py [--out FOLDER] [--quick]

Policies on the same traces, servers and host caches: random, load only (first free server), locality only
(cheapest server, waits while it is full) and start-up time without migration, with it, and with bytes that go
to host memory while instances are moved away (staging). All see the same estimators, reuse idle instances and
evict the least recently used ones in the same way. Decisions are timed in processor time on nearly full
clusters of 4 to 400 servers with 4 GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from vllm_serverless_loader import (  # noqa: E402
    FirstAvailablePolicy,
    Instance,
    LoadingTimeEstimator,
    LocalityPolicy,
    MigrationTimeEstimator,
    ModelInfo,
    RandomPolicy,
    ServerSpec,
    ServerState,
    StartupTimePolicy,
    Trace,
    simulate,
)

CV = 4.0  # of the times between requests for one model: bursts of some 16 requests
BANDWIDTH = {"remote": 1.25e9, "disk": 5e9, "host": 25e9}
POLICIES: dict[str, Callable[[dict[str, ModelInfo]], Any]] = {
    "random": RandomPolicy,
    "load only": FirstAvailablePolicy,
    "locality only": LocalityPolicy,
    "start-up time, no migration": lambda models: StartupTimePolicy(models, migration=False),
    "start-up time": StartupTimePolicy,
    "start-up time, staging": lambda models: StartupTimePolicy(models, staging=True),
}


def catalogue(count: int) -> list[ModelInfo]:
    """Models of 13, 26 and 60 GB on 1, 2 and 4 GPUs, smaller ones more often."""
    sizes = [(13_000_000_000,)] * 6 + [(13_000_000_000,) * 2] * 3 + [(15_000_000_000,) * 4]
    return [ModelInfo(f"m{number}", sizes[number % len(sizes)]) for number in range(count)]


def scenario(load: float, seed: int, *, share: float, servers: int, minutes: float) -> dict[str, Any]:
    """One trace on one cluster under each policy. ``load``: share of GPUs that decoding alone keeps busy.

    ``share``: share of the servers whose disks hold a model; others fetch it from afar.
    """
    models = catalogue(servers * 2)
    known = {one.name: one for one in models}
    spec = ServerSpec(num_gpus=4, host_cache_bytes=100e9, bandwidth=BANDWIDTH, load_fixed_s=0.3)
    service = 256 * spec.prefill_s_per_token + 256 * spec.decode_s_per_token
    gpus = statistics.mean(one.num_gpus for one in models)
    rate = load * servers * spec.num_gpus / (service * gpus)
    names = [one.name for one in models]
    random.Random(seed).shuffle(names)
    trace = Trace.gamma(
        names, requests_per_s=rate, duration_s=60 * minutes, cv=CV, zipf=0.5, output_tokens=256, seed=seed
    )
    draw = random.Random(seed + 1000)
    holders = {name: set(draw.sample(range(servers), max(2, round(servers * share)))) for name in names}
    on_disk = [{name for name in names if number in holders[name]} for number in range(servers)]
    found = {}
    for name, make in POLICIES.items():
        result = simulate(trace, models, [spec] * servers, make(known), on_disk=on_disk, keep_alive_s=10.0)
        found[name] = {**result.summary(), "startup_s": np.round(result.startup_s, 4).tolist()}
    return found


def nearly_full(servers: int, seed: int) -> tuple[dict[str, ModelInfo], list[ServerState]]:
    draw = random.Random(seed)
    models = {one.name: one for one in catalogue(2 * servers)}
    names, cluster = itertools.count(), []
    for number in range(servers):
        free, instances = 4 - (draw.random() < 0.1), []
        while free > 0:
            model = draw.choice([one for one in models.values() if one.num_gpus <= free])
            free -= model.num_gpus
            instances.append(Instance(f"i{next(names)}", model.name, context_tokens=draw.randrange(4096)))
        tiers = {name: draw.choice(["host", "disk", "disk"]) for name in models if draw.random() < 0.2}
        estimators = LoadingTimeEstimator(BANDWIDTH), MigrationTimeEstimator()
        cluster.append(ServerState(f"s{number}", 4, tiers, *estimators, instances, draw.choice([0.0, 5.0])))
    return models, cluster


def decisions(servers: int, repeats: int) -> list[float]:
    """Processor seconds of single decisions."""
    spent = []
    for seed in range(repeats):
        models, cluster = nearly_full(servers, seed)
        policy = StartupTimePolicy(models)
        for name in random.Random(seed).sample(sorted(models), min(8, len(models))):
            begin = time.process_time()
            policy.allocate(name, cluster, 1.0)
            spent.append(time.process_time() - begin)
    return spent


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), sharey=True)
    for axis, (label, runs) in zip(np.atleast_1d(axes), found.items(), strict=True):
        for name in POLICIES:
            values = np.sort(np.concatenate([run[name]["startup_s"] for run in runs]))
            axis.plot(np.maximum(values, 0.01), 1 - np.arange(len(values)) / len(values), label=name)
        axis.set(xscale="log", yscale="log", xlabel="start-up time, s", ylim=(1e-3, 1))
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("share of requests that wait longer")
    np.atleast_1d(axes)[-1].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="small, to try the script")
    options = parser.parse_args()
    servers, minutes, seeds = (8, 4.0, range(1)) if options.quick else (24, 10.0, range(3))
    headline, samples, table = [], {}, {}
    found: dict[str, list[dict[str, Any]]] = {}
    for share, load in ((1.0, 0.1), (1.0, 0.3), (1.0, 0.5), (0.125, 0.1), (0.125, 0.3)):
        label = f"load {load:g}, on {'all' if share == 1 else 'an eighth of the'} disks"
        runs = [scenario(load, seed, share=share, servers=servers, minutes=minutes) for seed in seeds]
        found[label] = runs
        for name in POLICIES:
            for measure in ("p99", "mean"):
                values = [run[name][f"startup_{measure}_s"] for run in runs]
                samples[f"{label}: {name}: {measure} start-up"] = values
                what = f"{measure} start-up, {label}, {name}"
                headline.append(Headline(what, statistics.median(values), "s", min(values), max(values)))
        table[label] = {
            name: {key: runs[0][name][key] for key in ("requests", "tiers", "migrated")} for name in POLICIES
        }
        print(label, {name: round(runs[0][name]["startup_p99_s"], 2) for name in POLICIES}, flush=True)
    for size in (4, 25, 100, 400):
        spent = decisions(size, 3 if options.quick else 12)
        samples[f"decision, {size} servers"] = spent
        target = "< 1" if size == 100 else ""
        median, worst = 1e3 * statistics.median(spent), 1e3 * max(spent)
        headline.append(
            Headline(f"decision, {size} servers x 4 GPUs", median, "ms", high=worst, target=target)
        )
        print(size, f"{median:.3f} ms, worst {worst:.3f}", flush=True)
    plot(found, options.out / "vllm_serverless_loader_scheduler.png")
    write_result(
        "vllm_serverless_loader_scheduler",
        question="Which policy starts models fastest on bursty traces, and how long does a decision take?",
        headline=headline,
        samples=samples,
        folder=options.out,
        parameters={"servers": servers, "minutes": minutes, "cv": CV, "zipf": 0.5, "bandwidth": BANDWIDTH},
        first_seed=table,
    )


if __name__ == "__main__":
    main()

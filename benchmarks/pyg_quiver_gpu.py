"""Sampling, features, training and serving on one GPU, on a graph with the sizes of ogbn-products.

python benchmarks/pyg_quiver_gpu.py [--out DIR] [--quick] [--only SECTION ...]

Sections: check, sampling, crossing, features, metrics, training, serving. Needs a CUDA device (does nothing
without one; --rehearse runs all but the kernels on the CPU with a tiny graph and writes nothing). Arms of a
comparison take turns in one run. CPU arms use numba where it is installed, otherwise torch operations of the
same bits, and the result says which. About 120 s on an H100.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "tests" / "pyg_quiver")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from pyg_quiver import (  # noqa: E402
    CSCTopology,
    DeviceTopology,
    EarliestFinishRouter,
    InferenceEngine,
    QuiverFeatureStore,
    QuiverSampler,
    ThresholdRouter,
    calibrate,
    fap,
    plan_placement,
    psgs,
    seed_probability,
)

PRODUCTS = (2_449_029, 123_718_280, 100)  # nodes, directed edges, features
FANOUTS = [15, 10, 5]
SECTIONS = ("check", "sampling", "crossing", "features", "metrics", "training", "serving")
REHEARSAL = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSAL else "cuda"
KERNELS: Any = "torch" if REHEARSAL else "triton"  # the interpreter is too slow for these batches
CPU_BACKEND = "numba" if importlib.util.find_spec("numba") else "torch"


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def skewed_graph(nodes: int, edges: int) -> CSCTopology:
    """Power-law degrees; a node that draws much is drawn much, as in an undirected graph. Made on the GPU."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    rank = torch.randperm(nodes, generator=generator, device=DEVICE)
    weight = (rank + 1.0).double() ** -0.45
    degree = torch.poisson((weight / weight.sum() * edges).float(), generator=generator).long()
    colptr = torch.zeros(nodes + 1, dtype=torch.int64, device=DEVICE)
    torch.cumsum(degree, 0, out=colptr[1:])
    by_rank = torch.argsort(rank)
    # P(rank < r) grows as r^0.55 for weights r^-0.45.
    uniform = torch.rand(int(colptr[-1]), generator=generator, device=DEVICE)
    row = by_rank[(uniform ** (1 / 0.55) * nodes).long().clamp(max=nodes - 1)]
    return CSCTopology(colptr, row)


@dataclass
class Run:
    """What a run has found so far."""

    quick: bool
    samples: dict[str, list[float]] = field(default_factory=dict)
    headline: list[Headline] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def time(self, label: str, arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Median seconds of interleaved arms."""
        repeats = min(repeats, 3) if self.quick else repeats
        seconds = interleaved(arms, repeats=repeats, synchronize=synchronize)
        for arm, values in seconds.items():
            self.samples[f"{label}: {arm}"] = values
        return {arm: statistics.median(values) for arm, values in seconds.items()}

    def ratio(self, what: str, label: str, arm: str, peer: str, *, target: str = "", note: str = "") -> None:
        """How many times faster ``arm`` is than ``peer``, pair by pair."""
        mine, other = self.samples[f"{label}: {arm}"], self.samples[f"{label}: {peer}"]
        ratios = [b / a for a, b in zip(mine, other, strict=True)]
        self.figure(
            what, statistics.median(ratios), "x", target=target, note=note, low=min(ratios), high=max(ratios)
        )

    def figure(
        self, what: str, value: float, unit: str, *, target: str = "", note: str = "",
        low: float | None = None, high: float | None = None,
    ) -> None:  # fmt: skip
        """One headline."""
        self.headline.append(Headline(what, value, unit, low, high, target, note))
        print(f"{what:72s} {value:12.4g} {unit:12s} {target:10s} {note}", flush=True)


@dataclass
class Setting:
    """The graph in every form that the sections use."""

    topology: CSCTopology  # CPU
    cpu: QuiverSampler
    gpu: QuiverSampler
    uva: QuiverSampler
    torch_gpu: QuiverSampler
    x: torch.Tensor  # CPU, pageable

    @property
    def nodes(self) -> int:
        """Nodes of the graph."""
        return self.topology.num_nodes

    def seeds(self, count: int, number: int) -> torch.Tensor:
        """A random batch."""
        return torch.randint(0, self.nodes, (count,), generator=torch.Generator().manual_seed(number))


def make_setting(scale: int) -> Setting:
    nodes, edges, width = PRODUCTS[0] // scale, PRODUCTS[1] // scale, PRODUCTS[2]
    mode: Any = {"gpu": "gpu", "uva": "uva"} if DEVICE == "cuda" else {"gpu": "cpu", "uva": "cpu"}
    on_gpu = skewed_graph(nodes, edges)
    topology = on_gpu.to("cpu")
    return Setting(
        topology,
        QuiverSampler(topology, FANOUTS, backend=CPU_BACKEND),
        QuiverSampler(on_gpu, FANOUTS, mode=mode["gpu"], backend=KERNELS),
        QuiverSampler(topology, FANOUTS, mode=mode["uva"], backend=KERNELS),
        QuiverSampler(on_gpu, FANOUTS, mode=mode["gpu"], backend="torch"),
        torch.randn(nodes, width),
    )


def check(run: Run, setting: Setting) -> None:
    """Bits of all samplers are equal, on small graphs with every option and on this one."""
    from quiver_reference import check_backend

    from pyg_quiver.backends import triton_gpu

    cases = 0 if REHEARSAL else check_backend(triton_gpu.sample, device=DEVICE)
    for key, batch in ((0, 1), (1, 64), (2, 1024)):
        node = setting.seeds(batch, key)
        outs = [s.sample(node, key=key) for s in (setting.cpu, setting.gpu, setting.uva, setting.torch_gpu)]
        for out in outs[1:]:
            for name in ("node", "row", "col", "edge"):
                assert torch.equal(getattr(outs[0], name), getattr(out, name).cpu()), name
    run.found["equal_samples"] = cases + 3
    print(f"check: {cases + 3} samples equal on CPU, GPU, UVA and torch operations", flush=True)


def sampling(run: Run, setting: Setting) -> None:
    """Edges per second by batch size; batches of one arm follow each other without waiting in between."""
    pool = ThreadPoolExecutor(16)

    def one_by_one(sampler: QuiverSampler, nodes: list[torch.Tensor]) -> Callable[[], Any]:
        return lambda: [sampler.sample(node, key=i) for i, node in enumerate(nodes)]

    def at_once(sampler: QuiverSampler, nodes: list[torch.Tensor]) -> Callable[[], Any]:
        return lambda: list(pool.map(lambda i: sampler.sample(nodes[i], key=i), range(len(nodes))))

    for batch in (1, 8) if REHEARSAL else (1, 64, 1024, 4096):
        node = [setting.seeds(batch, i) for i in range(16)]
        edges = statistics.mean(setting.gpu.sample(n, key=i).edge.numel() for i, n in enumerate(node[:4]))
        arms = {
            "GPU": one_by_one(setting.gpu, node[:4]),
            "UVA": one_by_one(setting.uva, node[:4]),
            "torch ops on the GPU": one_by_one(setting.torch_gpu, node[:4]),
        }
        if batch <= 1024:
            arms["CPU, 1 thread"] = one_by_one(setting.cpu, node[:1])
            arms["CPU, 16 threads"] = at_once(setting.cpu, node)
        batches = {"CPU, 1 thread": 1, "CPU, 16 threads": 16}
        label = f"sampling batch {batch}"
        for arm, seconds in run.time(label, arms, repeats=9).items():
            count = batches.get(arm, 4)
            run.samples[f"{label}: {arm}"] = [s / count for s in run.samples[f"{label}: {arm}"]]
            target = ">= 300" if arm == "GPU" and batch >= 1024 else ""
            run.figure(f"{arm}, batch {batch}", edges * count / seconds / 1e6, "M edges/s", target=target)
        if batch in (8, 1024):
            run.ratio(f"UVA / GPU sampling, batch {batch}", label, "UVA", "GPU", target=">= 0.25")
            peers = {"torch ops on the GPU": ">= 3", "CPU, 16 threads": ">= 1.5", "CPU, 1 thread": ">= 20"}
            for peer, target in peers.items():
                what = f"GPU / {peer}, batch {batch}"
                run.ratio(what, label, "GPU", peer, target=target, note=CPU_BACKEND)


def crossing(run: Run, setting: Setting) -> None:
    """Is there a PSGS below which the CPU is faster? Same batches on both, idle machine."""
    samplers = {"cpu": setting.cpu, "gpu": setting.gpu}
    sizes = (1, 4, 8) if REHEARSAL else (1, 2, 4, 8, 16, 64, 256, 1024)
    profile = calibrate(samplers, batch_sizes=sizes, repeats=5 if run.quick else 20)
    throughput = ThresholdRouter.from_profile(profile)
    latency = ThresholdRouter.from_profile(profile, "latency")
    run.found["cost"] = {route: [m.intercept_s, m.slope_s] for route, m in profile.cost.items()}
    run.found["threshold_psgs"] = {"throughput": str(throughput.threshold), "latency": str(latency.threshold)}
    mean = float(setting.cpu.psgs().mean())
    cost = profile.cost
    for route in samplers:
        note = f"+ {cost[route].slope_s * 1e9:.2f} ns a unit of PSGS"
        run.figure(f"{route}: fixed cost of a batch", cost[route].intercept_s * 1e6, "us", note=note)
    note = f"{throughput.threshold / mean:.2g} mean seeds; {CPU_BACKEND}; 0: the GPU always wins when idle"
    value = throughput.threshold if throughput.threshold != float("inf") else 1e12
    run.figure("PSGS at which GPU and CPU sampling cost the same", value, "PSGS", note=note)


def features(run: Run, setting: Setting) -> QuiverFeatureStore:
    """Rows of sampled batches: 20 % of them in HBM by FAP, the rest pinned, against the usual path."""
    from tiered_memory.gather import gather_rows

    x = setting.x
    row_bytes = x.shape[1] * 4
    one = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    p0 = seed_probability(setting.nodes, 1024).to(DEVICE)
    hot = fap(setting.topology.to(DEVICE), FANOUTS, p0).cpu()
    plan = plan_placement(hot, row_bytes, one, device_budget=setting.nodes // 5 * row_bytes)
    store = QuiverFeatureStore(DEVICE, plan=plan)
    store.put_tensor(x, group_name=None, attr_name="x", index=None)
    batches = [setting.gpu.sample(setting.seeds(1024, i), key=i).node for i in range(4)]
    on_host = [node.cpu() for node in batches]
    placed = store._placed[None, "x"]
    pinned = torch.empty(max(n.numel() for n in batches), x.shape[1], pin_memory=DEVICE == "cuda")

    def usual() -> None:
        for node in on_host:
            rows = torch.index_select(x, 0, node, out=pinned[: node.numel()])
            rows.to(DEVICE, non_blocking=True)
            synchronize()

    for node, host in zip(batches, on_host, strict=True):
        assert torch.equal(store.get_tensor(group_name=None, attr_name="x", index=node).cpu(), x[host])
    store.reset_stats()
    arms = {
        "feature store": lambda: [store.get_tensor(group_name=None, attr_name="x", index=n) for n in batches],
        "bare gather": lambda: [gather_rows(placed.sources, placed.code, n) for n in batches],
        "CPU index_select + copy": usual,
    }
    medians = run.time("features", arms, repeats=9)
    total = sum(n.numel() for n in batches) * row_bytes
    for arm, seconds in medians.items():
        run.figure(f"{arm}: {row_bytes} B rows, 20 % in HBM", total / seconds / 1e9, "GB/s")
    for peer, target in (("CPU index_select + copy", ">= 3"), ("bare gather", ">= 0.9")):
        run.ratio(f"feature store / {peer}", "features", "feature store", peer, target=target)
    predicted = plan.hit_rate(0)["local"]
    rows = store.stats().rows
    counted = rows["local"] / max(sum(rows.values()), 1)
    run.figure("share of reads from HBM, counted", counted, "", note=f"predicted {predicted:.3f}")
    return store


def metrics(run: Run, setting: Setting) -> None:
    """PSGS and FAP of three hops on the GPU."""
    there = setting.topology.to(DEVICE)
    p0 = seed_probability(setting.nodes, 1024).to(DEVICE)
    arms = {"psgs": lambda: psgs(there, FANOUTS), "fap": lambda: fap(there, FANOUTS, p0)}
    for arm, seconds in run.time("metrics", arms, repeats=3).items():
        note = f"{setting.topology.num_edges / 1e6:.0f} M edges, {len(FANOUTS)} hops"
        run.figure(f"{arm} on the GPU", seconds, "s", note=note)


def training(run: Run, setting: Setting, store: QuiverFeatureStore) -> None:
    """GraphSAGE over some batches: GPU sampler and store against CPU sampler, index_select and copy."""
    from torch_geometric.nn import GraphSAGE

    model = GraphSAGE(setting.x.shape[1], 256, num_layers=3, out_channels=47).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())
    labels = torch.randint(0, 47, (setting.nodes,), device=DEVICE)
    batches = [setting.seeds(1024, 100 + i) for i in range(8)]

    def step(x: torch.Tensor, out: Any, seeds: torch.Tensor) -> None:
        optimizer.zero_grad()
        edge_index = torch.stack([out.row, out.col]).to(DEVICE)
        logits = model(x, edge_index)[:1024]
        torch.nn.functional.cross_entropy(logits, labels[seeds.to(DEVICE)]).backward()
        optimizer.step()

    def ours() -> None:
        for i, seeds in enumerate(batches):
            out = setting.gpu.sample(seeds, key=i)
            step(store.get_tensor(group_name=None, attr_name="x", index=out.node), out, seeds)

    def usual() -> None:
        for i, seeds in enumerate(batches):
            out = setting.cpu.sample(seeds, key=i)
            step(setting.x[out.node].to(DEVICE), out, seeds)

    def compute_only() -> None:
        for out, x, seeds in ready:
            step(x, out, seeds)

    ready = []
    for i, seeds in enumerate(batches):
        out = setting.gpu.sample(seeds, key=i)
        ready.append((out, store.get_tensor(group_name=None, attr_name="x", index=out.node), seeds))
    arms = {"pyg_quiver": ours, "CPU sampler, index_select, copy": usual, "compute alone": compute_only}
    for arm, seconds in run.time("training", arms, repeats=5).items():
        run.figure(
            f"training, {arm}", seconds / len(batches) * 1e3, "ms/batch", note="batch 1024, hidden 256"
        )
    peer = "CPU sampler, index_select, copy"
    what = "training / CPU sampler, index_select, copy"
    run.ratio(what, "training", "pyg_quiver", peer, target=">= 5", note=CPU_BACKEND)
    run.ratio("training / its computation alone", "training", "pyg_quiver", "compute alone")


def serving(run: Run, setting: Setting, store: QuiverFeatureStore) -> None:
    """Open loop: goodput at p99 <= 30 ms of the engine's policies and of a one-request-at-a-time server."""
    try:
        from moecap_eval.load import open_loop, poisson_arrivals
    except ImportError:
        print("serving: moecap_eval.load is not there; nothing measured", flush=True)
        return
    from torch_geometric.nn import GraphSAGE

    model = GraphSAGE(setting.x.shape[1], 128, num_layers=3, out_channels=47).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randn(20_000, generator=generator).mul(1.0).add(1.5).exp().clamp(1, 256).long()
    requests = [torch.randint(0, setting.nodes, (int(n),), generator=generator) for n in sizes]
    routes = {"cpu": setting.cpu, "gpu": setting.gpu}
    cost = calibrate(routes, batch_sizes=(1, 4, 16, 64, 256), repeats=10).cost
    plain = ThreadPoolExecutor(1)

    def one_at_a_time(node: torch.Tensor) -> Any:
        def answer() -> torch.Tensor:
            out = setting.cpu.sample(node, key=0)
            x = setting.x[out.node].to(DEVICE, non_blocking=True)
            with torch.inference_mode():
                edge_index = torch.stack([out.row, out.col]).to(DEVICE)
                return model(x, edge_index)[: node.numel()].cpu()

        return plain.submit(answer)

    policies: dict[str, Any] = {
        "CPU only": ThresholdRouter(float("inf")),
        "GPU only": ThresholdRouter(-1.0),
        "earliest finish": EarliestFinishRouter(cost),
    }
    goodput: dict[str, float] = {}
    curves: dict[str, list[Any]] = {}
    slo = 0.03
    for name in ("one at a time", *policies):
        curves[name], goodput[name] = [], 0.0
        for rate in (100, 200, 400, 800, 1600, 3200):
            count = int(rate * (0.5 if run.quick else 1.5))
            arrivals = poisson_arrivals(rate, count, seed=rate)
            if name == "one at a time":
                report = open_loop(one_at_a_time, requests[:count], arrivals)
            else:
                with InferenceEngine(model, store, routes, router=policies[name], max_queue=1024) as engine:
                    engine.submit(requests[-1]).result(60)
                    report = open_loop(engine.submit, requests[:count], arrivals)
            p99 = report.percentile(99)
            curves[name].append(
                [rate, report.percentile(50), p99, report.goodput(slo), report.percentile(99.9)]
            )
            if p99 <= slo and report.valid(slo):
                goodput[name] = max(goodput[name], report.goodput(slo))
            print(
                f"{name:16s} {rate:6d}/s p50 {curves[name][-1][1] * 1e3:8.2f} p99 {p99 * 1e3:8.2f} ms",
                flush=True,
            )
            if not p99 <= 10 * slo:
                break
    run.found["serving_curves"] = {
        "columns": ["rate", "p50_s", "p99_s", "goodput_30ms", "p99_9_s"],
        **{
            name: [[v if math.isfinite(v) else None for v in row] for row in rows]
            for name, rows in curves.items()
        },
    }
    for name, value in goodput.items():
        run.figure(f"goodput at p99 <= 30 ms, {name}", value, "requests/s", note=CPU_BACKEND)
    if goodput["one at a time"]:
        value = goodput["earliest finish"] / goodput["one at a time"]
        run.figure("goodput of the engine / one at a time", value, "x", target=">= 5", note=CPU_BACKEND)


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="a graph 20 times smaller, few repeats")
    parser.add_argument("--rehearse", action="store_true", help="tiny graph on the CPU, to test this script")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="sections to run")
    options = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("pyg_quiver_gpu: needs a CUDA device; nothing measured")
        return
    run = Run(options.quick or options.rehearse)
    setting = make_setting(20_000 if options.rehearse else 20 if options.quick else 1)
    run.found["graph"] = {"nodes": setting.nodes, "edges": setting.topology.num_edges, "fanouts": FANOUTS}
    run.found["cpu_backend"] = CPU_BACKEND
    simple = {"check": check, "sampling": sampling, "crossing": crossing, "metrics": metrics}
    store = None
    failed = []
    for name in SECTIONS:
        if name not in options.only:
            continue
        start = time.perf_counter()
        try:
            if name in simple:
                simple[name](run, setting)
            elif name == "features":
                store = features(run, setting)
            else:
                store = store or features(run, setting)
                {"training": training, "serving": serving}[name](run, setting, store)
        except Exception as error:  # a section that fails must not lose what the others measured
            failed.append(name)
            print(f"{name} FAILED: {error!r}", flush=True)
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
    run.found["failed_sections"] = failed
    if options.rehearse:
        sys.exit(1 if failed else 0)
    path = write_result(
        "pyg_quiver_gpu",
        question="Sampling, features, training and serving on one GPU: how fast, against the usual path?",
        headline=run.headline,
        samples=run.samples,
        folder=options.out,
        **run.found,
    )
    print(path)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

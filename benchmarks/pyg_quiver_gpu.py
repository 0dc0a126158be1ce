"""Sampling, features and training on GPUs, on a graph with the sizes of ogbn-products, and a larger one.

python benchmarks/pyg_quiver_gpu.py [--out DIR] [--quick] [--budget SECONDS] [--only SECTION ...]

Sections: check, sampling, columns, crossing, features, peers (two GPUs), cache, metrics, training, papers.
Needs a CUDA device (does nothing without one; --rehearse runs all but the kernels on the CPU with a tiny
graph and writes nothing). Arms of a comparison take turns in one run. CPU arms use numba where it is
installed, otherwise torch operations of the same bits, and the result says which. The result file is written
again after each section; sections that the budget leaves no time for are left out. About 120 s on an H100.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from pyg_quiver import (  # noqa: E402
    CSCTopology,
    DeviceTopology,
    QuiverFeatureStore,
    QuiverSampler,
    ThresholdRouter,
    calibrate,
    fap,
    plan_caches,
    plan_placement,
    psgs,
    seed_probability,
)

PRODUCTS = (2_449_029, 123_718_280, 100)  # nodes, directed edges, features
FANOUTS = [15, 10, 5]
PAPERS = (111_059_956, 1_615_685_872, 128)
PAPERS_SCALE = 4  # rows and edges of the papers section are a quarter: what pins in about a minute
SECTIONS = (
    "check", "sampling", "columns", "crossing", "features", "peers", "cache", "metrics", "training", "papers",
)  # fmt: skip
REHEARSAL = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSAL else "cuda"
KERNELS: Any = "torch" if REHEARSAL else "triton"  # the interpreter is too slow for these batches
BATCH = 16 if REHEARSAL else 1024
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

    @cached_property
    def store(self) -> QuiverFeatureStore:
        """Features in tiers."""
        return placed_store(self)

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
    """Bits of all samplers are equal on this graph (test_gpu.py takes small ones with every option)."""
    groups = torch.arange(64)
    alone = setting.cpu.sample_groups(setting.seeds(64, 9), groups, range(64))
    together = setting.gpu.sample_groups(setting.seeds(64, 9), groups, range(64))
    assert torch.equal(alone.node, together.node.cpu())
    assert torch.equal(alone.edge, together.edge.cpu())
    for key, batch in ((0, 1), (1, 64), (2, BATCH)):
        node = setting.seeds(batch, key)
        outs = [s.sample(node, key=key) for s in (setting.cpu, setting.gpu, setting.uva, setting.torch_gpu)]
        for out in outs[1:]:
            for name in ("node", "row", "col", "edge"):
                assert torch.equal(getattr(outs[0], name), getattr(out, name).cpu()), name
    run.found["equal_samples"] = 4
    print("check: 4 samples equal on CPU, GPU, UVA and torch operations", flush=True)


def sampling(run: Run, setting: Setting) -> None:
    """Edges per second by batch size; batches of one arm follow each other without waiting in between."""
    pool = ThreadPoolExecutor(16)

    def one_by_one(sampler: QuiverSampler, nodes: list[torch.Tensor]) -> Callable[[], Any]:
        return lambda: [sampler.sample(node, key=i) for i, node in enumerate(nodes)]

    def at_once(sampler: QuiverSampler, nodes: list[torch.Tensor]) -> Callable[[], Any]:
        return lambda: list(pool.map(lambda i: sampler.sample(nodes[i], key=i), range(len(nodes))))

    for batch in (1, 8) if REHEARSAL else (1, 8, 64, 1024, 4096):
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


def columns(run: Run, setting: Setting) -> None:
    """What bounds UVA sampling: the same columns of pinned memory read by nothing but a gather."""
    from tiered_memory.gather import gather_rows

    node = [setting.seeds(BATCH, i) for i in range(4)]
    edge = [setting.gpu.sample(seeds, key=i).edge for i, seeds in enumerate(node)]
    pinned = setting.topology.row.view(-1, 1)
    pinned = pinned if REHEARSAL else pinned.pin_memory()
    arms = {
        "UVA": lambda: [setting.uva.sample(seeds, key=i) for i, seeds in enumerate(node)],
        "GPU": lambda: [setting.gpu.sample(seeds, key=i) for i, seeds in enumerate(node)],
        "bare reads": lambda: [gather_rows(pinned, at) for at in edge],
    }
    total = sum(at.numel() for at in edge)
    for arm, seconds in run.time("columns", arms, repeats=9).items():
        run.figure(f"{arm}: sampled columns of batches of {BATCH}", total / seconds / 1e6, "M edges/s")
    out, item = setting.gpu.sample(node[0], key=0), pinned.element_size()
    touched = {
        "lists": out.col,
        "sectors of 32 B": out.edge * item // 32,
        "pages of 4 KiB": out.edge * item // 4096,
    }
    run.found["a_batch_touches"] = {"edges": out.edge.numel()} | {
        what: at.unique().numel() for what, at in touched.items()
    }
    run.ratio("UVA sampling / bare reads of the same columns", "columns", "UVA", "bare reads")
    run.ratio("bare reads of columns in pinned memory / GPU sampling", "columns", "bare reads", "GPU")


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


def placed_store(setting: Setting) -> QuiverFeatureStore:
    """20 % of the rows in HBM by FAP, the rest pinned."""
    row_bytes = setting.x.shape[1] * 4
    one = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    p0 = seed_probability(setting.nodes, 1024).to(DEVICE)
    hot = fap(setting.topology.to(DEVICE), FANOUTS, p0).cpu()
    plan = plan_placement(hot, row_bytes, one, device_budget=setting.nodes // 5 * row_bytes)
    store = QuiverFeatureStore(DEVICE, plan=plan)
    store.put_tensor(setting.x, group_name=None, attr_name="x", index=None)
    return store


def features(run: Run, setting: Setting) -> None:
    """Rows of sampled batches, from two tiers by one gather, against the usual path."""
    from tiered_memory.gather import gather_rows

    x, store = setting.x, setting.store
    row_bytes = x.shape[1] * 4
    batches = [setting.gpu.sample(setting.seeds(BATCH, i), key=i).node for i in range(4)]
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
    assert store.plan is not None
    predicted = store.plan.hit_rate(0)["local"]
    rows = store.stats().rows
    counted = rows["local"] / max(sum(rows.values()), 1)
    run.figure("share of reads from HBM, counted", counted, "", note=f"predicted {predicted:.3f}")


def cache(run: Run, setting: Setting) -> None:
    """The same bytes of GPU memory for features alone, and split between columns and features."""
    row_bytes, p0 = setting.x.shape[1] * 4, seed_probability(setting.nodes, BATCH)
    budget = (setting.x.nbytes + setting.topology.row.nbytes) // 10
    bandwidth = {"local": 1.4e12, "host": 5e10}
    plan = plan_caches(setting.topology, FANOUTS, p0, row_bytes=row_bytes, budget=budget, bandwidth=bandwidth)
    run.found["cache"] = {
        "budget": budget, "topology_bytes": plan.topology_bytes, "modelled_s": plan.seconds,
        "modelled_features_only_s": plan.seconds_features_only,
    }  # fmt: skip
    one = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    hot = fap(setting.topology, FANOUTS, p0, mode="count")
    stores = {}
    for name, size in (("features alone", budget), ("both", plan.feature_bytes)):
        stores[name] = QuiverFeatureStore(
            DEVICE, plan=plan_placement(hot, row_bytes, one, device_budget=size)
        )
        stores[name].put_tensor(setting.x, group_name=None, attr_name="x", index=None)
    columns = None if REHEARSAL else plan.hot_columns
    both = QuiverSampler(
        setting.topology, FANOUTS, mode="cpu" if REHEARSAL else "uva", backend=KERNELS, hot_columns=columns
    )
    seeds = [setting.seeds(BATCH, 40 + i) for i in range(4)]

    def batches(sampler: QuiverSampler, store: QuiverFeatureStore) -> None:
        for i, node in enumerate(seeds):
            store.get_tensor(group_name=None, attr_name="x", index=sampler.sample(node, key=i).node)

    arms = {
        "both": lambda: batches(both, stores["both"]),
        "features alone": lambda: batches(setting.uva, stores["features alone"]),
        "both, sampling": lambda: [both.sample(node, key=i) for i, node in enumerate(seeds)],
        "features alone, sampling": lambda: [setting.uva.sample(node, key=i) for i, node in enumerate(seeds)],
    }
    run.time("cache", arms, repeats=7)
    what = "UVA sampling and rows: columns and rows cached / rows alone, equal bytes"
    note = f"modelled {plan.seconds_features_only / plan.seconds:.2f} x"
    run.ratio(what, "cache", "both", "features alone", target="> 1", note=note)
    what = "UVA sampling: hot columns cached / none"
    run.ratio(what, "cache", "both, sampling", "features alone, sampling", target="> 1")


def metrics(run: Run, setting: Setting) -> None:
    """PSGS and FAP of three hops on the GPU."""
    there = setting.topology.to(DEVICE)
    p0 = seed_probability(setting.nodes, 1024).to(DEVICE)
    arms = {"psgs": lambda: psgs(there, FANOUTS), "fap": lambda: fap(there, FANOUTS, p0)}
    for arm, seconds in run.time("metrics", arms, repeats=3).items():
        note = f"{setting.topology.num_edges / 1e6:.0f} M edges, {len(FANOUTS)} hops"
        run.figure(f"{arm} on the GPU", seconds, "s", note=note)


def training(run: Run, setting: Setting) -> None:
    """GraphSAGE over some batches: GPU sampler and store against CPU sampler, index_select and copy."""
    from torch_geometric.nn import GraphSAGE

    model = GraphSAGE(setting.x.shape[1], 256, num_layers=3, out_channels=47).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())
    labels = torch.randint(0, 47, (setting.nodes,), device=DEVICE)
    batches = [setting.seeds(BATCH, 100 + i) for i in range(8)]
    store = setting.store

    def step(x: torch.Tensor, out: Any, seeds: torch.Tensor) -> None:
        optimizer.zero_grad()
        # Without the rows that later layers do not need, in every arm.
        logits = model(
            x, torch.stack([out.row, out.col]).to(DEVICE),
            num_sampled_nodes_per_hop=out.num_sampled_nodes, num_sampled_edges_per_hop=out.num_sampled_edges,
        )[:BATCH]  # fmt: skip
        torch.nn.functional.cross_entropy(logits, labels[seeds.to(DEVICE)]).backward()
        optimizer.step()

    def rows(out: Any) -> torch.Tensor:
        return store.get_tensor(group_name=None, attr_name="x", index=out.node)

    def ours() -> None:
        for i, seeds in enumerate(batches):
            out = setting.gpu.sample(seeds, key=i)
            step(rows(out), out, seeds)

    def usual() -> None:
        for i, seeds in enumerate(batches):
            out = setting.cpu.sample(seeds, key=i)
            step(setting.x[out.node].to(DEVICE), out, seeds)

    ready = []
    for i, seeds in enumerate(batches):
        out = setting.gpu.sample(seeds, key=i)
        ready.append((rows(out), out, seeds))
    outs = [out for _, out, _ in ready]
    peer = "CPU sampler, index_select, copy"
    arms = {
        "pyg_quiver": ours,
        peer: usual,
        "compute alone": lambda: [step(*item) for item in ready],
        "sampling alone": lambda: [setting.gpu.sample(seeds, key=i) for i, seeds in enumerate(batches)],
        "rows alone": lambda: [rows(out) for out in outs],
    }
    for arm, seconds in run.time("training", arms, repeats=5).items():
        note = "batch 1024, hidden 256"
        run.figure(f"training, {arm}", seconds / len(batches) * 1e3, "ms/batch", note=note)
    what = "training / CPU sampler, index_select, copy"
    run.ratio(what, "training", "pyg_quiver", peer, target=">= 5", note=CPU_BACKEND)
    run.ratio("training / its computation alone", "training", "pyg_quiver", "compute alone")


def peers(run: Run, setting: Setting) -> None:
    """Rows of two GPUs' memories, half each, read by the first: one gather, against a peer copy."""
    if DEVICE == "cpu" or torch.cuda.device_count() < 2:
        print("peers: needs two GPUs; nothing measured", flush=True)
        return
    devices = DeviceTopology.detect()
    run.found["cliques"] = devices.cliques()
    if len(devices.cliques()[0]) < 2:
        print("peers: the GPUs have no link; nothing measured", flush=True)
        return
    from tiered_memory.gather import gather_rows

    rows, calls = 1 << 28, 4  # bytes of a tier; calls in a row, so that launching overlaps with running
    for width in (32, 128, 512):
        x = torch.randn(2 * rows // (width * 4), width)
        plan = plan_placement(torch.rand(x.shape[0]), width * 4, devices, device_budget=rows)
        store = QuiverFeatureStore("cuda:0", plan=plan)
        store.put_tensor(x, group_name=None, attr_name="x", index=None)
        count = rows // (width * 4)
        far = plan.rows(1)[torch.randint(0, plan.rows(1).numel(), (count,))]
        both = torch.randint(0, x.shape[0], (2 * count,))
        assert torch.equal(store.get_tensor(group_name=None, attr_name="x", index=both).cpu(), x[both])
        far, both = far.to("cuda:0"), both.to("cuda:0")
        few = far[:200_000]
        placed = store._placed[None, "x"]
        source = torch.empty(count, width, device="cuda:1")
        out = torch.empty(count, width, device="cuda:0")

        def read(index: torch.Tensor, times: int, store: QuiverFeatureStore = store) -> None:
            for _ in range(times):
                store.get_tensor(group_name=None, attr_name="x", index=index)

        arms = {
            "rows of the peer": lambda i=far, read=read: read(i, calls),
            "bare gather": lambda p=placed, i=far: [gather_rows(p.sources, p.code, i) for _ in range(calls)],
            "peer copy": lambda out=out, source=source: [out.copy_(source) for _ in range(calls)],
            "rows of both": lambda i=both, read=read: read(i, calls),
            "200,000 rows of the peer, one call": lambda i=few, read=read: read(i, 1),
        }
        label, size = f"peers {width * 4} B", width * 4
        seconds = run.time(label, arms, repeats=9)
        moved = dict.fromkeys(arms, calls * rows)
        moved |= {"rows of both": 2 * calls * rows, "200,000 rows of the peer, one call": few.numel() * size}
        for arm in arms:
            run.figure(f"{arm}, {size} B rows", moved[arm] / seconds[arm] / 1e9, "GB/s")
        target = ">= 0.9" if width >= 128 else ">= 0.7"
        for arm, name in (("rows of the peer", "feature store"), ("bare gather", "bare gather")):
            run.ratio(
                f"{name} from a peer / peer copy, {size} B rows", label, arm, "peer copy", target=target
            )


def papers(run: Run, setting: Setting) -> None:
    """A graph with the statistics of ogbn-papers100M, edges pinned, features in two tiers."""
    scale = 40_000 if REHEARSAL else PAPERS_SCALE * (20 if run.quick else 1)
    nodes, edges, width = PAPERS[0] // scale, PAPERS[1] // scale, PAPERS[2]
    began = time.perf_counter()
    there = skewed_graph(nodes, edges)
    narrow = CSCTopology(there.colptr, there.row.int())
    hot = fap(there, FANOUTS, seed_probability(nodes, 1024).to(DEVICE), mode="count", dtype=torch.float32)
    del there
    uva = QuiverSampler(narrow.to("cpu"), FANOUTS, mode="cpu" if REHEARSAL else "uva", backend=KERNELS)
    gpu = QuiverSampler(narrow, FANOUTS, mode="cpu" if REHEARSAL else "gpu", backend=KERNELS)
    half = torch.float16
    rows = torch.empty(nodes, width, dtype=half)
    block = torch.randn(1 << 16, width).to(half)
    for start in range(0, nodes, block.shape[0]):
        rows[start : start + block.shape[0]] = block[: nodes - start]
    one = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    plan = plan_placement(hot.cpu(), width * 2, one, device_budget=nodes // 10 * width * 2)
    store = QuiverFeatureStore(DEVICE, plan=plan)
    store.put_tensor(rows, group_name=None, attr_name="x", index=None)
    run.found["papers"] = {
        "nodes": nodes, "edges": edges, "feature_bytes": rows.nbytes, "scale": f"1/{scale}",
        "set_up_s": time.perf_counter() - began,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randint(0, nodes, (BATCH,), generator=generator) for _ in range(4)]
    outs = [gpu.sample(node, key=i) for i, node in enumerate(seeds)]
    total = sum(out.edge.numel() for out in outs)
    bytes_read = sum(out.node.numel() for out in outs) * width * 2
    for i, out in enumerate(outs):
        assert torch.equal(out.edge.cpu(), uva.sample(seeds[i], key=i).edge.cpu())
    arms = {
        "GPU": lambda: [gpu.sample(node, key=i) for i, node in enumerate(seeds)],
        "UVA": lambda: [uva.sample(node, key=i) for i, node in enumerate(seeds)],
        "features": lambda: [
            store.get_tensor(group_name=None, attr_name="x", index=out.node) for out in outs
        ],
    }
    seconds = run.time("papers", arms, repeats=5)
    note = f"1/{scale} of papers100M: {nodes / 1e6:.1f} M nodes, {edges / 1e6:.0f} M edges"
    for arm in ("GPU", "UVA"):
        run.figure(
            f"{arm} sampling, papers100M statistics", total / seconds[arm] / 1e6, "M edges/s", note=note
        )
    what = "feature store, papers100M statistics, 10 % in HBM"
    run.figure(what, bytes_read / seconds["features"] / 1e9, "GB/s", note="256 B rows")


def report(run: Run, folder: Path) -> Path:
    """Write what has been found so far."""
    return write_result(
        "pyg_quiver_gpu",
        question="Sampling, features and training on GPUs: how fast, against the usual path?",
        headline=run.headline,
        samples=run.samples,
        folder=folder,
        **run.found,
    )


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="a graph 20 times smaller, few repeats")
    parser.add_argument("--rehearse", action="store_true", help="tiny graph on the CPU, to test this script")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="sections to run")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all sections")
    options = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("pyg_quiver_gpu: needs a CUDA device; nothing measured")
        return
    began = time.perf_counter()
    run = Run(options.quick or options.rehearse)
    setting = make_setting(20_000 if options.rehearse else 20 if options.quick else 1)
    run.found["graph"] = {"nodes": setting.nodes, "edges": setting.topology.num_edges, "fanouts": FANOUTS}
    run.found["cpu_backend"] = CPU_BACKEND
    print(f"-- graph: {time.perf_counter() - began:.1f} s", flush=True)
    simple: dict[str, Callable[[Run, Setting], Any]] = {
        "check": check, "sampling": sampling, "columns": columns, "crossing": crossing, "metrics": metrics,
        "peers": peers, "cache": cache, "features": features, "training": training, "papers": papers,
    }  # fmt: skip
    failed: list[str] = []
    left_out: list[str] = []
    run.found |= {"failed_sections": failed, "left_out": left_out}
    for name in SECTIONS:
        if name not in options.only:
            continue
        start = time.perf_counter()
        if start - began > options.budget:
            left_out.append(name)
            continue
        try:
            simple[name](run, setting)
        except Exception as error:  # a section that fails must not lose what the others measured
            failed.append(name)
            print(f"{name} FAILED: {error!r}", flush=True)
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
        if not options.rehearse:
            report(run, options.out)
    print(f"failed: {failed}; left out: {left_out}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Serving under open-loop load: how much is answered in time, and how late is the rest?

python benchmarks/pyg_quiver_serving.py [--out DIR] [--budget SECONDS] [--quick]
python benchmarks/pyg_quiver_serving.py --plot   draw docs/images/pyg_quiver_serving.png from the result

Poisson arrivals, requests of 1 to 256 nodes (lognormal), latency from the *scheduled* arrival. Offered load
grows until a server breaks down. On a GPU: a graph with the sizes of ogbn-products and all routes; on a CPU
a smaller one. The PyG-style server samples on the CPU, selects rows, copies them and runs the model, one
request at a time; its sampler is ours, which is faster than pyg-lib's (pyg_quiver_sampling.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch_geometric.nn import GraphSAGE

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from moecap_eval.load import LoadReport, open_loop, poisson_arrivals  # noqa: E402
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
    seed_probability,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SLO_S = 0.030
BATCH_PSGS = {"cpu": 5_000.0, "gpu": 300_000.0}  # on a CPU larger batches only wait longer
# nodes, edges, features, fan-outs, fan-outs under overload, hidden width
SIZES = (2_449_029, 123_718_280, 100, [15, 10, 5], [8, 4, 2], 128) if GPU else (
    100_000, 2_500_000, 100, [10, 5], [5, 2], 64,
)  # fmt: skip
FIRST_RATE, FACTOR, REFINEMENTS = 100, 2.0, 2
COLUMNS = ("rate", "p50_s", "p99_s", "p99_9_s", "goodput", "lateness_p99_s", "rejected", "requests", "valid")
IMAGE = ROOT / "docs" / "images" / "pyg_quiver_serving.png"

Submit = Callable[[torch.Tensor], Future[Any]]


@dataclass
class Setting:
    """Graph, features and model in the forms that the servers use."""

    topology: CSCTopology
    there: CSCTopology  # on the device
    x: torch.Tensor
    store: QuiverFeatureStore
    model: GraphSAGE
    samplers: dict[str, QuiverSampler]
    degraded: dict[str, QuiverSampler]
    requests: list[torch.Tensor]


def skewed_graph(nodes: int, edges: int) -> CSCTopology:
    """Power-law degrees; a node that draws much is drawn much, as in an undirected graph."""
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


def make_requests(topology: CSCTopology, count: int, exponent: float, correlated: bool) -> list[torch.Tensor]:
    """Node lists of lognormal length; popularity by Zipf over a random order, or by falling degree."""
    generator = torch.Generator().manual_seed(5)
    nodes = topology.num_nodes
    sizes = (torch.randn(count, generator=generator) + 1.5).exp().clamp(1, 256).long()
    order = torch.randperm(nodes, generator=generator)
    if correlated:
        order = topology.in_degree().cpu().argsort(descending=True)
    uniform = torch.rand(int(sizes.sum()), generator=generator).double()
    if exponent == 0:
        rank = (uniform * nodes).long()
    else:
        # Inverse of the continuous Zipf distribution on [1, nodes].
        power = 1 - exponent
        rank = ((1 + uniform * (nodes**power - 1)) ** (1 / power)).long() - 1
    return list(order[rank.clamp(0, nodes - 1)].split(sizes.tolist()))


def make_setting(scale: int) -> Setting:
    nodes, edges, width, fanouts, fewer, hidden = SIZES
    there = skewed_graph(nodes // scale, edges // scale)
    topology = there.to("cpu")
    hotness = fap(there, fanouts, seed_probability(there.num_nodes, 64).to(DEVICE), mode="count").cpu()
    one = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    budget = there.num_nodes // 5 * width * 4
    store = QuiverFeatureStore(DEVICE, plan=plan_placement(hotness, width * 4, one, device_budget=budget))
    x = torch.randn(there.num_nodes, width)
    store.put_tensor(x, group_name=None, attr_name="x", index=None)
    torch.manual_seed(0)
    model = GraphSAGE(width, hidden, num_layers=len(fanouts), out_channels=47).to(DEVICE).eval()

    def routes(counts: list[int]) -> dict[str, QuiverSampler]:
        found = {"cpu": QuiverSampler(topology, counts)}
        return found | ({"gpu": QuiverSampler(there, counts, mode="gpu")} if GPU else {})

    requests = make_requests(topology, 60_000, 0.0, correlated=False)
    return Setting(topology, there, x, store, model, routes(fanouts), routes(fewer), requests)


def run_model(setting: Setting, sampled: Any, x: torch.Tensor, count: int) -> torch.Tensor:
    """The model over one sample, without the rows that later layers do not need."""
    edge_index = torch.stack([sampled.row, sampled.col]).to(DEVICE)
    with torch.inference_mode():
        out = setting.model(
            x, edge_index,
            num_sampled_nodes_per_hop=sampled.num_sampled_nodes,
            num_sampled_edges_per_hop=sampled.num_sampled_edges,
        )  # fmt: skip
        return out[:count].cpu()


@contextmanager
def one_at_a_time(setting: Setting, sampler: QuiverSampler) -> Any:
    """A server that samples, selects rows on the CPU, copies them and answers, request by request."""
    pinned = torch.empty(1 << 20, setting.x.shape[1], pin_memory=GPU)

    def answer(node: torch.Tensor) -> torch.Tensor:
        sampled = sampler.sample(node, key=0)
        rows = torch.index_select(setting.x, 0, sampled.node.cpu(), out=pinned[: sampled.node.numel()])
        return run_model(setting, sampled, rows.to(DEVICE, non_blocking=True), node.numel())

    with ThreadPoolExecutor(1) as pool:
        for node in setting.requests[-20:]:
            pool.submit(answer, node).result(120)
        yield lambda node: pool.submit(answer, node)


def servers(setting: Setting) -> dict[str, Callable[[], AbstractContextManager[Submit]]]:
    """What is compared: a name and how to start it."""
    cores = len(os.sched_getaffinity(0))
    workers = {"cpu": max(min(8, cores // 2), 1)}

    @contextmanager
    def engine(
        router: Any = None, routes: tuple[str, ...] = ("cpu", "gpu"), *, degrading: bool = False
    ) -> Any:
        samplers = {route: setting.samplers[route] for route in routes if route in setting.samplers}
        fewer = {route: setting.degraded[route] for route in samplers}
        with InferenceEngine(
            setting.model, setting.store, samplers, router=router, max_queue=2048,
            max_batch_psgs=max(BATCH_PSGS[route] for route in samplers),
            workers={route: n for route, n in workers.items() if route in samplers},
            degraded=fewer if degrading else None,
        ) as running:  # fmt: skip
            for burst in (1, 1, 3, 12, 50, 50, 5, 20):  # compiles, records launches, learns costs
                for future in [running.submit(node) for node in setting.requests[-burst:]]:
                    future.result(120)
            yield running.submit

    found: dict[str, Callable[[], Any]] = {
        "PyG-style": lambda: one_at_a_time(setting, setting.samplers["cpu"])
    }
    if not GPU:
        found["pyg_quiver"] = engine
        found["pyg_quiver, degrading"] = lambda: engine(degrading=True)
        return found
    on_gpu = QuiverSampler(setting.there, SIZES[3], mode="gpu", backend="torch")
    cost = calibrate(setting.samplers, batch_sizes=(1, 4, 16, 64, 256), repeats=5)
    found["earliest finish"] = lambda: engine(EarliestFinishRouter(cost.cost))
    found["GPU only"] = lambda: engine(routes=("gpu",))
    found["CPU only"] = lambda: engine(routes=("cpu",))
    found["torch-only GPU sampling"] = lambda: one_at_a_time(setting, on_gpu)
    found["earliest finish, degrading"] = lambda: engine(EarliestFinishRouter(cost.cost), degrading=True)
    found["threshold"] = lambda: engine(ThresholdRouter.from_profile(cost))
    return found


def measure(submit: Submit, requests: list[torch.Tensor], rate: float, seconds: float) -> dict[str, Any]:
    """One offered load. A run whose generator was late is void and repeated once."""
    count = min(max(int(rate * seconds), 60), len(requests))
    for _ in range(2):
        gc.collect()  # what earlier loads left; during a load there is little to collect
        arrivals = poisson_arrivals(rate, count, seed=int(rate))
        report: LoadReport = open_loop(submit, requests[:count], arrivals)
        if report.valid(SLO_S) or report.percentile(99) > 3 * SLO_S:
            break
    lateness = float(torch.quantile(torch.from_numpy(report.lateness_s), 0.99))
    values = (
        rate, report.percentile(50), report.percentile(99), report.percentile(99.9), report.goodput(SLO_S),
        lateness, report.rejected, count, report.valid(SLO_S),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def next_rate(points: list[dict[str, Any]]) -> float | None:
    """Double the load until a server breaks down (halve it if it never kept up), then look between."""
    kept = [p["rate"] for p in points if p["p99_s"] <= SLO_S]
    broken = [p["rate"] for p in points if not p["p99_s"] <= SLO_S]  # NaN where nothing was answered
    hopeless = any(p["goodput"] < 0.5 * p["rate"] for p in points)
    if not points:
        return float(FIRST_RATE)
    if not kept:
        lowest = min(broken) / FACTOR
        return lowest if lowest > 10 else None
    if not hopeless and max(kept + broken) * FACTOR < 30_000:
        return max(kept + broken) * FACTOR
    above = [rate for rate in broken if rate > max(kept)]
    refined = sum(p["refinement"] for p in points)
    return math.sqrt(max(kept) * min(above)) if above and refined < REFINEMENTS else None


def curve(
    start: Callable[[], AbstractContextManager[Submit]],
    setting: Setting,
    seconds: float,
    label: str,
    deadline: float,
) -> list[dict[str, Any]]:
    """Offered loads from light to hopeless, while there is time."""
    points: list[dict[str, Any]] = []
    with start() as submit:
        while (rate := next_rate(points)) and time.perf_counter() < deadline:
            point = measure(submit, setting.requests, rate, seconds)
            between = [p["rate"] for p in points]
            point["refinement"] = bool(between) and min(between) < rate < max(between)
            points.append(point)
            p50, p99, late = (1e3 * point[key] for key in ("p50_s", "p99_s", "lateness_p99_s"))
            print(
                f"{label:28s} {rate:8.0f}/s  p50 {p50:8.2f}  p99 {p99:8.2f} ms  "
                f"goodput {point['goodput']:8.0f}/s  generator late {late:6.2f} ms",
                flush=True,
            )
    return sorted(points, key=lambda point: point["rate"])


def skew(
    setting: Setting, start: Callable[[], AbstractContextManager[Submit]], rate: float
) -> list[dict[str, Any]]:
    """Popularity by Zipf, alone and with the degree: latency and share of rows from the fast tier."""
    found = []
    for exponent, correlated in ((0.0, False), (0.8, False), (0.8, True), (1.1, False), (1.1, True)):
        requests = make_requests(setting.topology, 4000, exponent, correlated)
        with start() as submit:
            setting.store.reset_stats()
            point = measure(submit, requests, rate, 1.0)
        rows = setting.store.stats().rows
        point |= {
            "exponent": exponent, "correlated": correlated,
            "local_share": rows["local"] / max(sum(rows.values()), 1),
        }  # fmt: skip
        found.append(point)
        print(f"skew {exponent} correlated={correlated}: p99 {point['p99_s'] * 1e3:.1f} ms, "
              f"{point['local_share']:.2f} of the rows from the fast tier", flush=True)  # fmt: skip
    return found


def best_goodput(points: list[dict[str, Any]]) -> float:
    """Most requests per second with p99 within the objective, by a generator that kept up."""
    return max((p["goodput"] for p in points if p["p99_s"] <= SLO_S and p["valid"]), default=0.0)


def headline(curves: dict[str, list[dict[str, Any]]]) -> list[Headline]:
    """Goodput of every server, ratios, and the routers against the better single route."""
    note = "sampler of the PyG-style server: ours, faster than pyg-lib's"
    rows = [
        Headline(f"goodput at p99 <= 30 ms, {name}", best_goodput(points), "requests/s")
        for name, points in curves.items()
    ]
    ours = "earliest finish" if GPU else "pyg_quiver"
    peers = {"PyG-style": (">= 5", note), "torch-only GPU sampling": ("", "rows selected on the CPU")}
    for arm in (ours, "GPU only"):
        for peer, (target, remark) in peers.items():
            if {arm, peer} <= set(curves) and best_goodput(curves[peer]):
                value = best_goodput(curves[arm]) / best_goodput(curves[peer])
                what = f"goodput of the engine ({arm}) / {peer} server"
                rows.append(Headline(what, value, "x", target=target, note=remark))
    if {"CPU only", "GPU only", "earliest finish"} <= set(curves):
        worst = 0.0
        for point in curves["earliest finish"]:
            singles = [
                other["p99_s"] for name in ("CPU only", "GPU only") for other in curves[name]
                if other["rate"] == point["rate"] and other["p99_s"] <= SLO_S and other["valid"]
            ]  # fmt: skip
            if singles and point["valid"]:
                worst = max(worst, point["p99_s"] / min(singles))
        rows.append(
            Headline(
                "p99 of earliest finish / the better single route, worst rate", worst, "x", target="<= 1.05"
            )
        )
        alone = max(best_goodput(curves[name]) for name in ("CPU only", "GPU only"))
        value = best_goodput(curves["earliest finish"]) / alone if alone else None
        rows.append(
            Headline("goodput of earliest finish / the better single route", value, "x", target=">= 0.95")
        )
    plain, degrading = curves.get(ours), curves.get(f"{ours}, degrading")
    if plain and degrading:
        capacity = best_goodput(plain)
        over = [
            (p, d) for p in plain for d in degrading if p["rate"] == d["rate"] and p["rate"] >= 2 * capacity
        ]
        if over and capacity:
            refusing, fewer = over[0]
            value = fewer["goodput"] / refusing["goodput"] if refusing["goodput"] else None
            what = (
                f"goodput with fewer neighbours / refusing, at {refusing['rate'] / capacity:.1f} x capacity"
            )
            rows.append(Headline(what, value, "x", target=">= 1.3"))
    return rows


def plot(folder: Path) -> Path:
    """Latency and goodput against offered load."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((folder / "pyg_quiver_serving.json").read_text())
    figure, (latency, good, late) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for name, points in result["curves"].items():
        rate = [p["rate"] for p in points]
        line = latency.plot(rate, [1e3 * (p["p99_s"] or math.nan) for p in points], marker="o", label=name)[0]
        latency.plot(rate, [1e3 * (p["p50_s"] or math.nan) for p in points], color=line.get_color(), ls=":")
        latency.plot(
            rate, [1e3 * (p["p99_9_s"] or math.nan) for p in points], color=line.get_color(), ls="--", lw=0.8
        )
        good.plot(rate, [p["goodput"] for p in points], marker="o", color=line.get_color())
        late.plot(rate, [1e3 * p["lateness_p99_s"] for p in points], marker="o", color=line.get_color())
    good.plot(good.get_xlim(), good.get_xlim(), color="grey", lw=0.8, ls=":")
    latency.axhline(1e3 * SLO_S, color="grey", lw=0.8)
    late.axhline(50 * SLO_S, color="grey", lw=0.8)
    latency.set(yscale="log", ylabel="latency, ms", title="p50 (dotted), p99, p99.9 (dashed)")
    good.set(ylabel="answered within 30 ms, requests/s", title="goodput (dotted: all)", yscale="log")
    late.set(ylabel="p99 lateness, ms", title="the load generator itself (line: void above)", yscale="log")
    for axes in (latency, good, late):
        axes.set(xscale="log", xlabel="offered load, requests/s")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        ", ".join([*(result["hardware"]["gpus"][:1] or [result["hardware"]["cpu"]]), result["graph"]])
    )
    path = IMAGE if folder == RESULTS else folder / IMAGE.name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Measure every server, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no load is started"
    )
    parser.add_argument("--quick", action="store_true", help="a graph 20 times smaller, short runs")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each offered load")
    parser.add_argument("--plot", action="store_true", help="only draw what was measured before")
    options = parser.parse_args()
    if options.plot:
        print(plot(options.out))
        return
    began = time.perf_counter()
    sys.setswitchinterval(2e-4)  # the load generator shares the interpreter with the servers
    if not GPU:
        torch.set_num_threads(1)  # the servers' threads are the parallelism
    setting = make_setting(20 if options.quick else 1)
    seconds = 0.4 if options.quick else options.seconds
    graph = f"{setting.topology.num_nodes:,} nodes, {setting.topology.num_edges:,} edges, fan-outs {SIZES[3]}"
    curves: dict[str, list[dict[str, Any]]] = {}
    more: dict[str, Any] = {"graph": graph, "slo_s": SLO_S, "left_out": []}
    every = servers(setting)
    # A full collection walks over every object of the imported frameworks and of 60,000 requests: 50 to 70 ms
    # in which no thread runs. Servers, ours and the peers, start with these out of the collector's sight.
    gc.collect()
    gc.freeze()
    deadline = began + options.budget
    print(f"-- set up: {time.perf_counter() - began:.1f} s", flush=True)
    for name, start in every.items():
        if time.perf_counter() > deadline:
            more["left_out"].append(name)
            continue
        curves[name] = curve(start, setting, seconds, name, deadline)
        path = write(curves, more, options.out)
    if time.perf_counter() < deadline:
        start = every["earliest finish" if GPU else "pyg_quiver"]
        more["skew"] = skew(setting, start, 0.5 * max(best_goodput(list(curves.values())[-1]), FIRST_RATE))
        path = write(curves, more, options.out)
    for row in headline(curves):
        print(f"{row.what:72s} {row.value} {row.unit} {row.target}")
    print(f"left out: {', '.join(more['left_out']) or 'nothing'}; {path}; {plot(options.out)}")


def write(curves: dict[str, list[dict[str, Any]]], more: dict[str, Any], folder: Path) -> Path:
    """The result so far."""
    clean = {
        name: [{key: finite(value) for key, value in point.items()} for point in points]
        for name, points in curves.items()
    }
    return write_result(
        "pyg_quiver_serving",
        question="How much of an open load is answered within 30 ms, and by which server?",
        headline=headline(curves),
        samples={
            f"{name}: p99": [p["p99_s"] for p in points if p["p99_s"]] for name, points in clean.items()
        },
        folder=folder,
        curves=clean,
        **more,
    )


if __name__ == "__main__":
    main()

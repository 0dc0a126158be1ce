"""Does FAP find the rows that will be read? Hit rates of placements, and the time PSGS and FAP take.

python benchmarks/pyg_quiver_hotness.py [--out DIR]

100 k nodes, 2 M edges, fan-outs [10, 5], batches of 256, 20 % of the rows held. Half of 400 batches give the
oracle's counts, the others are the test. Directed: how much a node draws and how often it is drawn are
unrelated; undirected: every edge in both directions. Seeds uniform, or 2 % of the nodes make half of the
requests. About 60 s.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from pyg_quiver import CSCTopology, QuiverSampler, fap, psgs, seed_probability  # noqa: E402

NODES, EDGES, FANOUTS, BATCH, BATCHES, SHARE = 100_000, 2_000_000, [10, 5], 256, 400, 0.2


def power_law(count: int, generator: torch.Generator) -> torch.Tensor:
    """Node ids with P(id < r) ~ r^0.4, shuffled."""
    ids = (torch.rand(count, generator=generator, dtype=torch.float64) ** 2.5 * NODES).long()
    return torch.randperm(NODES, generator=generator)[ids]


def graph(directed: bool, seed: int) -> CSCTopology:
    generator = torch.Generator().manual_seed(seed)
    if directed:
        edges = torch.stack([power_law(EDGES, generator), power_law(EDGES, generator)])
    else:
        half = torch.stack(
            [power_law(EDGES // 2, generator), torch.randint(0, NODES, (EDGES // 2,), generator=generator)]
        )
        edges = torch.cat([half, half.flip(0)], dim=1)
    return CSCTopology.from_edge_index(edges, NODES)


def hit_rate(hotness: torch.Tensor, reads: torch.Tensor) -> float:
    """Share of reads that the hottest rows serve."""
    held = torch.topk(hotness, int(SHARE * NODES)).indices
    return float(reads[held].sum() / reads.sum())


def measure(directed: bool, skewed: bool, seed: int) -> dict[str, float]:
    """Hit rate of each policy on one graph."""
    topology = graph(directed, seed)
    sampler = QuiverSampler(topology, FANOUTS, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    hot = torch.randperm(NODES, generator=generator)[: NODES // 50]
    reads = [torch.zeros(NODES, dtype=torch.float64) for _ in range(2)]
    requests = []
    for i in range(BATCHES):
        node = torch.randint(0, NODES, (BATCH,), generator=generator)
        if skewed:
            node[: BATCH // 2] = hot[torch.randint(0, hot.numel(), (BATCH // 2,), generator=generator)]
        if i % 2 == 0:
            requests.append(node)
        reads[i % 2] += torch.bincount(sampler.sample(node, key=i).node, minlength=NODES)
    p0 = seed_probability(NODES, BATCH, torch.cat(requests) if skewed else None)
    row = topology.row
    policies = {
        "oracle (counts of other batches)": reads[0],
        "FAP, probability": fap(topology, FANOUTS, p0),
        "FAP, count": fap(topology, FANOUTS, p0, mode="count"),
        "FAP as in torch-quiver": fap(topology, FANOUTS, p0, mode="reference"),
        "how often drawn (out-degree)": torch.bincount(row, minlength=NODES).double(),
        "how much drawn (in-degree)": topology.in_degree().double(),
        "random": torch.rand(NODES, generator=generator, dtype=torch.float64),
    }
    return {name: hit_rate(hotness, reads[1]) for name, hotness in policies.items()}


def main() -> None:
    """All graphs and seeds, then the timing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    headline: list[Headline] = []
    samples: dict[str, list[float]] = {}
    for directed in (True, False):
        for skewed in (False, True):
            runs = [measure(directed, skewed, seed) for seed in range(3)]
            seeds = "2 % hot seeds" if skewed else "uniform seeds"
            where = f"{'directed' if directed else 'undirected'}, {seeds}"
            oracle = [run["oracle (counts of other batches)"] for run in runs]
            for name in runs[0]:
                rates = [run[name] for run in runs]
                samples[f"{where}: {name}"] = rates
                relative = statistics.median(a / b for a, b in zip(rates, oracle, strict=True))
                aim = ">= 0.97 x oracle" if name.startswith("FAP, ") and directed else ""
                note = f"{relative:.3f} x oracle"
                what = f"hit rate, {where}, {name}"
                rate = statistics.median(rates)
                headline.append(Headline(what, rate, "", min(rates), max(rates), aim, note))
                print(f"{where:28s} {name:34s} {statistics.median(rates):.3f}  {note}", flush=True)
    generator = torch.Generator().manual_seed(9)
    large = CSCTopology.from_edge_index(
        torch.randint(0, 1_000_000, (2, 20_000_000), generator=generator), 1_000_000
    )
    p0 = seed_probability(1_000_000, 1024)
    arms = {"psgs": lambda: psgs(large, [15, 10, 5]), "fap": lambda: fap(large, [15, 10, 5], p0)}
    for name, values in interleaved(arms, repeats=5, clock=time.process_time).items():
        samples[f"{name}, 20 M edges, 3 hops"] = values
        what = f"{name} of 1 M nodes, 20 M edges, 3 hops"
        headline.append(Headline(what, statistics.median(values), "CPU s", min(values), max(values), "<= 1"))
        print(f"{what:64s} {statistics.median(values):.3f} CPU s")
    path = write_result(
        "pyg_quiver_hotness",
        question="Does FAP find the rows that will be read, and how long does it take?",
        headline=headline,
        samples=samples,
        folder=options.out,
    )
    print(path)


if __name__ == "__main__":
    main()

"""Neighbour sampling on the CPU: how fast per core, against pyg-lib, torch-sparse and torch operations?

python benchmarks/pyg_quiver_sampling.py [--peers DIR] [--out DIR]

Power-law graph of 1 M nodes and 20 M edges, fan-outs [15, 10, 5], then one with the sizes of ogbn-products.
All arms sample the same seeds in turns; CPU seconds of the calling thread.
DIR holds peers built for this Python and torch, where pip has none: the
package ``pyg_lib`` and torch-sparse's ``_neighbor_sample_cpu.so``. Arms of absent peers are left out,
and it says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from pyg_quiver import CSCTopology, QuiverSampler  # noqa: E402

NODES, EDGES, FANOUTS = 1_000_000, 20_000_000, [15, 10, 5]
PRODUCTS = (2_449_029, 123_718_280)
REPEATS = {1: 60, 8: 40, 64: 25, 1024: 11}
TARGETS = {1: ">= 1.7", 8: ">= 2", 64: ">= 2.7", 1024: ">= 4"}


def power_law_graph(nodes: int = NODES, edges: int = EDGES) -> CSCTopology:
    """In-degrees by a power law; sources uniform."""
    generator = np.random.default_rng(0)
    weight = (np.arange(nodes) + 1.0) ** -0.5
    degree = generator.multinomial(edges, weight / weight.sum())[generator.permutation(nodes)]
    colptr = np.concatenate([[0], np.cumsum(degree)])
    return CSCTopology(torch.from_numpy(colptr), torch.from_numpy(generator.integers(0, nodes, edges)))


def find_peers(
    folder: Path | None, topology: CSCTopology
) -> tuple[dict[str, Callable[[torch.Tensor], Any]], list[str]]:
    """Samplers of other packages, and which are missing."""
    colptr, row = topology.colptr, topology.row
    found: dict[str, Callable[[torch.Tensor], Any]] = {}
    missing = []
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        import pyg_lib

        found[f"pyg-lib {pyg_lib.__version__}"] = lambda seeds: pyg_lib.sampler.neighbor_sample(
            colptr, row, seeds, FANOUTS, csc=True
        )
    except ImportError:
        missing.append("pyg-lib")
    library = None if folder is None else folder / "_neighbor_sample_cpu.so"
    if library is not None and library.exists():
        torch.ops.load_library(library)
        found["torch-sparse 0.6.18"] = lambda seeds: torch.ops.torch_sparse.neighbor_sample(
            colptr, row, seeds, FANOUTS, False, True
        )
    else:
        missing.append("torch-sparse")
    return found, missing


def edges_of(result: Any) -> int:
    """Edges of one sample, ours or a peer's."""
    return int((result.edge if hasattr(result, "edge") else result[1]).numel())


class Measure:
    """Collects edge rates of interleaved arms and what may be quoted of them."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}
        self.headline: list[Headline] = []
        self.edges: dict[str, int] = {}

    def figure(self, what: str, values: list[float], unit: str, target: str, note: str = "10-90 %") -> None:
        """Median with the 10th and 90th percentiles."""
        values = sorted(values)
        low, high = values[len(values) // 10], values[-1 - len(values) // 10]
        self.headline.append(Headline(what, statistics.median(values), unit, low, high, target, note))
        print(f"{what:72s} {statistics.median(values):8.2f} {unit} {target}", flush=True)

    def compare(
        self, label: str, arms: dict[str, Callable[[torch.Tensor], Any]], batch: int, repeats: int, nodes: int
    ) -> None:
        """One batch size: the same seeds for every arm; the first arm is ours."""
        generator = torch.Generator().manual_seed(batch)
        seeds = torch.randint(0, nodes, (repeats + 2, batch), generator=generator)
        turns = dict.fromkeys(arms, 0)
        edges: dict[str, list[int]] = {name: [] for name in arms}

        def run(name: str) -> None:
            result = arms[name](seeds[turns[name]])
            turns[name] += 1
            edges[name].append(edges_of(result))

        seconds = interleaved(
            {name: partial(run, name) for name in arms}, repeats=repeats, warm_up=2, clock=time.thread_time
        )
        rates = {
            name: [count / value / 1e6 for count, value in zip(edges[name][2:], values, strict=True)]
            for name, values in seconds.items()
        }
        ours = next(iter(arms))
        for name, values in seconds.items():
            self.samples[f"{label}batch {batch}: {name}"] = values
            self.edges[f"{label}batch {batch}: {name}"] = int(statistics.mean(edges[name]))
            target = ">= 20" if name == ours and batch == 1024 else ""
            self.figure(f"{label}{name}, batch {batch}, one thread", rates[name], "M edges/s", target)
        for name in list(arms)[1:]:
            ratio = [a / b for a, b in zip(rates[ours], rates[name], strict=True)]
            target = TARGETS[batch] if name.startswith("pyg-lib") else ""
            if "sparse" in name and batch == 1024:
                target = ">= 15"
            self.figure(f"{label}{ours} / {name}, batch {batch}, one thread", ratio, "x", target)


def power_law(measure: Measure, folder: Path | None) -> list[str]:
    """Every batch size and arm on the graph of 20 M edges; the peers that are missing."""
    topology = power_law_graph()
    ours = QuiverSampler(topology, FANOUTS)
    narrow = QuiverSampler(CSCTopology(topology.colptr, topology.row.int()), FANOUTS)
    plain = QuiverSampler(topology, FANOUTS, backend="torch")
    peers, missing = find_peers(folder, topology)
    for batch, repeats in REPEATS.items():
        arms: dict[str, Callable[[torch.Tensor], Any]] = {
            "pyg_quiver": lambda s: ours.sample(s, key=int(s[0])),
            "pyg_quiver, int32": lambda s: narrow.sample(s, key=int(s[0])),
            "torch operations": lambda s: plain.sample(s, key=int(s[0])),
            **peers,
        }
        measure.compare("", arms, batch, repeats, NODES)
    two = QuiverSampler(topology, FANOUTS, num_threads=2)
    seeds = torch.randint(0, NODES, (1024,), generator=torch.Generator().manual_seed(1))
    walls = interleaved(
        {
            "one thread": lambda: ours.sample(seeds, key=1),
            "two threads": lambda: two.sample(seeds, key=1),
        },
        repeats=15,
    )
    measure.samples |= {f"batch 1024, wall: {name}": values for name, values in walls.items()}
    gain = [a / b for a, b in zip(walls["one thread"], walls["two threads"], strict=True)]
    measure.figure("two threads / one thread, batch 1024", gain, "x", ">= 1.7", "wall")
    return missing


def products(measure: Measure, folder: Path | None) -> str:
    """Ours and the built peers on a graph with the sizes of ogbn-products; the peers' names."""
    large = power_law_graph(*PRODUCTS)
    sampler = QuiverSampler(large, FANOUTS)
    arms = {"pyg_quiver": lambda s: sampler.sample(s, key=int(s[0])), **find_peers(folder, large)[0]}
    for batch in (1, 1024):
        measure.compare("products sizes: ", arms, batch, REPEATS[batch], large.num_nodes)
    return ", ".join(list(arms)[1:])


def main() -> None:
    """Measure all batch sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="folder with built peers")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure = Measure()
    missing = power_law(measure, options.peers)
    built = products(measure, options.peers)
    print(f"missing peers: {', '.join(missing) or 'none'}")
    path = write_result(
        "pyg_quiver_sampling",
        question="Neighbour sampling on the CPU: edges per second and core, against PyG's samplers?",
        headline=measure.headline,
        samples=measure.samples,
        folder=options.out,
        edges=measure.edges,
        missing_peers=missing,
        peers=f"built from source with g++ -O3 by hand: {built}" if built else "none",
    )
    print(path)


if __name__ == "__main__":
    main()

"""Neighbour sampling on the CPU: how fast per core, against pyg-lib, torch-sparse and torch operations?

python benchmarks/pyg_quiver_sampling.py [--peers DIR] [--out DIR]

Power-law graph of 1 M nodes and 20 M edges, fan-outs [15, 10, 5]. All arms sample the same seeds in turns;
CPU seconds of the calling thread. DIR holds peers built for this Python and torch, where pip has none: the
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
REPEATS = {1: 60, 8: 40, 64: 25, 1024: 11}
TARGETS = {1: ">= 1.7", 8: ">= 2", 64: ">= 2.7", 1024: ">= 4"}


def power_law_graph() -> CSCTopology:
    """In-degrees by a power law; sources uniform."""
    generator = np.random.default_rng(0)
    weight = (np.arange(NODES) + 1.0) ** -0.5
    degree = generator.multinomial(EDGES, weight / weight.sum())[generator.permutation(NODES)]
    colptr = np.concatenate([[0], np.cumsum(degree)])
    return CSCTopology(torch.from_numpy(colptr), torch.from_numpy(generator.integers(0, NODES, EDGES)))


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


def main() -> None:
    """Measure all batch sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="folder with built peers")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    topology = power_law_graph()
    narrow = CSCTopology(topology.colptr, topology.row.int())
    ours = QuiverSampler(topology, FANOUTS)
    ours_narrow = QuiverSampler(narrow, FANOUTS)
    two_threads = QuiverSampler(topology, FANOUTS, num_threads=2)
    plain = QuiverSampler(topology, FANOUTS, backend="torch")
    peers, missing = find_peers(options.peers, topology)
    samples: dict[str, list[float]] = {}
    headline: list[Headline] = []
    counts: dict[str, int] = {}
    generator = torch.Generator().manual_seed(1)
    for batch, repeats in REPEATS.items():
        seeds = torch.randint(0, NODES, (repeats + 8, batch), generator=generator)
        arms: dict[str, Callable[[torch.Tensor], Any]] = {
            "pyg_quiver": lambda s: ours.sample(s, key=int(s[0])),
            "pyg_quiver, int32": lambda s: ours_narrow.sample(s, key=int(s[0])),
            "torch operations": lambda s: plain.sample(s, key=int(s[0])),
            **peers,
        }
        turns = dict.fromkeys(arms, 0)
        edges: dict[str, list[int]] = {name: [] for name in arms}

        def run(name: str, arms=arms, turns=turns, edges=edges, seeds=seeds) -> None:
            result = arms[name](seeds[turns[name]])
            turns[name] += 1
            edges[name].append(edges_of(result))

        seconds = interleaved(
            {name: (lambda name=name: run(name)) for name in arms}, repeats=repeats, warm_up=2,
            clock=time.thread_time,
        )  # fmt: skip
        rates = {
            name: [count / value for count, value in zip(edges[name][2:], values, strict=True)]
            for name, values in seconds.items()
        }
        for name, values in seconds.items():
            samples[f"batch {batch}: {name}"] = values
            counts[f"batch {batch}: {name}"] = int(statistics.mean(edges[name]))
            rate = sorted(value / 1e6 for value in rates[name])
            aim = ">= 20" if name == "pyg_quiver" and batch == 1024 else ""
            what = f"{name}, batch {batch}, one thread"
            low, high = rate[len(rate) // 10], rate[-1 - len(rate) // 10]
            headline.append(Headline(what, statistics.median(rate), "M edges/s", low, high, aim, "10-90 %"))
            print(f"{what:50s} {statistics.median(rate):8.2f} M edges per CPU second", flush=True)
        for name in [*peers, "torch operations"]:
            ratio = sorted(a / b for a, b in zip(rates["pyg_quiver"], rates[name], strict=True))
            aim = (
                TARGETS[batch]
                if name.startswith("pyg-lib")
                else ">= 15"
                if "sparse" in name and batch == 1024
                else ""
            )
            low, high = ratio[len(ratio) // 10], ratio[-1 - len(ratio) // 10]
            what = f"pyg_quiver / {name}, batch {batch}, one thread"
            headline.append(Headline(what, statistics.median(ratio), "x", low, high, aim, "10-90 %"))
            print(f"{what:50s} {statistics.median(ratio):8.2f} x {aim}", flush=True)
    seeds = torch.randint(0, NODES, (1024,), generator=generator)
    walls = interleaved(
        {
            "one thread": lambda: ours.sample(seeds, key=1),
            "two threads": lambda: two_threads.sample(seeds, key=1),
        },
        repeats=15,
    )
    samples |= {f"batch 1024, wall: {name}": values for name, values in walls.items()}
    gain = sorted(a / b for a, b in zip(walls["one thread"], walls["two threads"], strict=True))
    headline.append(
        Headline(
            "two threads / one thread, batch 1024",
            statistics.median(gain),
            "x",
            gain[1],
            gain[-2],
            ">= 1.7",
            "wall",
        )
    )
    print(f"two threads / one: {statistics.median(gain):.2f} x")
    print(f"missing peers: {', '.join(missing) or 'none'}")
    path = write_result(
        "pyg_quiver_sampling",
        question="Neighbour sampling on the CPU: edges per second and core, against PyG's samplers?",
        headline=headline,
        samples=samples,
        folder=options.out,
        edges=counts,
        missing_peers=missing,
        peers="built from source with g++ -O3 by hand: " + ", ".join(peers) if peers else "none",
    )
    print(path)


if __name__ == "__main__":
    main()

"""The workload ``quiver.sample_and_gather``: batches of sampled neighbourhoods with their feature rows."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import torch_geometric.loader
from scipy import stats
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import GraphSAGE

import pyg_quiver
from moecap_eval.workload import ArmConfig, Axis, BlockResult, Item, RunContext, Sample, System, Workload

OPTIONS: dict[str, Any] = {"sampler": "quiver", "mode": "cpu", "placement": "none", "cache_fraction": 0.2}
PARAMS: dict[str, Any] = {
    "nodes": 10_000, "edges": 200_000, "features": 32, "fanouts": [10, 5], "batch_size": 256, "batches": 4,
    "items": 8,
}  # fmt: skip
CHOICES = {
    "sampler": ("quiver", "pyg"),
    "mode": ("cpu", "gpu", "uva"),
    "placement": ("fap", "degree", "none"),
}
CLASSES, SMALLEST_P = 8, 1e-5


class SampleAndGatherWorkload(Workload):
    """Each item is some batches of random seeds, classified by a trained GraphSAGE from what was sampled.

    Arms: ``{sampler: quiver | pyg, mode: cpu | gpu | uva, placement: fap | degree | none,
    cache_fraction: f}``; with a placement the hottest ``f`` of the rows lie in GPU memory (virtually on
    a CPU). ``distribution`` is a chi-square test of which neighbours were drawn in the first hop.
    """

    name: ClassVar[str] = "quiver.sample_and_gather"
    work_unit: ClassVar[str] = "sampled edge"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("validation_accuracy", "accuracy", "share", "higher", level="item", margin=0.02, headline=True),
        Axis("distribution", "accuracy", "share passed", "higher", level="item", margin=0.01),
        Axis("gathered_bytes_per_s", "performance", "B/s", "higher", level="item", headline=True),
        Axis("batch_p99_s", "performance", "s", "lower", headline=True),
    )

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """One seed a run of batches."""
        count = _known(params, PARAMS, self.name)["items"]
        return [Item(f"batches-{seed}-{i}", seed * 1000 + i) for i in range(count)]

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Make the graph, train the model, place the rows."""
        options = _known(arm.options, OPTIONS, f"arm {arm.name!r} of {self.name}")
        for key, known in CHOICES.items():
            if options[key] not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, got {options[key]!r}")
        if options["sampler"] == "pyg" and (options["mode"], options["placement"]) != ("cpu", "none"):
            raise ValueError("sampler: pyg has only mode: cpu and placement: none")
        if options["mode"] != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"mode: {options['mode']} needs a CUDA device; use cpu")
        return _SampleAndGather(options, _known(context.params, PARAMS, self.name), context.seed)


def _known(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in given:
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: unknown option {key!r} (options: {', '.join(defaults)}){hint}")
    return {**defaults, **given}


class _SampleAndGather(System):
    def __init__(self, options: Mapping[str, Any], params: Mapping[str, Any], seed: int) -> None:
        self.options, self.params = options, params
        self.device = torch.device("cpu" if options["mode"] == "cpu" else "cuda")
        torch.manual_seed(seed)
        self.edge_index, self.y = _communities(params["nodes"], params["edges"])
        self.topology = pyg_quiver.CSCTopology.from_edge_index(self.edge_index, params["nodes"])
        self.x = F.one_hot(self.y, params["features"]) + 2.0 * torch.randn(len(self.y), params["features"])
        self.model = self._trained().to(self.device)
        pyg = options["sampler"] == "pyg"
        loader = torch_geometric.loader.NeighborLoader if pyg else pyg_quiver.NeighborLoader
        more = {} if pyg else {"mode": options["mode"]}
        self.loader = loader(self._data(), params["fanouts"], torch.arange(len(self.y)), **more)

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Sample, gather and classify the batches of all items."""
        samples, waits, size = [], [], self.params["batch_size"]
        for item in items:
            generator = torch.Generator().manual_seed(item.payload)
            begin, gathered, edges, right = time.perf_counter(), 0, 0, 0
            drawn = torch.zeros(2, 10, dtype=torch.float64)
            for _ in range(self.params["batches"]):
                seeds = torch.randint(0, len(self.y), (size,), generator=generator)
                asked = time.perf_counter()
                batch = self.loader(seeds).to(self.device)
                waits.append(time.perf_counter() - asked)
                with torch.inference_mode():
                    predicted = self.model(batch.x, batch.edge_index)[:size].argmax(1).cpu()
                right += int((predicted == self.y[seeds]).sum())
                gathered, edges = gathered + batch.x.nbytes, edges + batch.edge_index.size(1)
                drawn += self._first_hop_deciles(batch)
            values: dict[str, float | None] = {
                "validation_accuracy": right / (self.params["batches"] * size),
                "distribution": float(stats.chisquare(*drawn.numpy()).pvalue > SMALLEST_P),
                "gathered_bytes_per_s": gathered / (time.perf_counter() - begin),
            }
            samples.append(Sample(item.id, values, detail={"edges": edges}))
        work = float(sum(sample.detail["edges"] for sample in samples))
        return BlockResult(work, {"batch_p99_s": float(np.quantile(waits, 0.99))}, samples)

    def memory_bytes(self) -> dict[str, int]:
        """Feature rows by tier; on a CPU all of them are in host memory."""
        share = 0.0 if self.options["placement"] == "none" else self.options["cache_fraction"]
        hot = int(self.x.nbytes * share) if self.device.type == "cuda" else 0
        return {"hbm": hot, "dram": self.x.nbytes - hot}

    def describe(self) -> dict[str, Any]:
        """What was opened."""
        return {**self.options, **self.params}

    def _trained(self) -> GraphSAGE:
        model = GraphSAGE(self.params["features"], 32, len(self.params["fanouts"]), CLASSES)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(15):
            optimiser.zero_grad()
            F.cross_entropy(model(self.x, self.edge_index), self.y).backward()
            optimiser.step()
        return model.eval()

    def _data(self) -> Any:
        """What the loader reads: plain data, or a store with the hottest rows in the fast tier."""
        if self.options["placement"] == "none":
            return Data(x=self.x, edge_index=self.edge_index)
        prior = pyg_quiver.seed_probability(len(self.y), self.params["batch_size"])
        hotness = self.topology.in_degree().double()
        if self.options["placement"] == "fap":
            hotness = pyg_quiver.fap(self.topology, self.params["fanouts"], prior, mode="count")
        one, row_bytes = pyg_quiver.DeviceTopology(torch.ones(1, 1, dtype=torch.bool)), self.x[0].nbytes
        budget = int(self.options["cache_fraction"] * len(self.y)) * row_bytes
        plan = pyg_quiver.plan_placement(hotness, row_bytes, one, device_budget=budget)
        store = pyg_quiver.QuiverFeatureStore(self.device, plan=plan)
        store.put_tensor(self.x, group_name=None, attr_name="x", index=None)
        return store, self.topology

    def _first_hop_deciles(self, batch: Any) -> Tensor:
        """Draws of the first hop by decile of the neighbourhood: counted and expected, ``[2, 10]``."""
        first = batch.num_sampled_edges[0]
        target = batch.n_id[batch.edge_index[1, :first]].cpu()
        degree = self.topology.in_degree()
        position = torch.empty_like(self.edge_index[0])
        position[self.topology.edge_permutation] = torch.arange(len(position))
        offset = position[batch.e_id[:first].cpu()] - self.topology.colptr[target]
        wide = degree[target] >= 2 * self.params["fanouts"][0]  # the others are drawn whole, or nearly
        counted = torch.bincount((offset * 10 // degree[target])[wide], minlength=10)
        draws = torch.bincount(degree[target][wide])
        shares = [torch.bincount(torch.arange(max(d, 1)) * 10 // max(d, 1), minlength=10) / max(d, 1)
                  for d in range(len(draws))]  # fmt: skip
        return torch.stack([counted.double(), draws.double() @ torch.stack(shares).double()])


def _communities(nodes: int, edges: int) -> tuple[Tensor, Tensor]:
    """Edges and labels: skewed in-degrees, and most neighbours share the label."""
    y = torch.arange(nodes) % CLASSES
    target = (torch.rand(edges) ** 2 * nodes).long()
    mate = torch.randint(0, nodes // CLASSES, (edges,)) * CLASSES + y[target]
    source = torch.where(torch.rand(edges) < 0.7, mate, torch.randint(0, nodes, (edges,)))
    return torch.stack([source, target]), y

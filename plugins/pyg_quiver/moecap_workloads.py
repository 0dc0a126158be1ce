"""The workload ``quiver.sample_and_gather``: batches of sampled neighbourhoods with their feature rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torch_geometric import data, loader, nn

import pyg_quiver
from moecap_eval.workload import ArmConfig, Axis, BlockResult, Item, RunContext, Sample, System, Workload
from moecap_eval.workload_tools import ConfiguredSystem, Stopwatch, read_options, seeded_items

OPTIONS: dict[str, Any] = {
    "sampler": ("quiver", "pyg"), "mode": ("cpu", "gpu", "uva"), "placement": ("none", "fap", "degree"),
    "cache_fraction": 0.2,
}  # fmt: skip
PARAMS: dict[str, Any] = {
    "nodes": 10_000, "edges": 200_000, "features": 32, "fanouts": [10, 5], "batch_size": 256, "batches": 4,
    "items": 8,
}  # fmt: skip
CLASSES, SMALLEST_P = 8, 1e-5


class SampleAndGatherWorkload(Workload):
    """Each item is some batches of random seeds, classified by a trained GraphSAGE from what was sampled.

    With a placement the hottest ``cache_fraction`` of the rows lie in GPU memory (virtually on a CPU).
    ``distribution`` is a chi-square test of which neighbours were drawn in the first hop.
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
        return seeded_items("batches", read_options(params, PARAMS, "params")["items"], seed)

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Make the graph, train the model, place the rows."""
        options = read_options(arm.options, OPTIONS, f"arms.{arm.name}")
        if options["sampler"] == "pyg" and (options["mode"], options["placement"]) != ("cpu", "none"):
            raise ValueError("sampler: pyg has only mode: cpu and placement: none")
        if options["mode"] != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"mode: {options['mode']} needs a CUDA device; use cpu")
        return _SampleAndGather(options, read_options(context.params, PARAMS, "params"), context.seed)


class _SampleAndGather(ConfiguredSystem):
    def __init__(self, options: Mapping[str, Any], params: Mapping[str, Any], seed: int) -> None:
        super().__init__(options, params)
        self.device = torch.device("cpu" if options["mode"] == "cpu" else "cuda")
        torch.manual_seed(seed)
        self.edge_index, self.y = _communities(params["nodes"], params["edges"])
        self.topology = pyg_quiver.CSCTopology.from_edge_index(self.edge_index, params["nodes"])
        self.x = F.one_hot(self.y, params["features"]) + 2.0 * torch.randn(len(self.y), params["features"])
        self.model = self._trained().to(self.device)
        more = {} if options["sampler"] == "pyg" else {"mode": options["mode"]}
        kind = pyg_quiver.NeighborLoader if more else loader.NeighborLoader
        self.loader = kind(self._data(), params["fanouts"], torch.arange(len(self.y)), **more)

    @torch.inference_mode()
    def run(self, items: Sequence[Item]) -> BlockResult:
        """Sample, gather and classify the batches of all items."""
        samples, waits, size = [], Stopwatch(self.device), self.params["batch_size"]
        for item in items:
            generator = torch.Generator().manual_seed(item.payload)
            begin, gathered, edges, right = time.perf_counter(), 0, 0, 0
            drawn = torch.zeros(2, 10, dtype=torch.float64)
            for _ in range(self.params["batches"]):
                seeds = torch.randint(0, len(self.y), (size,), generator=generator)
                with waits:
                    batch = self.loader(seeds).to(self.device)
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
        return BlockResult(work, {"batch_p99_s": float(np.quantile(waits.laps, 0.99))}, samples)

    def memory_bytes(self) -> dict[str, int]:
        """Feature rows by tier; on a CPU all of them are in host memory."""
        share = 0.0 if self.options["placement"] == "none" else self.options["cache_fraction"]
        hot = int(self.x.nbytes * share) if self.device.type == "cuda" else 0
        return {"hbm": hot, "dram": self.x.nbytes - hot}

    def _trained(self) -> nn.GraphSAGE:
        model = nn.GraphSAGE(self.params["features"], 32, len(self.params["fanouts"]), CLASSES)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(15):
            optimiser.zero_grad()
            F.cross_entropy(model(self.x, self.edge_index), self.y).backward()
            optimiser.step()
        return model.eval()

    def _data(self) -> Any:
        """What the loader reads: plain data, or a store with the hottest rows in the fast tier."""
        if self.options["placement"] == "none":
            return data.Data(x=self.x, edge_index=self.edge_index)
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
        position = torch.argsort(self.topology.edge_permutation)  # type: ignore[arg-type]
        offset = position[batch.e_id[:first].cpu()] - self.topology.colptr[target]
        degree = self.topology.in_degree()[target]
        wide = degree >= 2 * self.params["fanouts"][0]  # the others are drawn whole, or nearly
        offset, degree = offset[wide], degree[wide]
        bounds = -(torch.arange(11) * -degree[:, None] // 10)
        expected = (bounds.diff(dim=1) / degree[:, None].double()).sum(0)
        return torch.stack([torch.bincount(offset * 10 // degree, minlength=10).double(), expected])


def _communities(nodes: int, edges: int) -> tuple[Tensor, Tensor]:
    """Edges and labels: skewed in-degrees, and most neighbours share the label."""
    y = torch.arange(nodes) % CLASSES
    target = (torch.rand(edges) ** 2 * nodes).long()
    mate = torch.randint(0, nodes // CLASSES, (edges,)) * CLASSES + y[target]
    source = torch.where(torch.rand(edges) < 0.7, mate, torch.randint(0, nodes, (edges,)))
    return torch.stack([source, target]), y

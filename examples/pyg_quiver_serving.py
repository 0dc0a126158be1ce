"""Serve a GNN: features in tiers by how often they will be read, requests in batches of bounded work.

python examples/pyg_quiver_serving.py

Runs on the CPU, where the tiers are virtual; on a GPU, give the store "cuda", the topology to ``mode="gpu"``
and the engine two samplers with a router.
"""

from __future__ import annotations

import torch
from torch_geometric.nn import GraphSAGE

from pyg_quiver import (
    CSCTopology,
    DeviceTopology,
    InferenceEngine,
    QuiverFeatureStore,
    QuiverSampler,
    fap,
    plan_placement,
    seed_probability,
)

NODES, FEATURES, FANOUTS = 10_000, 32, [10, 5]


def main() -> None:
    """Plan, place, serve, and see what the fast tier was worth."""
    generator = torch.Generator().manual_seed(0)
    popular = (torch.rand(200_000, generator=generator) ** 3 * NODES).long()
    edges = torch.stack([popular, torch.randint(0, NODES, (200_000,), generator=generator)])
    topology = CSCTopology.from_edge_index(edges, NODES)

    hotness = fap(topology, FANOUTS, seed_probability(NODES, 64), mode="count")
    one_gpu = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    plan = plan_placement(hotness, FEATURES * 4, one_gpu, device_budget=NODES // 5 * FEATURES * 4)
    store = QuiverFeatureStore("cpu", plan=plan)
    store.put_tensor(torch.randn(NODES, FEATURES), group_name=None, attr_name="x", index=None)

    model = GraphSAGE(FEATURES, 64, num_layers=2, out_channels=8).eval()
    sampler = QuiverSampler(topology, FANOUTS)
    with InferenceEngine(model, store, sampler, deadline_ms=5_000, max_batch_psgs=1_000) as engine:
        futures = [engine.submit(torch.randint(0, NODES, (4,), generator=generator)) for _ in range(200)]
        responses = [future.result() for future in futures]
        print(engine.stats())
    rows = store.stats().rows
    print(
        f"first answer: {tuple(responses[0].output.shape)}, {responses[0].service_s * 1e3:.2f} ms of service"
    )
    share = rows["local"] / sum(rows.values())
    print(f"the fast tier holds 0.200 of the rows and served {share:.3f} of the reads")


if __name__ == "__main__":
    main()

"""The engine behind real Ray Serve: two replicas, one answer."""

from __future__ import annotations

import pytest
import torch
from quiver_reference import random_edges

pytestmark = [pytest.mark.pyg, pytest.mark.ray]

NODES = 200


def make_engine():
    from torch_geometric.nn import GraphSAGE

    from pyg_quiver import CSCTopology, InferenceEngine, QuiverSampler

    torch.manual_seed(0)
    model = GraphSAGE(8, 8, num_layers=2, out_channels=3).eval()
    features = torch.randn(NODES, 8)
    topology = CSCTopology.from_edge_index(EDGES, NODES)
    return InferenceEngine(model, features, QuiverSampler(topology, [4, 2], backend="torch"))


EDGES = random_edges(NODES, 2000, 1)


def test_every_replica_gives_the_answer_of_the_engine_alone():
    ray = pytest.importorskip("ray")
    # Replicas import no test module: the engine's factory travels by value.
    import sys

    from ray import cloudpickle, serve

    import pyg_quiver.ray_serve as module

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
        handle = serve.run(
            module.gnn_deployment(make_engine, **options).bind(), name="gnn", route_prefix=None
        )
        responses = [handle.remote([5, 9], request_id=3) for _ in range(12)]
        with make_engine() as alone:
            expected = alone.infer(torch.tensor([5, 9]), request_id=3)
        for response in responses:
            assert torch.allclose(response.result(timeout_s=60).output, expected, atol=1e-5)
        with pytest.raises(Exception, match=r"node 999 is out of range \[0, 200\)"):
            handle.remote([999]).result(timeout_s=60)
    finally:
        serve.shutdown()
        ray.shutdown()

"""Which bytes of GPU memory save most: columns of the graph, or feature rows? (QV-22)

Edges of a graph in host memory are read one by one, a PCIe sector each; feature rows are read whole. Both
cost time in proportion to how often one batch needs them, so the bytes that save most time come first,
whatever they hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyg_quiver.metrics import edge_reads, fap
from pyg_quiver.topology import CSCTopology

SECTOR_BYTES = 32  # what one edge costs on PCIe, whatever its own size


@dataclass(frozen=True)
class CachePlan:
    """GPU memory split between columns and feature rows.

    Attributes:
        hot_columns: int64, nodes whose edges go to GPU memory (``QuiverSampler(..., hot_columns=...)``).
        feature_bytes: what is left for rows (``device_budget`` of :func:`plan_placement`).
        topology_bytes: what the columns take.
        seconds: modelled reads of one batch with this plan.
        seconds_features_only: the same with all bytes given to rows.
    """

    hot_columns: Tensor
    feature_bytes: int
    topology_bytes: int
    seconds: float
    seconds_features_only: float


def plan_caches(
    topology: CSCTopology,
    num_neighbors: Sequence[int],
    seed_prob: float | Tensor,
    *,
    row_bytes: int,
    budget: int,
    bandwidth: Mapping[str, float],
) -> CachePlan:
    """Split ``budget`` bytes of GPU memory between the graph and its features.

    Columns and rows are taken by the modelled time they save a byte until the budget is full: the best split
    but for the last item.

    Args:
        topology: the graph, in host memory.
        num_neighbors: fan-outs, seeds first.
        seed_prob: chance of each node to be a seed (see :func:`seed_probability`).
        row_bytes: bytes of a feature row.
        budget: bytes of GPU memory for both.
        bandwidth: bytes per second of "local" and "host" reads.

    Raises:
        ValueError: a negative budget, or bandwidths that are missing or not positive.
    """
    if budget < 0 or row_bytes < 1:
        raise ValueError(f"budget is {budget} and row_bytes {row_bytes}; they must be at least 0 and 1")
    missing = [name for name in ("local", "host") if not bandwidth.get(name, 0) > 0]
    if missing:
        raise ValueError(f"plan_caches needs bandwidth in B/s of {', '.join(missing)}")
    saved_per_byte = 1 / bandwidth["host"] - 1 / bandwidth["local"]
    row_reads = fap(topology, num_neighbors, seed_prob, mode="count").cpu() * row_bytes
    column_reads = edge_reads(topology, num_neighbors, seed_prob).cpu() * SECTOR_BYTES
    column_bytes = topology.in_degree().cpu() * topology.row.element_size()
    nodes = topology.num_nodes
    size = torch.cat([column_bytes, torch.full((nodes,), row_bytes)])
    reads = torch.cat([column_reads, row_reads])
    order = torch.argsort(reads / size.clamp(min=1), descending=True, stable=True)
    order = order[size[order] > 0]
    taken = order[size[order].cumsum(0) <= budget]
    hot_columns = taken[taken < nodes]
    topology_bytes = int(column_bytes[hot_columns].sum())
    slowest = float(reads.sum()) / bandwidth["host"]
    hottest_rows = torch.sort(row_reads, descending=True).values[: budget // row_bytes]
    return CachePlan(
        hot_columns,
        budget - topology_bytes,
        topology_bytes,
        slowest - saved_per_byte * float(reads[taken].sum()),
        slowest - saved_per_byte * float(hottest_rows.sum()),
    )

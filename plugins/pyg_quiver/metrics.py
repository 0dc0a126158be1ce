"""What a graph and its fan-outs say about cost and reads: PSGS and FAP (Quiver, arXiv 2305.10863).

Both are computed from expectations, in O(hops x edges), without drawing a sample. In a hop of fan-out l, a
node of degree d draws each of its in-neighbours with probability ``r = min(1, l / d)`` (1 for fan-out -1).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from pyg_quiver.topology import CSCTopology

MetricBackend = Literal["auto", "numba", "torch"]
FapMode = Literal["probability", "count", "reference"]


def psgs(
    topology: CSCTopology,
    num_neighbors: Sequence[int],
    *,
    backend: MetricBackend = "auto",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Probabilistic sampled graph size: nodes of the tree that sampling from one seed expands, in the mean.

    ``f_K(v) = 1``; ``f_{h-1}(v) = 1 + r_h(v) * sum of f_h over in-neighbours``; PSGS is ``f_0``. It is the
    expected number of sampled edges plus 1 for two hops on graphs without loops and parallel edges, an upper
    bound beyond, since a node that is found again is not expanded again. For a batch, sum over its seeds.

    Args:
        topology: the graph.
        num_neighbors: fan-outs, seeds first.
        backend: "numba" on the CPU, "torch" anywhere.
        dtype: of the result; float32 halves the memory of the torch backend.

    Returns:
        ``[N]`` of ``dtype`` on the topology's device.
    """
    fanouts = _checked_fanouts(num_neighbors)
    if _use_numba(backend, topology):
        from pyg_quiver.backends import numba_metrics

        size = torch.ones(topology.num_nodes, dtype=torch.float64)
        for fanout in reversed(fanouts):
            size = torch.from_numpy(
                numba_metrics.pull(topology.colptr.numpy(), topology.row.numpy(), size.numpy(), fanout)
            )
        return size.to(dtype)
    size = torch.ones(topology.num_nodes, dtype=dtype, device=topology.device)
    for fanout in reversed(fanouts):
        sums = torch.segment_reduce(size[topology.row.long()], "sum", offsets=topology.colptr, initial=0)
        size = 1 + _ratio(topology, fanout, dtype) * sums
    return size


def fap(
    topology: CSCTopology,
    num_neighbors: Sequence[int],
    seed_prob: float | Tensor,
    *,
    mode: FapMode = "probability",
    backend: MetricBackend = "auto",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Feature access probability: how often each node's row is read by one batch.

    - "count": expected reads. ``a_0 = p0``; ``a_{h+1}(u)`` sums ``a_h(v) r(v)`` over the v that may draw u.
      Use it to rank rows.
    - "probability": chance of at least one read, hops and neighbours taken as independent and only new nodes
      expanded. Use it to predict batch sizes; it loses order where it comes near 1.
    - "reference": the recursion of torch-quiver as published, for comparison: it follows edges the wrong way
      (harmless on symmetric graphs only), drops nodes without neighbours and expands nodes again in each hop.

    Args:
        topology: the graph.
        num_neighbors: fan-outs, seeds first.
        seed_prob: chance of each node to be a seed of the batch; a number or ``[N]``.
        mode: see above.
        backend: "numba" on the CPU, "torch" anywhere.
        dtype: of the result.

    Returns:
        ``[N]`` of ``dtype`` on the topology's device.

    Raises:
        ValueError: a probability outside [0, 1], naming the node.
    """
    fanouts = _checked_fanouts(num_neighbors)
    if mode not in ("probability", "count", "reference"):
        raise ValueError(f"mode is {mode!r}; it must be 'probability', 'count' or 'reference'")
    start = _checked_seed_prob(seed_prob, topology).to(torch.float64)
    if mode == "reference":
        return _reference(topology, fanouts, start).to(dtype)
    numba = _use_numba(backend, topology)
    if mode == "count":
        total = current = start
        for fanout in fanouts:
            current = _push(topology, current, fanout, numba)
            total = total + current
        return total.to(dtype)
    current, missing = start, 1 - start
    for fanout in fanouts:
        reached = 1 - _push_missing(topology, current, fanout, numba)
        current = missing * reached
        missing = missing * (1 - reached)
    return (1 - missing).to(dtype)


def edge_reads(
    topology: CSCTopology,
    num_neighbors: Sequence[int],
    seed_prob: float | Tensor,
    *,
    backend: MetricBackend = "auto",
) -> Tensor:
    """Edges that one batch reads of each node's column, expected: ``sum_h a_h(v) min(degree, l)``.

    ``a_h`` are the expected visits of mode "count" of :func:`fap`, whose arguments these are.

    Returns:
        float64 ``[N]`` on the topology's device.
    """
    numba = _use_numba(backend, topology)
    visits = _checked_seed_prob(seed_prob, topology).double()
    degree = topology.in_degree().double()
    total = torch.zeros_like(visits)
    for fanout in _checked_fanouts(num_neighbors):
        total += visits * (degree if fanout < 0 else degree.clamp(max=fanout))
        visits = _push(topology, visits, fanout, numba)
    return total


def seed_probability(num_nodes: int, batch_size: int, requests: Tensor | None = None) -> Tensor:
    """Chance of each node to be among the seeds of one batch.

    Args:
        num_nodes: N.
        batch_size: seeds of a batch, B.
        requests: int64 node ids of past requests; uniform without them.

    Returns:
        float64 ``[N]``: ``B / N``, or ``1 - (1 - w)^B`` with a node's share w of the requests.

    Raises:
        IndexError: a request for a node that is not in the graph.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if requests is None:
        return torch.full((num_nodes,), min(batch_size / max(num_nodes, 1), 1.0), dtype=torch.float64)
    if requests.numel() == 0:
        raise ValueError("requests is empty: pass None for uniform seeds")
    low, high = (int(bound) for bound in torch.aminmax(requests))
    if low < 0 or high >= num_nodes:
        raise IndexError(f"node {low if low < 0 else high} is out of range [0, {num_nodes})")
    share = torch.bincount(requests, minlength=num_nodes).double() / requests.numel()
    return -torch.expm1(batch_size * torch.log1p(-share))


def _checked_fanouts(num_neighbors: Sequence[int]) -> list[int]:
    fanouts = list(num_neighbors)
    for h, fanout in enumerate(fanouts):
        if not isinstance(fanout, Integral) or fanout < -1:
            raise ValueError(f"num_neighbors[{h}] is {fanout!r}; it must be -1 (all) or more")
    return fanouts


def _checked_seed_prob(seed_prob: float | Tensor, topology: CSCTopology) -> Tensor:
    if not isinstance(seed_prob, Tensor):
        seed_prob = torch.full((topology.num_nodes,), float(seed_prob), device=topology.device).double()
    if seed_prob.shape != (topology.num_nodes,):
        raise ValueError(f"seed_prob is {tuple(seed_prob.shape)}; it must be [{topology.num_nodes}]")
    bad = (~((seed_prob >= 0) & (seed_prob <= 1))).nonzero()
    if bad.numel():
        v = int(bad[0, 0])
        raise ValueError(f"seed_prob must lie in [0, 1], got {float(seed_prob[v]):g} at node {v}")
    return seed_prob.to(topology.device)


def _use_numba(backend: MetricBackend, topology: CSCTopology) -> bool:
    if backend not in ("auto", "numba", "torch"):
        raise ValueError(f"backend is {backend!r}; it must be 'auto', 'numba' or 'torch'")
    installed = importlib.util.find_spec("numba") is not None
    if backend == "numba" and not installed:
        raise ImportError("backend='numba' needs numba: pip install numba")
    return backend == "numba" or (backend == "auto" and installed and topology.device.type == "cpu")


def _ratio(topology: CSCTopology, fanout: int, dtype: torch.dtype = torch.float64) -> Tensor:
    degree = topology.in_degree().to(dtype)
    return torch.ones_like(degree) if fanout < 0 else (fanout / degree.clamp(min=1)).clamp(max=1)


def _per_edge(topology: CSCTopology, value: Tensor, fanout: int) -> Tensor:
    return torch.repeat_interleave(value * _ratio(topology, fanout), topology.in_degree())


def _push(topology: CSCTopology, value: Tensor, fanout: int, numba: bool) -> Tensor:
    """sum over v with u in N(v) of value(v) r(v)."""
    if numba:
        from pyg_quiver.backends import numba_metrics

        return torch.from_numpy(
            numba_metrics.push(topology.colptr.numpy(), topology.row.numpy(), value.numpy(), fanout)
        )
    return torch.zeros_like(value).index_add_(0, topology.row.long(), _per_edge(topology, value, fanout))


def _push_missing(topology: CSCTopology, value: Tensor, fanout: int, numba: bool) -> Tensor:
    """Product over v with u in N(v) of 1 - value(v) r(v)."""
    if numba:
        from pyg_quiver.backends import numba_metrics

        return torch.from_numpy(
            numba_metrics.push_missing(topology.colptr.numpy(), topology.row.numpy(), value.numpy(), fanout)
        )
    logs = torch.log1p(-_per_edge(topology, value, fanout))
    return torch.zeros_like(value).index_add_(0, topology.row.long(), logs).exp()


def _reference(topology: CSCTopology, fanouts: list[int], start: Tensor) -> Tensor:
    degree = topology.in_degree()
    target = torch.repeat_interleave(torch.arange(topology.num_nodes, device=start.device), degree)
    source = topology.row.long()
    current = start
    for fanout in fanouts:
        logs = torch.log1p(-(current * _ratio(topology, fanout))[source])
        missed = torch.zeros_like(current).index_add_(0, target, logs).exp()
        current = torch.where(degree > 0, 1 - (1 - current) * missed, 0.0)
    return current

"""From a batch of requests to their outputs: sample every group, read its rows, run the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyg_quiver.backends.contract import Sampled
from pyg_quiver.feature_store import QuiverFeatureStore
from pyg_quiver.sampler import QuiverSampler

Samplers = QuiverSampler | Mapping[str, QuiverSampler]
_HOP_ARGUMENTS = ("num_sampled_nodes_per_hop", "num_sampled_edges_per_hop")


@dataclass(frozen=True)
class Setup:
    """What answers are made of. A batch uses one setup from start to end.

    Attributes:
        model: ``model(x, edge_index)``.
        features: rows of every node.
        samplers: by route.
        psgs: float64 ``[N]``, predicted work of every node.
        hop_arguments: which sizes by hop the model's forward takes.
        degraded: the same with smaller fan-outs, for overload; None without.
    """

    model: Any
    features: QuiverFeatureStore | Tensor
    samplers: Mapping[str, QuiverSampler]
    psgs: Tensor
    hop_arguments: tuple[str, ...]
    degraded: Setup | None = None

    @classmethod
    def make(
        cls,
        model: Any,
        features: QuiverFeatureStore | Tensor,
        samplers: Samplers,
        degraded: Samplers | None = None,
    ) -> Setup:
        """Name the route of a single sampler after its device; compute the predicted work.

        Raises:
            ValueError: no sampler, or degraded samplers of other routes.
        """
        routes = by_route(samplers)
        psgs = next(iter(routes.values())).psgs()
        _check_rows(features, psgs.numel())
        setup = cls(model, features, routes, psgs, _wanted_hop_arguments(model))
        if degraded is None:
            return setup
        smaller = cls.make(model, features, degraded)
        if set(smaller.samplers) != set(routes):
            raise ValueError(f"degraded has routes {sorted(smaller.samplers)}, samplers {sorted(routes)}")
        return replace(setup, degraded=smaller)

    def changed(
        self, model: Any, features: QuiverFeatureStore | Tensor | None, samplers: Samplers | None
    ) -> Setup:
        """A copy with what is given; degraded samplers stay."""
        new = replace(
            self,
            model=self.model if model is None else model,
            features=self.features if features is None else features,
        )
        if samplers is not None:
            routes = by_route(samplers)
            new = replace(new, samplers=routes, psgs=next(iter(routes.values())).psgs())
        _check_rows(new.features, new.psgs.numel())
        degraded = self.degraded and self.degraded.changed(model, features, None)
        return replace(new, hop_arguments=_wanted_hop_arguments(new.model), degraded=degraded)

    def check(self, node: Tensor) -> None:
        """Refuse what is not one or more nodes of the graph."""
        if node.dim() != 1 or node.numel() == 0 or node.dtype.is_floating_point or node.dtype == torch.bool:
            raise ValueError(
                f"node is {node.dtype} {tuple(node.shape)}; it must be one or more node ids, [n]"
            )
        low, high = (int(bound) for bound in torch.aminmax(node))
        if low < 0 or high >= self.psgs.numel():
            raise IndexError(f"node {low if low < 0 else high} is out of range [0, {self.psgs.numel()})")

    def answer(self, route: str, node: Tensor, group: Tensor, keys: Sequence[int]) -> Tensor:
        """Outputs of the seeds, ``[len(node), C]`` on the CPU.

        Args:
            route: whose sampler draws.
            node: int64 ``[B]`` seeds.
            group: int64 ``[B]`` their requests, ascending from 0.
            keys: of every request.
        """
        sampled = self.samplers[route].sample_groups(node, group, keys)
        x = self._rows(sampled.node, several=len(keys) > 1)
        edge_index = torch.stack([sampled.row, sampled.col]).to(x.device, non_blocking=True)
        with torch.inference_mode():
            out = self.model(x, edge_index, **self._sizes(sampled))
        if out.shape[0] < node.numel():
            raise ValueError(f"the model returned {out.shape[0]} rows for {node.numel()} requested nodes")
        return out[: node.numel()].float().cpu()

    def _rows(self, node: Tensor, *, several: bool) -> Tensor:
        """Rows of the nodes; each distinct row is read once (a single request names few twice)."""
        if isinstance(self.features, Tensor):
            return self.features[node.to(self.features.device)]
        node = node.to(self.features.device, non_blocking=True)
        if not several:
            return self.features.get_tensor(group_name=None, attr_name="x", index=node)
        distinct, inverse = node.unique(return_inverse=True)
        return self.features.get_tensor(group_name=None, attr_name="x", index=distinct)[inverse]

    def _sizes(self, sampled: Sampled) -> dict[str, list[int]]:
        sizes = dict(zip(_HOP_ARGUMENTS, (sampled.nodes_per_hop, sampled.edges_per_hop), strict=True))
        return {name: sizes[name] for name in self.hop_arguments}


def by_route(samplers: Samplers) -> dict[str, QuiverSampler]:
    """Samplers by route; a single one is "cpu" or "gpu"."""
    if isinstance(samplers, QuiverSampler):
        return {"gpu" if samplers.mode != "cpu" else "cpu": samplers}
    if not samplers:
        raise ValueError("samplers is empty: pass a QuiverSampler or a mapping from route to sampler")
    return dict(samplers)


def _check_rows(features: QuiverFeatureStore | Tensor, nodes: int) -> None:
    if isinstance(features, Tensor):
        rows = features.shape[0]
    else:
        size = features.get_tensor_size(group_name=None, attr_name="x")
        if size is None:
            raise ValueError("features has no attribute 'x': put_tensor(x, group_name=None, attr_name='x')")
        rows = size[0]
    if rows < nodes:
        raise ValueError(f"features has {rows} rows, but the graph has {nodes} nodes")


def _wanted_hop_arguments(model: Any) -> tuple[str, ...]:
    forward = getattr(model, "forward", model)
    try:
        names = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return ()
    return tuple(name for name in _HOP_ARGUMENTS if name in names)

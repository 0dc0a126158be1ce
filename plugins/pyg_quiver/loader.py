"""PyG's loaders with a :class:`QuiverSampler` inside: the same arguments, one changed import line."""

# The signatures are PyG's, positional arguments and all.
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch_geometric.loader
from torch import Tensor
from torch_geometric.sampler import BaseSampler

from pyg_quiver.sampler import Mode, QuiverSampler


class _EpochMixin:
    """Each pass samples anew: pass ``i`` uses epoch ``i`` unless :meth:`set_epoch` says another."""

    _sampler: BaseSampler
    _next_epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the next pass; later passes count on from it."""
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._sampler, QuiverSampler):
            self._sampler.set_epoch(self._next_epoch)
        self._next_epoch += 1
        return super().__iter__()  # type: ignore[misc]


class NeighborLoader(_EpochMixin, torch_geometric.loader.NeighborLoader):
    """``torch_geometric.loader.NeighborLoader`` that needs neither pyg-lib nor torch-sparse.

    Takes the arguments of PyG's loader, and:

    Args:
        seed: of all draws.
        mode: "cpu", "gpu", "uva" or "auto" (see :class:`QuiverSampler`).
        sampler: a :class:`QuiverSampler` to use instead of making one; any other object is the order of
            seeds, as in ``torch.utils.data.DataLoader``.

    Raises:
        ValueError: a GPU mode with workers.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Any,
        input_nodes: Any = None,
        input_time: Tensor | None = None,
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        time_attr: str | None = None,
        weight_attr: str | None = None,
        transform: Callable[..., Any] | None = None,
        transform_sampler_output: Callable[..., Any] | None = None,
        is_sorted: bool = False,
        filter_per_worker: bool | None = None,
        neighbor_sampler: BaseSampler | None = None,
        directed: bool = True,
        *,
        seed: int = 0,
        mode: Mode = "auto",
        sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        neighbor_sampler = _choose_sampler(neighbor_sampler, sampler, kwargs) or QuiverSampler(
            data,
            num_neighbors,
            replace=replace,
            disjoint=disjoint,
            subgraph_type=subgraph_type if directed else "induced",
            time_attr=time_attr,
            weight_attr=weight_attr,
            temporal_strategy=temporal_strategy,
            seed=seed,
            mode=mode,
        )
        self._sampler = neighbor_sampler
        _prepare_workers(neighbor_sampler, kwargs)
        super().__init__(
            data,
            num_neighbors,
            input_nodes=input_nodes,
            input_time=input_time,
            time_attr=time_attr,
            transform=transform,
            transform_sampler_output=transform_sampler_output,
            filter_per_worker=_filter_per_worker(data, filter_per_worker),
            neighbor_sampler=neighbor_sampler,
            **kwargs,
        )


class LinkNeighborLoader(_EpochMixin, torch_geometric.loader.LinkNeighborLoader):
    """``torch_geometric.loader.LinkNeighborLoader`` that needs neither pyg-lib nor torch-sparse.

    Takes the arguments of PyG's loader and those of :class:`NeighborLoader`. Negative edges are drawn from
    the batch's key, so that they repeat too.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Any,
        edge_label_index: Any = None,
        edge_label: Tensor | None = None,
        edge_label_time: Tensor | None = None,
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        neg_sampling: Any = None,
        neg_sampling_ratio: int | float | None = None,
        time_attr: str | None = None,
        weight_attr: str | None = None,
        transform: Callable[..., Any] | None = None,
        transform_sampler_output: Callable[..., Any] | None = None,
        is_sorted: bool = False,
        filter_per_worker: bool | None = None,
        neighbor_sampler: BaseSampler | None = None,
        directed: bool = True,
        *,
        seed: int = 0,
        mode: Mode = "auto",
        sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        neighbor_sampler = _choose_sampler(neighbor_sampler, sampler, kwargs) or QuiverSampler(
            data,
            num_neighbors,
            replace=replace,
            disjoint=disjoint,
            subgraph_type=subgraph_type if directed else "induced",
            time_attr=time_attr,
            weight_attr=weight_attr,
            temporal_strategy=temporal_strategy,
            seed=seed,
            mode=mode,
        )
        self._sampler = neighbor_sampler
        _prepare_workers(neighbor_sampler, kwargs)
        super().__init__(
            data,
            num_neighbors,
            edge_label_index=edge_label_index,
            edge_label=edge_label,
            edge_label_time=edge_label_time,
            neg_sampling=neg_sampling,
            neg_sampling_ratio=neg_sampling_ratio,
            time_attr=time_attr,
            transform=transform,
            transform_sampler_output=transform_sampler_output,
            filter_per_worker=_filter_per_worker(data, filter_per_worker),
            neighbor_sampler=neighbor_sampler,
            **kwargs,
        )


def _choose_sampler(
    neighbor_sampler: BaseSampler | None, sampler: Any, kwargs: dict[str, Any]
) -> BaseSampler | None:
    if sampler is None:
        return neighbor_sampler
    if isinstance(sampler, BaseSampler):
        if neighbor_sampler is not None:
            raise ValueError("sampler and neighbor_sampler are both given: pass one of them")
        return sampler
    kwargs["sampler"] = sampler
    return neighbor_sampler


def _prepare_workers(sampler: BaseSampler, kwargs: dict[str, Any]) -> None:
    workers = kwargs.get("num_workers", 0)
    if not isinstance(sampler, QuiverSampler) or not workers:
        return
    if sampler.mode != "cpu":
        raise ValueError(
            f"mode={sampler.mode!r} samples in the main process: num_workers must be 0, got {workers}"
        )
    sampler.warm_up()


def _filter_per_worker(data: Any, wanted: bool | None) -> bool | None:
    """Feature stores are read in the main process: a forked worker cannot use CUDA."""
    return False if wanted is None and isinstance(data, tuple) else wanted

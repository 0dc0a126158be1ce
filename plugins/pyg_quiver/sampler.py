"""PyG's sampler interface over the backends: the module that knows PyG's sampling contracts."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Data, FeatureStore, GraphStore, HeteroData
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    HeteroSamplerOutput,
    NegativeSampling,
    NodeSamplerInput,
    NumNeighbors,
    SamplerOutput,
)
from torch_geometric.sampler.base import SubgraphType
from torch_geometric.sampler.neighbor_sampler import edge_sample

from pyg_quiver.backends.contract import Draws, Frontier, HopBackend, Sampled
from pyg_quiver.backends.hops import EdgeType, SampledTypes, sample_one_type, sample_types
from pyg_quiver.rng import GOLDEN, MASK, batch_key, seed_keys, streams_tensor
from pyg_quiver.topology import CSCTopology
from pyg_quiver.typed_graphs import TypedGraphs

Mode = Literal["auto", "cpu", "gpu", "uva"]
Backend = Literal["auto", "numba", "torch", "triton"]


class QuiverSampler(BaseSampler):
    """Neighbour sampling whose result depends on nothing but ``seed``, the key, the nodes and the graph.

    Args:
        data: ``CSCTopology``, ``Data``, ``HeteroData`` or ``(FeatureStore, GraphStore)``.
        num_neighbors: neighbours per hop, seeds first, -1 for all; a dict gives them by edge type.
        replace: draw with replacement.
        disjoint: sample each seed by itself; nodes of different seeds are not merged.
        subgraph_type: "directional", "bidirectional" or "induced", as in PyG.
        time_attr: node or edge attribute with int64 times; no neighbour is later than its seed.
        weight_attr: edge attribute with the probability weights of neighbours (numba only).
        temporal_strategy: "uniform" among the allowed neighbours, or the "last" ones.
        seed: of all draws.
        mode: "cpu"; "gpu": graph in GPU memory; "uva": edges in pinned host memory, read by the GPU in
            place. "auto": "gpu" if the topology lies there, else "cpu".
        backend: "numba" or "torch" on the CPU, "triton" or "torch" on the GPU; "auto" takes the first of
            them that is installed. "triton" on the CPU needs ``TRITON_INTERPRET=1``.
        num_threads: threads of one call on the CPU; more only help large batches.
        hot_columns: int64, nodes whose edges are copied to GPU memory in mode "uva" (see ``plan_caches``).

    Raises:
        RuntimeError: a GPU mode without a CUDA device.
        ImportError: a backend that is not installed.
        ValueError: an unknown option, or attributes that are not in ``data``.
    """

    def __init__(
        self,
        data: CSCTopology | Data | HeteroData | tuple[FeatureStore, GraphStore],
        num_neighbors: NumNeighbors | Sequence[int] | dict[EdgeType, list[int]],
        *,
        replace: bool = False,
        disjoint: bool = False,
        subgraph_type: SubgraphType | str = "directional",
        time_attr: str | None = None,
        weight_attr: str | None = None,
        temporal_strategy: str = "uniform",
        seed: int = 0,
        mode: Mode = "auto",
        backend: Backend = "auto",
        num_threads: int = 1,
        hot_columns: Tensor | None = None,
    ) -> None:
        if temporal_strategy not in ("uniform", "last"):
            raise ValueError(f"temporal_strategy is {temporal_strategy!r}; it must be 'uniform' or 'last'")
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
        self.graphs = TypedGraphs.from_data(data, time_attr=time_attr, weight_attr=weight_attr)
        self.mode = _resolve_mode(mode, self.graphs.device)
        self.backend = _resolve_backend(backend, self.mode)
        if hot_columns is not None and self.mode != "uva":
            raise ValueError(f"hot_columns are for mode='uva', where edges are in host memory; got {mode!r}")
        if weight_attr is not None and self.backend != "numba":
            raise ImportError(f"weight_attr needs backend='numba', got {self.backend!r}: pip install numba")
        if self.mode == "gpu":
            self.graphs = self.graphs.to("cuda")
        elif self.mode == "uva":
            self.graphs = self.graphs.to_uva("cuda", hot_columns)
        self.num_neighbors = num_neighbors
        self.replace = replace
        self.subgraph_type = SubgraphType(subgraph_type)
        self.temporal_strategy = temporal_strategy
        self.seed = seed
        self.num_threads = num_threads
        self.keep_orig_edges = False
        self._disjoint = disjoint
        self._temporal = self.graphs.is_temporal
        # Triton's kernels read a batch's seeds from host memory; all others where the graph is.
        staged = self.backend == "triton" and not self._temporal and not self.graphs.is_hetero
        self._input_device = torch.device("cpu") if staged else self.graphs.device
        # PyG's Data and HeteroData are indexed where they lie, so results go back there.
        on_host = isinstance(data, (Data, HeteroData)) and not data.is_cuda
        self._output_device = torch.device("cpu") if on_host else self.graphs.device
        # Workers see the epoch of the main process through this one shared element.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def num_neighbors(self) -> NumNeighbors:
        """Neighbours per hop."""
        return self._num_neighbors

    @num_neighbors.setter
    def num_neighbors(self, value: NumNeighbors | Sequence[int] | dict[EdgeType, list[int]]) -> None:
        if isinstance(value, (int, str)):
            raise TypeError(f"num_neighbors is {value!r}; it must give a number for each hop, as [15, 10, 5]")
        numbers = value if isinstance(value, NumNeighbors) else NumNeighbors(value)
        _check_fanouts(numbers.values)
        self._num_neighbors = numbers
        self._psgs: Tensor | None = None
        if self.graphs.is_hetero:
            self._fanouts = dict(self._num_neighbors.get_values(sorted(self.graphs.graphs)))
        else:
            self._fanouts = {self.graphs.only_type: list(self._num_neighbors.get_values())}

    @property
    def disjoint(self) -> bool:
        """Whether each seed is sampled by itself; always so for temporal sampling."""
        return self._disjoint or self._temporal

    @property
    def edge_permutation(self) -> Tensor | dict[EdgeType, Tensor | None] | None:
        """Original edge number at each CSC position; by edge type for heterogeneous graphs."""
        permutations = self.graphs.permutations
        return permutations if self.graphs.is_hetero else permutations[self.graphs.only_type]

    @property
    def epoch(self) -> int:
        """The pass over the data that keys are made for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in workers too."""
        self._epoch.fill_(epoch)

    def warm_up(self) -> None:
        """Compile what sampling needs, so that workers forked later need not."""
        kind = next((name for name, count in self.graphs.num_nodes.items() if count), None)
        if kind is not None:
            node = torch.zeros(1, dtype=torch.int64)
            times = None if not self.graphs.is_temporal else torch.zeros(1, dtype=torch.int64)
            name = kind if self.graphs.is_hetero else None
            self.sample_from_nodes(NodeSamplerInput(torch.zeros(1, dtype=torch.int64), node, times, name))

    def sample(self, node: Tensor, *, key: int = 0) -> SamplerOutput:
        """Sample around nodes of a homogeneous graph: a pure function, callable from any thread.

        Args:
            node: int64 ``[B]``; repeated nodes keep a row each.
            key: what distinguishes this sample from others of the same nodes.

        Raises:
            IndexError: a node that is not in the graph.
        """
        if self.graphs.is_hetero:
            raise ValueError(
                "sample() is for homogeneous graphs; use sample_from_nodes for a heterogeneous one"
            )
        return self._from_nodes(torch.as_tensor(node), key=key, keys=None, time=None)

    def psgs(self) -> Tensor:
        """PSGS of every node (see :func:`pyg_quiver.psgs`), float64 ``[N]`` on the CPU; computed once."""
        from pyg_quiver.metrics import psgs

        if self.graphs.is_hetero:
            raise ValueError("PSGS is for homogeneous graphs")
        if self._psgs is None:
            graph = self.graphs.graphs[self.graphs.only_type]
            colptr = graph.colptr.to(graph.row.device)  # edges in pinned memory are summed on the CPU
            topology = CSCTopology(colptr, graph.row, num_src_nodes=graph.num_src_nodes)
            self._psgs = psgs(topology, self._fanouts[self.graphs.only_type]).cpu()
        return self._psgs

    def sample_groups(self, node: Tensor, group: Tensor, keys: Sequence[int]) -> Sampled:
        """Sample disjoint groups of nodes as if each were alone, in one call.

        Args:
            node: int64 ``[B]``.
            group: int64 ``[B]``, ascending from 0.
            keys: key of each group.
        """
        self._check_nodes(node, self.graphs.only_type[0])
        device = self._input_device
        streams = streams_tensor(self.seed, keys).to(device)
        return self._run(Frontier(node.to(device), group.to(device)), Draws(streams, replace=self.replace))

    def sample_from_nodes(
        self, index: NodeSamplerInput, **kwargs: Any
    ) -> SamplerOutput | HeteroSamplerOutput:
        """Sample around a loader's batch; the key is made from the positions in the loader's input."""
        index = NodeSamplerInput.cast(index)
        input_id = index.input_id if index.input_id is not None else torch.arange(index.node.numel())
        seeds = index.node if index.input_type is None else {index.input_type: index.node}
        times = (
            index.time if index.input_type is None or index.time is None else {index.input_type: index.time}
        )
        out = self._sample_inputs(seeds, times, input_id)
        out.metadata = (input_id, index.time)
        return self._finish(out)

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None, **kwargs: Any
    ) -> SamplerOutput | HeteroSamplerOutput:
        """Sample around both ends of a batch of edges, with negative edges drawn from the batch's key."""
        index = EdgeSamplerInput.cast(index)
        if index.input_id is None:
            index.input_id = torch.arange(index.row.numel())
        input_id = index.input_id
        num_nodes: Any = self.graphs.num_nodes
        node_time: Any = self.graphs.node_time
        if not self.graphs.is_hetero:
            kind = self.graphs.only_type[0]
            num_nodes, node_time = num_nodes[kind], node_time.get(kind)
        # PyG draws negatives from the global generator; here they must not depend on what ran before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch_key(input_id, self.epoch) ^ (self.seed & MASK) & MASK >> 1)
            out = edge_sample(
                index,
                lambda seeds, times: self._sample_inputs(seeds, times, input_id),
                num_nodes,
                self.disjoint,
                node_time if isinstance(node_time, Tensor) else node_time or None,
                NegativeSampling.cast(neg_sampling),
            )
        return self._finish(out)

    def _finish(self, out: SamplerOutput | HeteroSamplerOutput) -> SamplerOutput | HeteroSamplerOutput:
        if self.subgraph_type == SubgraphType.bidirectional:
            return out.to_bidirectional(keep_orig_edges=self.keep_orig_edges)
        return out

    def _sample_inputs(self, seeds: Any, times: Any, input_id: Tensor) -> SamplerOutput | HeteroSamplerOutput:
        key = batch_key(input_id, self.epoch)
        count = sum(s.numel() for s in seeds.values()) if isinstance(seeds, dict) else seeds.numel()
        keys = _keys_of_seeds(input_id, self.epoch, count) if self.disjoint else None
        if isinstance(seeds, dict):
            return self._from_typed_nodes(seeds, key=key, keys=keys, times=times)
        return self._from_nodes(seeds, key=key, keys=keys, time=times)

    def _from_nodes(
        self, node: Tensor, *, key: int, keys: list[int] | None, time: Tensor | None
    ) -> SamplerOutput:
        graphs, device = self.graphs, self._input_device
        self._check_nodes(node, graphs.only_type[0])
        node = node.to(device, torch.int64)
        if keys is None:
            keys, group = [key], torch.zeros_like(node)
        else:
            group = torch.arange(node.numel(), device=device)
        draws = Draws(
            streams_tensor(self.seed, keys).to(device),
            replace=self.replace,
            last=self.temporal_strategy == "last",
            group_time=graphs.seed_time(graphs.only_type[0], node, time) if self._temporal else None,
        )
        out = self._run(Frontier(node, group), draws)
        row, col, edge, nodes_per_hop, edges_per_hop = (
            out.row, out.col, out.edge, out.nodes_per_hop, out.edges_per_hop
        )  # fmt: skip
        if self.subgraph_type == SubgraphType.induced:
            sampled = Frontier(out.node, out.group)
            row, col, edge = graphs.induced(graphs.only_type, sampled, sampled)
            nodes_per_hop = edges_per_hop = None  # type: ignore[assignment]
        target = self._output_device
        return SamplerOutput(
            node=out.node.to(target),
            row=row.to(target),
            col=col.to(target),
            edge=edge.to(target),
            batch=out.group.to(target) if self.disjoint else None,
            num_sampled_nodes=nodes_per_hop,
            num_sampled_edges=edges_per_hop,
        )

    def _run(self, seeds: Frontier, draws: Draws) -> Sampled:
        graph = self.graphs.graphs[self.graphs.only_type]
        fanouts = self._fanouts[self.graphs.only_type]
        if self.backend == "numba":
            from pyg_quiver.backends import numba_cpu

            return numba_cpu.sample(graph, seeds, fanouts, draws, num_threads=self.num_threads)
        if self.backend == "triton":
            from pyg_quiver.backends import triton_gpu

            return triton_gpu.sample(graph, seeds, fanouts, draws)
        return sample_one_type(self._hop_backend(), graph, seeds, fanouts, draws)

    def _from_typed_nodes(
        self, nodes: dict[str, Tensor], *, key: int, keys: list[int] | None, times: dict[str, Tensor] | None
    ) -> HeteroSamplerOutput:
        graphs, device = self.graphs, self.graphs.device
        seeds: dict[str, Frontier] = {}
        seed_times: list[Tensor] = []
        first = 0
        for kind, node in nodes.items():
            self._check_nodes(node, kind)
            ids = node.to(device, torch.int64)
            own_group = torch.arange(first, first + ids.numel(), device=device)
            first += ids.numel()
            seeds[kind] = Frontier(ids, torch.zeros_like(ids) if keys is None else own_group)
            time = graphs.seed_time(kind, ids, None if times is None else times[kind])
            seed_times += [] if time is None else [time]
        draws = {
            edge_type: Draws(
                streams_tensor(self.seed, keys or [key], t).to(device),
                replace=self.replace,
                last=self.temporal_strategy == "last",
                group_time=torch.cat(seed_times) if seed_times and graphs.has_time(edge_type) else None,
            )
            for t, edge_type in enumerate(sorted(graphs.graphs))
        }
        out = sample_types(
            self._hop_backend(), graphs.graphs, seeds,
            num_nodes=graphs.num_nodes, fanouts=self._fanouts, draws=draws,
        )  # fmt: skip
        return self._typed_output(out)

    def _typed_output(self, out: SampledTypes) -> HeteroSamplerOutput:
        target, induced = self._output_device, self.subgraph_type == SubgraphType.induced
        row, col, edge = out.row, out.col, out.edge
        if induced:
            sampled = {kind: Frontier(node, out.group[kind]) for kind, node in out.node.items()}
            row, col, edge = {}, {}, {}
            for kind in self.graphs.graphs:
                row[kind], col[kind], edge[kind] = self.graphs.induced(
                    kind, sampled[kind[2]], sampled[kind[0]]
                )
        return HeteroSamplerOutput(
            node={kind: node.to(target) for kind, node in out.node.items()},
            row={kind: part.to(target) for kind, part in row.items()},
            col={kind: part.to(target) for kind, part in col.items()},
            edge={kind: part.to(target) for kind, part in edge.items()},
            batch={kind: group.to(target) for kind, group in out.group.items()} if self.disjoint else None,
            num_sampled_nodes=None if induced else out.nodes_per_hop,
            num_sampled_edges=None if induced else out.edges_per_hop,
        )

    def _hop_backend(self) -> HopBackend:
        if self.backend == "numba":
            from pyg_quiver.backends.numba_cpu import NumbaBackend

            return NumbaBackend()
        if self.backend == "triton":
            from pyg_quiver.backends.triton_gpu import TritonBackend

            return TritonBackend()
        from pyg_quiver.backends.torch_ops import TorchBackend

        return TorchBackend()

    def _check_nodes(self, node: Tensor, kind: str) -> None:
        if node.dim() != 1 or node.dtype.is_floating_point or node.dtype == torch.bool:
            raise ValueError(f"nodes are {node.dtype} {tuple(node.shape)}; they must be integers, [n]")
        if node.device.type != "cpu" or node.numel() == 0:  # reading device memory would wait for the device
            return
        limit = self.graphs.num_nodes[kind]
        low, high = (int(bound) for bound in torch.aminmax(node))
        if low < 0 or high >= limit:
            raise IndexError(f"node {low if low < 0 else high} is out of range [0, {limit})")


def _check_fanouts(values: Sequence[int] | dict[Any, Sequence[int]]) -> None:
    by_type = values.items() if isinstance(values, dict) else [(None, values)]
    for kind, fanouts in by_type:
        where = "num_neighbors" if kind is None else f"num_neighbors[{kind!r}]"
        for hop, fanout in enumerate(fanouts):
            if not isinstance(fanout, Integral) or fanout < -1:
                raise ValueError(f"{where}[{hop}] is {fanout!r}; it must be -1 (all) or more")


def _keys_of_seeds(input_id: Tensor, epoch: int, count: int) -> list[int]:
    """Keys of ``count`` seeds; link batches have several seeds for each position of the input."""
    keys = seed_keys(input_id, epoch)
    return [(keys[i % len(keys)] + (i // len(keys)) * GOLDEN) & MASK for i in range(count)]


def _resolve_mode(mode: str, device: torch.device) -> Literal["cpu", "gpu", "uva"]:
    if mode not in ("auto", "cpu", "gpu", "uva"):
        raise ValueError(f"mode is {mode!r}; it must be 'auto', 'cpu', 'gpu' or 'uva'")
    if mode == "auto":
        return "gpu" if device.type == "cuda" else "cpu"
    if mode in ("gpu", "uva") and not torch.cuda.is_available():
        raise RuntimeError(f"mode={mode!r} needs a CUDA device; use mode='cpu' on this machine")
    return mode  # type: ignore[return-value]


def _resolve_backend(backend: str, mode: str) -> Literal["numba", "torch", "triton"]:
    if backend not in ("auto", "numba", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; it must be 'auto', 'numba', 'torch' or 'triton'")
    compiled = "numba" if mode == "cpu" else "triton"
    installed = importlib.util.find_spec(compiled if backend in ("auto", "torch") else backend) is not None
    if backend == "auto":
        if not installed:
            warnings.warn(
                f"{compiled} is not installed: sampling with torch operations, about 3 times slower on a CPU "
                f"(pip install {compiled})",
                RuntimeWarning,
                stacklevel=3,
            )
        return compiled if installed else "torch"  # type: ignore[return-value]
    if backend == "numba" and mode != "cpu":
        raise ValueError(f"backend='numba' samples on the CPU; mode={mode!r} needs 'triton' or 'torch'")
    if backend != "torch" and not installed:
        raise ImportError(f"backend={backend!r} needs {backend}: pip install {backend}")
    return backend  # type: ignore[return-value]

"""The graph in compressed sparse columns, wherever it lies: memory, pinned memory, a GPU, a mapped file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data, EdgeAttr, FeatureStore, GraphStore, HeteroData
from torch_geometric.data.graph_store import EdgeLayout

from pyg_quiver.host_memory import empty_on_host

_FORMAT = "pyg_quiver.topology/1"
_FINGERPRINT_SAMPLES = 1 << 20


class CSCTopology(GraphStore):
    """In-neighbours of every node: those of v are ``row[colptr[v] : colptr[v + 1]]``.

    It is a PyG ``GraphStore`` of one edge type, so ``(features, topology)`` can be given to a loader as data.

    Args:
        colptr: int64 ``[N + 1]``, non-decreasing from 0.
        row: int32 or int64 ``[E]``, source nodes.
        edge_permutation: int64 ``[E]``, original number of the edge at each position.
        num_src_nodes: nodes that ``row`` may name; N when absent.

    Raises:
        ValueError: arrays that do not fit each other, decreasing ``colptr``, ``row`` out of range.
    """

    def __init__(
        self,
        colptr: Tensor,
        row: Tensor,
        *,
        edge_permutation: Tensor | None = None,
        num_src_nodes: int | None = None,
    ) -> None:
        super().__init__()
        nodes = colptr.numel() - 1
        self.num_src_nodes = nodes if num_src_nodes is None else num_src_nodes
        _check(colptr, row, edge_permutation, self.num_src_nodes)
        self.colptr = colptr
        self.row = row
        self.edge_permutation = edge_permutation

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        num_nodes: int | tuple[int, int] | None = None,
        *,
        index_dtype: torch.dtype | None = None,
        order: Tensor | None = None,
    ) -> CSCTopology:
        """Sort edges by target; edges of one target keep their order.

        Args:
            edge_index: int64 ``[2, E]``, source to target.
            num_nodes: nodes, or (source nodes, target nodes); one more than the largest id when absent.
            index_dtype: dtype of ``row``; int32 halves the memory of graphs below 2**31 nodes.
            order: ``[E]``, by which edges of one target are sorted first (their time, say).
        """
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index is {tuple(edge_index.shape)}; it must be [2, E]")
        if edge_index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"edge_index is {edge_index.dtype}; it must be int64")
        source, target = edge_index[0], edge_index[1]
        if num_nodes is None:
            num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
        sources, targets = (num_nodes, num_nodes) if isinstance(num_nodes, int) else num_nodes
        for name, ids, limit in (("source", source, sources), ("target", target, targets)):
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= limit):
                bad = int(ids[(ids < 0) | (ids >= limit)][0])
                raise ValueError(f"edge_index has {name} {bad}, which is out of range [0, {limit})")
        if order is None:
            permutation = torch.argsort(target, stable=True)
        else:
            by_order = torch.argsort(order, stable=True)
            permutation = by_order[torch.argsort(target[by_order], stable=True)]
        colptr = _empty((targets + 1,), torch.int64, target.device)
        colptr[:1] = 0
        torch.cumsum(torch.bincount(target, minlength=targets), 0, out=colptr[1:])
        row = _empty((permutation.numel(),), index_dtype or torch.int64, target.device)
        row.copy_(source[permutation])
        return cls(colptr, row, edge_permutation=permutation, num_src_nodes=sources)

    def sorted_by(self, node_value: Tensor) -> CSCTopology:
        """The same edges; those of each target by a value of their source, ``[num_src_nodes]``."""
        target = torch.repeat_interleave(torch.arange(self.num_nodes, device=self.device), self.in_degree())
        by_value = torch.argsort(node_value.to(self.device)[self.row.long()], stable=True)
        order = by_value[torch.argsort(target[by_value], stable=True)]
        permutation = order if self.edge_permutation is None else self.edge_permutation[order]
        row = _empty((order.numel(),), self.row.dtype, self.device)
        torch.index_select(self.row, 0, order, out=row)
        return CSCTopology(self.colptr, row, edge_permutation=permutation, num_src_nodes=self.num_src_nodes)

    @staticmethod
    def from_data(
        data: Data | HeteroData | tuple[FeatureStore, GraphStore],
    ) -> CSCTopology | dict[tuple[str, str, str], CSCTopology]:
        """The topology of PyG data; of heterogeneous data one for each edge type."""
        if isinstance(data, HeteroData):
            return {kind: CSCTopology.from_store(data[kind], data[kind].size()) for kind in data.edge_types}
        if isinstance(data, Data):
            return CSCTopology.from_store(data, data.size())
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], GraphStore):
            return _from_graph_store(data[1])
        raise ValueError(
            f"data is {type(data).__name__}; it must be Data, HeteroData or (FeatureStore, GraphStore)"
        )

    @classmethod
    def from_store(cls, store: Any, size: tuple[int | None, int | None]) -> CSCTopology:
        """The topology of one edge type of PyG data.

        Args:
            store: holds ``edge_index``, or a sparse matrix ``adj_t`` (targets in rows) or ``adj``.
            size: source and target nodes.
        """
        sources, targets = size
        if "edge_index" in store:
            known = None if sources is None or targets is None else (sources, targets)
            return cls.from_edge_index(store.edge_index, known)
        if "adj_t" in store:
            colptr, row = _compressed_rows(store.adj_t)
            return cls(colptr, row, num_src_nodes=store.adj_t.size(1))
        if "adj" in store:
            colptr, row = _compressed_rows(store.adj.t())
            return cls(colptr, row, num_src_nodes=store.adj.size(0))
        return cls.from_edge_index(torch.empty(2, 0, dtype=torch.int64), (sources or 0, targets or 0))

    @property
    def num_nodes(self) -> int:
        """Target nodes."""
        return self.colptr.numel() - 1

    @property
    def num_edges(self) -> int:
        """Edges."""
        return self.row.numel()

    @property
    def device(self) -> torch.device:
        """Where the arrays lie."""
        return self.row.device

    def in_degree(self) -> Tensor:
        """In-degree of every node, int64 ``[N]``."""
        return self.colptr[1:] - self.colptr[:-1]

    def to(self, device: torch.device | str) -> CSCTopology:
        """A copy on a device."""
        return self._with(lambda tensor: tensor.to(device))

    def pin_memory(self) -> CSCTopology:
        """A copy in pinned memory, which a GPU can sample in place (mode "uva")."""
        return self._with(lambda tensor: tensor.pin_memory())

    def share_memory_(self) -> CSCTopology:
        """Move the arrays to shared memory, for workers that are not forked."""
        for tensor in (self.colptr, self.row, self.edge_permutation):
            if tensor is not None:
                tensor.share_memory_()
        return self

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell graphs apart: sizes, sums and evenly spaced entries."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"{self.num_nodes} {self.num_src_nodes} {self.num_edges}".encode())
        for tensor in (self.colptr, self.row):
            step = max(tensor.numel() // _FINGERPRINT_SAMPLES, 1)
            digest.update(tensor[::step].to("cpu", torch.int64).numpy().tobytes())
            digest.update(str(int(tensor.sum(dtype=torch.int64))).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the arrays as ``.npy`` files with a JSON header into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / "colptr.npy", self.colptr.cpu().numpy())
        np.save(path / "row.npy", self.row.cpu().numpy())
        if self.edge_permutation is not None:
            np.save(path / "edge_permutation.npy", self.edge_permutation.cpu().numpy())
        header = {
            "format": _FORMAT,
            "num_src_nodes": self.num_src_nodes,
            "edge_permutation": self.edge_permutation is not None,
        }
        (path / "topology.json").write_text(json.dumps(header, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, mmap: bool = True) -> CSCTopology:
        """Read what :meth:`save` wrote; with ``mmap`` the arrays are mapped copy-on-write.

        Raises:
            ValueError: the folder holds another format.
        """
        path = Path(folder)
        header = json.loads((path / "topology.json").read_text())
        if header.get("format") != _FORMAT:
            raise ValueError(f"{path}: format {header.get('format')!r}, expected {_FORMAT!r}")

        def read(name: str) -> Tensor:
            array = np.load(path / f"{name}.npy", mmap_mode="c" if mmap else None, allow_pickle=False)
            return torch.from_numpy(array)

        permutation = read("edge_permutation") if header["edge_permutation"] else None
        return cls(
            read("colptr"), read("row"), edge_permutation=permutation, num_src_nodes=header["num_src_nodes"]
        )

    def _with(self, move: Any) -> CSCTopology:
        moved = object.__new__(CSCTopology)
        GraphStore.__init__(moved)
        moved.num_src_nodes = self.num_src_nodes
        moved.colptr, moved.row = move(self.colptr), move(self.row)
        moved.edge_permutation = None if self.edge_permutation is None else move(self.edge_permutation)
        return moved

    # PyG's GraphStore contract.

    def _put_edge_index(self, edge_index: Any, edge_attr: EdgeAttr) -> bool:
        raise NotImplementedError("a CSCTopology does not change: make a new one with from_edge_index")

    def _remove_edge_index(self, edge_attr: EdgeAttr) -> bool:
        raise NotImplementedError("a CSCTopology does not change: make a new one with from_edge_index")

    def _get_edge_index(self, edge_attr: EdgeAttr) -> tuple[Tensor, Tensor] | None:
        if edge_attr.edge_type is not None or edge_attr.layout != EdgeLayout.CSC:
            return None
        return self.row, self.colptr

    def get_all_edge_attrs(self) -> list[EdgeAttr]:
        """The one edge type of this store, in CSC."""
        return [EdgeAttr(None, EdgeLayout.CSC, is_sorted=True, size=(self.num_src_nodes, self.num_nodes))]

    def __repr__(self) -> str:
        return f"CSCTopology(num_nodes={self.num_nodes}, num_edges={self.num_edges}, device='{self.device}')"


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return empty_on_host(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _check(colptr: Tensor, row: Tensor, permutation: Tensor | None, num_src_nodes: int) -> None:
    if colptr.dtype != torch.int64 or colptr.dim() != 1 or colptr.numel() < 1:
        raise ValueError(f"colptr is {colptr.dtype} {tuple(colptr.shape)}; it must be int64 [N + 1]")
    if row.dtype not in (torch.int32, torch.int64) or row.dim() != 1:
        raise ValueError(f"row is {row.dtype} {tuple(row.shape)}; it must be int32 or int64 [E]")
    if colptr.device != row.device:
        raise ValueError(f"colptr is on {colptr.device}, row on {row.device}")
    falls = (colptr[1:] < colptr[:-1]).nonzero()
    if falls.numel():
        i = int(falls[0, 0])
        raise ValueError(
            f"colptr must be non-decreasing, "
            f"but colptr[{i}]={int(colptr[i])} > colptr[{i + 1}]={int(colptr[i + 1])}"
        )
    if int(colptr[0]) != 0 or int(colptr[-1]) != row.numel():
        raise ValueError(
            f"colptr must go from 0 to {row.numel()} (the edges in row), "
            f"got {int(colptr[0])} to {int(colptr[-1])}"
        )
    if row.numel():
        low, high = (int(bound) for bound in torch.aminmax(row))
        if low < 0 or high >= num_src_nodes:
            raise ValueError(f"row names node {low if low < 0 else high}, out of range [0, {num_src_nodes})")
    if permutation is not None and (permutation.dtype != torch.int64 or permutation.shape != row.shape):
        raise ValueError(
            f"edge_permutation is {permutation.dtype} {tuple(permutation.shape)}; "
            f"it must be int64 [{row.numel()}]"
        )


def _compressed_rows(matrix: Any) -> tuple[Tensor, Tensor]:
    if isinstance(matrix, Tensor):
        matrix = matrix.to_sparse_csr()
        return matrix.crow_indices().long(), matrix.col_indices().long()
    pointer, column, _ = matrix.csr()  # torch_sparse.SparseTensor
    return pointer, column


def _from_graph_store(store: GraphStore) -> CSCTopology | dict[tuple[str, str, str], CSCTopology]:
    if isinstance(store, CSCTopology):
        return store
    sizes = {attr.edge_type: attr.size for attr in store.get_all_edge_attrs()}
    rows, colptrs, permutations = store.csc()
    if not isinstance(rows, dict):
        size = next(iter(sizes.values()))
        sources = int(rows.max()) + 1 if size is None or size[0] is None else size[0]
        return CSCTopology(
            colptrs, rows, edge_permutation=permutations, num_src_nodes=max(sources, colptrs.numel() - 1)
        )
    return {
        kind: CSCTopology(
            colptrs[kind],
            row,
            edge_permutation=(permutations or {}).get(kind),
            num_src_nodes=int(row.max()) + 1 if sizes[kind] is None else sizes[kind][0],
        )
        for kind, row in rows.items()
    }

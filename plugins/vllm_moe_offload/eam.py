"""Expert activation matrices (EAM): one for each live request, and a bounded collection of finished ones.

MoE-Infinity (arXiv 2401.14361): ``EAM[l, e]`` counts the (token, top-k choice) pairs of a request that were
routed to expert ``e`` of layer ``l``.
"""

from __future__ import annotations

import os
import zipfile

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.npz import save_npz

Matrix = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


class EAMTracer:
    """Matrices of the live requests."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self._matrices: dict[str, Matrix] = {}

    @property
    def live(self) -> tuple[str, ...]:
        """Requests that have a matrix."""
        return tuple(self._matrices)

    def record(self, request_id: str, layer: int, expert_ids: npt.NDArray[np.integer]) -> None:
        """Count choices of a request at a layer; ``expert_ids`` may have any shape.

        Raises:
            IndexError: no such layer or expert; nothing is counted then.
        """
        ids = np.asarray(expert_ids).reshape(-1)
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"trace: layer {layer} of {self.num_layers}")
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.num_experts):
            raise IndexError(f"trace: expert ids {ids.min()}..{ids.max()} of {self.num_experts}")
        self._live(request_id)[layer] += np.bincount(ids, minlength=self.num_experts)

    def record_step(self, request_id: str, expert_ids: npt.NDArray[np.integer]) -> None:
        """Count choices of a request at all layers; ``expert_ids`` is ``[tokens, layers, top_k]``.

        Raises:
            ValueError: another number of layers.
            IndexError: no such expert; nothing is counted then.
        """
        ids = np.asarray(expert_ids)
        if ids.ndim != 3 or ids.shape[1] != self.num_layers:
            raise ValueError(f"trace: expert_ids must be [tokens, {self.num_layers}, top_k], got {ids.shape}")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.num_experts):
            raise IndexError(f"trace: expert ids {ids.min()}..{ids.max()} of {self.num_experts}")
        keys = ids + np.arange(0, self.num_layers * self.num_experts, self.num_experts)[:, None]
        np.add.at(self._live(request_id).reshape(-1), keys.reshape(-1), 1)

    def choices(self, request_id: str) -> int:
        """Choices counted so far at the first layer; KeyError if the request is not live."""
        return int(self._matrices[request_id][0].sum())

    def _live(self, request_id: str) -> Matrix:
        matrix = self._matrices.get(request_id)
        if matrix is None:
            matrix = self._matrices[request_id] = np.zeros((self.num_layers, self.num_experts), np.int64)
        return matrix

    def matrix(self, request_id: str) -> Matrix:
        """The matrix so far, int64 ``[layers, experts]``; KeyError if the request is not live."""
        return self._matrices[request_id].copy()

    def finish(self, request_id: str) -> Matrix:
        """The final matrix; the request is forgotten. KeyError if it is not live."""
        return self._matrices.pop(request_id)

    def discard(self, request_id: str) -> None:
        """Forget an aborted or preempted request; an unknown one is ignored."""
        self._matrices.pop(request_id, None)


def eam_distance(observed: Matrix, stored: Matrix) -> float:
    """``1 - mean_l cos(observed[l], stored[l])`` over the layers with counts in ``observed``.

    A zero row of ``stored`` there has cosine 0; with nothing observed the distance is 1.
    """
    layers = observed.any(axis=1)
    if not layers.any():
        return 1.0
    a, b = observed[layers].astype(np.float64), stored[layers].astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = (a * b).sum(axis=1)
    return float(1.0 - np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).mean())


class EAMCollection:
    """At most ``capacity`` matrices of finished requests.

    When it is full, the non-persistent entry least often nearest to a query is replaced, the oldest of
    equals. Rows are normalised once, when an entry is added, and kept by (layer, expert), so that a query
    reads only the experts it has used.

    Attributes:
        model_id: the model whose requests these were, if known; kept in the file.
    """

    def __init__(self, num_layers: int, num_experts: int, capacity: int = 1000) -> None:
        if capacity < 1:
            raise ValueError(f"EAM collection: capacity must be at least 1, got {capacity}")
        self.num_layers, self.num_experts, self.capacity = num_layers, num_experts, capacity
        self.model_id = ""
        self._len = 0
        self._matrices = np.zeros((0, num_layers, num_experts), dtype=np.int64)
        self._unit = np.zeros((num_layers * num_experts, 0))
        self._persistent = np.zeros(0, dtype=bool)
        self._nearest = np.zeros(0, dtype=np.int64)  # how often an entry was nearest
        self._added = np.zeros(0, dtype=np.int64)
        self._choices = 0  # at the first layers of all entries
        self._clock = 0

    def __len__(self) -> int:
        return self._len

    @property
    def matrices(self) -> Matrix:
        """int64 ``[len, layers, experts]``; a read-only view."""
        view = self._matrices[: self._len]
        view.flags.writeable = False
        return view

    @property
    def mean_choices(self) -> float:
        """Mean count of a request's first layer; 0 for an empty collection."""
        return self._choices / self._len if self._len else 0.0

    def add(self, eam: Matrix, *, persistent: bool = False) -> int:
        """Store a matrix and return the index it was written to.

        Raises:
            ValueError: another shape, or full of persistent entries.
        """
        matrix = np.asarray(eam, dtype=np.int64)
        if matrix.shape != (self.num_layers, self.num_experts):
            raise ValueError(
                f"EAM collection holds [{self.num_layers}, {self.num_experts}] matrices, got {matrix.shape}"
            )
        index = self._place()
        self._choices += int(matrix[0].sum()) - int(self._matrices[index, 0].sum())
        self._matrices[index] = matrix
        self._unit[:, index] = _unit_rows(matrix).reshape(-1)
        self._persistent[index], self._nearest[index], self._added[index] = persistent, 0, self._clock
        self._clock += 1
        return index

    def distances(self, observed: Matrix) -> Shares:
        """:func:`eam_distance` to each entry, float64 ``[len]``; notes which entry was nearest."""
        matrix = np.asarray(observed)
        layers = int(matrix.any(axis=1).sum())
        if not layers:
            return np.ones(self._len)
        unit = _unit_rows(matrix).reshape(-1)
        used = np.flatnonzero(unit)
        # Beyond a third of the rows, picking them costs more than reading all.
        known = self._unit if 3 * len(used) > len(unit) else self._unit[used]
        distances = 1.0 - ((unit if known is self._unit else unit[used]) @ known)[: self._len] / layers
        if self._len:
            self._nearest[int(distances.argmin())] += 1
        return distances

    def _place(self) -> int:
        """Index for a new entry: the next free one, or that of the entry which is replaced."""
        if self._len == self.capacity:
            free = np.flatnonzero(~self._persistent)
            if not len(free):
                raise ValueError(f"EAM collection is full of persistent entries (capacity {self.capacity})")
            return int(free[np.lexsort((self._added[free], self._nearest[free]))[0]])
        if self._len == len(self._matrices):
            self._resize(min(max(2 * self._len, 8), self.capacity))
        self._len += 1
        return self._len - 1

    def _resize(self, room: int) -> None:
        more = room - len(self._matrices)
        self._matrices = np.pad(self._matrices, ((0, more), (0, 0), (0, 0)))
        self._unit = np.pad(self._unit, ((0, 0), (0, more)))
        self._persistent, self._nearest, self._added = (
            np.pad(array, (0, more)) for array in (self._persistent, self._nearest, self._added)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz``; a file already there is replaced only by a complete one."""
        save_npz(
            path,
            matrices=self._matrices[: self._len],
            persistent=self._persistent[: self._len],
            nearest=self._nearest[: self._len],
            added=self._added[: self._len],
            capacity=np.int64(self.capacity),
            model_id=np.str_(self.model_id),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EAMCollection:
        """Read what :meth:`save` wrote, exactly. No pickle is ever read.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no EAM collection.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                matrices = file["matrices"]
                _, layers, experts = matrices.shape
                collection = cls(layers, experts, int(file["capacity"]))
                collection._matrices = matrices.astype(np.int64)
                collection._unit = np.ascontiguousarray(_unit_rows(matrices).reshape(len(matrices), -1).T)
                collection._len = len(matrices)
                collection._choices = int(matrices[:, 0].sum())
                collection._persistent = file["persistent"].astype(bool)
                collection._nearest = file["nearest"].astype(np.int64)
                collection._added = file["added"].astype(np.int64)
                collection.model_id = str(file["model_id"]) if "model_id" in file else ""
                if {len(collection._persistent), len(collection._nearest), len(collection._added)} != {
                    len(matrices)
                }:
                    raise ValueError("its arrays have different lengths")
        except (KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{path} is no EAM collection: {error}") from error
        collection._clock = int(collection._added.max(initial=-1)) + 1
        return collection


def _unit_rows(matrix: npt.NDArray[np.integer]) -> Shares:
    """Rows scaled to length 1; zero rows stay zero."""
    rows = matrix.astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)

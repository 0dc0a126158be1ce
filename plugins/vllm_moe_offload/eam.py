"""Expert activation matrices (EAM): one for each live request, and a bounded collection of finished ones.

MoE-Infinity (arXiv 2401.14361): ``EAM[l, e]`` counts the (token, top-k choice) pairs of a request that were
routed to expert ``e`` of layer ``l``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_moe_offload.npz import save_npz

Matrix = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

_EXACT = 2**24  # whole numbers below it are exact in single precision


class EAMTracer:
    """Matrices of the live requests."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self._matrices: dict[str, Matrix] = {}
        self._choices: dict[str, int] = {}  # at the first layer
        self._first_key = np.arange(num_layers)[:, None] * num_experts

    def __len__(self) -> int:
        return len(self._matrices)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._matrices

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
        if len(ids) and ids.min() < 0:
            raise IndexError(f"trace: expert id {ids.min()} of {self.num_experts}")
        counts = np.bincount(ids, minlength=self.num_experts)
        if len(counts) > self.num_experts:
            raise IndexError(f"trace: expert id {len(counts) - 1} of {self.num_experts}")
        self._live(request_id)[layer] += counts
        self._choices[request_id] += len(ids) * (layer == 0)

    def record_step(self, rows: Sequence[tuple[str, slice]], expert_ids: npt.NDArray[np.integer]) -> None:
        """Count the choices of a step at all layers.

        Args:
            rows: the requests of the step, each with its tokens.
            expert_ids: ``[tokens, layers, top_k]``.

        Raises:
            ValueError: another number of layers.
            IndexError: no such expert; nothing is counted then.
        """
        ids = np.asarray(expert_ids)
        if ids.ndim != 3 or ids.shape[1] != self.num_layers:
            raise ValueError(f"trace: expert_ids must be [tokens, {self.num_layers}, top_k], got {ids.shape}")
        self._check(ids)
        keys = ids + self._first_key
        for request, part in rows:
            np.add.at(self._live(request).reshape(-1), keys[part].reshape(-1), 1)
            self._choices[request] += keys[part, 0].size

    def choices(self, request_id: str) -> int:
        """Choices counted so far at the first layer; KeyError if the request is not live."""
        return self._choices[request_id]

    def _check(self, ids: npt.NDArray[np.integer]) -> None:
        if ids.size and not (ids.min() >= 0 and ids.max() < self.num_experts):
            raise IndexError(f"trace: expert ids {ids.min()}..{ids.max()} of {self.num_experts}")

    def _live(self, request_id: str) -> Matrix:
        matrix = self._matrices.get(request_id)
        if matrix is None:
            matrix = self._matrices[request_id] = np.zeros((self.num_layers, self.num_experts), np.int64)
            self._choices[request_id] = 0
        return matrix

    def matrix(self, request_id: str) -> Matrix:
        """The matrix so far, int64 ``[layers, experts]``; KeyError if the request is not live."""
        return self._matrices[request_id].copy()

    def finish(self, request_id: str) -> Matrix:
        """The final matrix; the request is forgotten. KeyError if it is not live."""
        del self._choices[request_id]
        return self._matrices.pop(request_id)

    def discard(self, request_id: str) -> None:
        """Forget an aborted or preempted request; an unknown one is ignored."""
        self._matrices.pop(request_id, None)
        self._choices.pop(request_id, None)


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
    equals. Kept twice: counts by (layer, expert), so that a query reads only the experts it has used, and
    shares by entry.

    Attributes:
        model_id: the model whose requests these were, if known; kept in the file.
    """

    def __init__(self, num_layers: int, num_experts: int, capacity: int = 1000) -> None:
        if capacity < 1:
            raise ValueError(f"EAM collection: capacity must be at least 1, got {capacity}")
        self.num_layers, self.num_experts, self.capacity = num_layers, num_experts, capacity
        self.model_id = ""
        self._len = 0
        self._counts = np.zeros((num_layers * num_experts, 0), dtype=np.float32)
        self._norms = np.zeros((num_layers, 0))  # lengths of rows
        self._choices = np.zeros(0, dtype=np.int64)  # at the first layer
        self._shares = np.zeros((0, num_layers, num_experts))
        self._persistent = np.zeros(0, dtype=bool)
        self._nearest = np.zeros(0, dtype=np.int64)  # how often an entry was nearest
        self._added = np.zeros(0, dtype=np.int64)  # when an entry was added
        self._clock = 0

    def __len__(self) -> int:
        return self._len

    @property
    def matrices(self) -> Matrix:
        """int64 ``[len, layers, experts]``, a copy."""
        counts = self._counts[:, : self._len].T.astype(np.int64)
        return counts.reshape(-1, self.num_layers, self.num_experts)

    @property
    def mean_choices(self) -> float:
        """Mean count of a request's first layer; 0 for an empty collection."""
        return int(self._choices[: self._len].sum()) / self._len if self._len else 0.0

    def add(self, eam: Matrix, *, persistent: bool = False) -> int:
        """Store a matrix and return the index it was written to.

        Raises:
            ValueError: another shape, counts that cannot be, or full of persistent entries.
        """
        matrix = np.asarray(eam, dtype=np.int64)
        if matrix.shape != (self.num_layers, self.num_experts):
            raise ValueError(
                f"EAM collection holds [{self.num_layers}, {self.num_experts}] matrices, got {matrix.shape}"
            )
        if not (matrix.min(initial=0) >= 0 and matrix.max(initial=0) < _EXACT):
            raise ValueError(
                f"EAM collection: counts must be in [0, {_EXACT}), found {matrix.min()}..{matrix.max()}"
            )
        index = self._place()
        self._counts[:, index] = matrix.reshape(-1)
        self._norms[:, index] = _norms(matrix)
        self._choices[index] = matrix[0].sum()
        self._shares[index] = row_shares(matrix)
        self._persistent[index], self._nearest[index], self._added[index] = persistent, 0, self._clock
        self._clock += 1
        return index

    def distances(self, observed: Matrix) -> Shares:
        """:func:`eam_distance` to each entry, float64 ``[len]``; notes which entry was nearest."""
        matrix = np.asarray(observed)
        norms = _norms(matrix)
        layers = np.flatnonzero(norms)
        if not self._len or not len(layers):
            return np.ones(self._len)
        lengths = norms[layers, None] * self._norms[layers, : self._len]
        products = self._products(matrix, layers, exact=lengths.max() < _EXACT)
        cosines = np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        distances = 1.0 - cosines.sum(axis=0) / len(layers)
        self._nearest[int(distances.argmin())] += 1
        return distances

    def _products(
        self, matrix: Matrix, layers: npt.NDArray[np.intp], *, exact: bool
    ) -> npt.NDArray[np.floating[Any]]:
        """Products of each of the layers' rows with those of all entries, ``[len(layers), len]``.

        They are sums of integers. Where all fit the mantissa (``exact``; no partial sum exceeds the product
        of the rows' lengths) single precision gives them exactly, in half the time.
        """
        used = np.flatnonzero(matrix)
        counts = torch.from_numpy(self._counts)
        weights = torch.from_numpy(matrix.reshape(-1)[used].astype(np.float32))
        rows = torch.from_numpy(used)
        if not exact:
            counts, weights, rows = counts[rows].double(), weights.double(), torch.arange(len(used))
        starts = np.searchsorted(used, layers * self.num_experts)
        # The rows of a layer's experts, weighted by the observed counts and summed, are its products.
        bags = torch.nn.functional.embedding_bag(
            rows, counts, torch.from_numpy(starts), mode="sum", per_sample_weights=weights
        )
        return bags.numpy()[:, : self._len]

    def mean_shares(self, entries: npt.NDArray[np.integer], weights: Shares) -> Shares:
        """``sum_i weights[i] * rownormalise(matrices[entries[i]])``, float64 ``[layers, experts]``.

        A zero row counts as a uniform one.
        """
        total = np.zeros((self.num_layers, self.num_experts))
        part = np.empty_like(total)
        # One entry at a time stays in the processor's cache.
        for entry, weight in zip(entries, weights, strict=True):
            np.multiply(self._shares[entry], weight, out=part)
            total += part
        return total

    def _place(self) -> int:
        """Index for a new entry: the next free one, or that of the entry which is replaced."""
        if self._len == self.capacity:
            free = np.flatnonzero(~self._persistent)
            if not len(free):
                raise ValueError(f"EAM collection is full of persistent entries (capacity {self.capacity})")
            return int(free[np.lexsort((self._added[free], self._nearest[free]))[0]])
        if self._len == len(self._shares):
            self._resize(min(max(2 * self._len, 8), self.capacity))
        self._len += 1
        return self._len - 1

    def _resize(self, room: int) -> None:
        more = room - len(self._shares)
        self._counts = np.pad(self._counts, ((0, 0), (0, more)))
        self._norms = np.pad(self._norms, ((0, 0), (0, more)))
        self._shares = np.pad(self._shares, ((0, more), (0, 0), (0, 0)))
        self._choices, self._persistent, self._nearest, self._added = (
            np.pad(array, (0, more))
            for array in (self._choices, self._persistent, self._nearest, self._added)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz``; a file already there is replaced only by a complete one."""
        save_npz(
            path,
            matrices=self.matrices,
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
                matrices, capacity = file["matrices"], int(file["capacity"])
                uses = {name: file[name] for name in ("persistent", "nearest", "added")}
                model_id = str(file["model_id"]) if "model_id" in file else ""
            if {len(values) for values in uses.values()} != {len(matrices)}:
                raise ValueError("its arrays have different lengths")
            if len(matrices) > capacity:
                raise ValueError(f"it has {len(matrices)} entries and room for {capacity}")
            _, layers, experts = matrices.shape
            collection = cls(layers, experts, capacity)
            for matrix in matrices:
                collection.add(matrix)
            collection._persistent[: len(matrices)] = uses["persistent"]
            collection._nearest[: len(matrices)] = uses["nearest"]
            collection._added[: len(matrices)] = uses["added"]
        except (KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{path} is no EAM collection: {error}") from error
        collection.model_id = model_id
        collection._clock = int(uses["added"].max(initial=-1)) + 1
        return collection


def row_shares(matrices: npt.NDArray[Any]) -> Shares:
    """Counts ``[..., layers, experts]`` divided by their row sums; zero rows become uniform."""
    rows = matrices.astype(np.float64)
    sums = rows.sum(axis=-1, keepdims=True)
    if sums.all():
        rows /= sums
        return rows
    return np.where(sums > 0, rows / np.where(sums > 0, sums, 1), 1 / rows.shape[-1])


def _norms(matrix: Matrix) -> Shares:
    """Length of each row."""
    return np.linalg.norm(matrix.astype(np.float64), axis=-1)

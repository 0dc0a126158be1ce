"""Recorded routing: which experts each token of each request used, step by step."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.npz import save_npz


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of a run. Rows are tokens in the order in which the engine computed them.

    Attributes:
        expert_ids: int32 ``[tokens, layers, top_k]``.
        request: int32 ``[tokens]``, index into ``request_ids``.
        step: int32 ``[tokens]``, non-decreasing engine step.
        num_experts: experts of each layer.
        request_ids: names of the requests; default "0", "1", ...

    Raises:
        ValueError: arrays that do not fit each other, ids out of range, or steps that decrease.
    """

    expert_ids: npt.NDArray[np.int32]
    request: npt.NDArray[np.int32]
    step: npt.NDArray[np.int32]
    num_experts: int
    request_ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("expert_ids", "request", "step"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.int32))
        tokens = len(self.request)
        if self.expert_ids.ndim != 3 or len(self.expert_ids) != tokens or len(self.step) != tokens:
            raise ValueError(
                f"trace: expert_ids must be [tokens, layers, top_k] with one request and step a token, got "
                f"{self.expert_ids.shape}, {self.request.shape}, {self.step.shape}"
            )
        if self.request_ids is None:
            count = int(self.request.max()) + 1 if tokens else 0
            object.__setattr__(self, "request_ids", tuple(str(index) for index in range(count)))
        object.__setattr__(self, "request_ids", tuple(self.request_ids or ()))
        for name, limit in (("expert_ids", self.num_experts), ("request", len(self.request_ids or ()))):
            values = getattr(self, name)
            if values.size and not (values.min() >= 0 and values.max() < limit):
                raise ValueError(
                    f"trace: {name} must be in [0, {limit}), found {values.min()}..{values.max()}"
                )
        if np.any(np.diff(self.step) < 0):
            raise ValueError("trace: steps must not decrease")

    @property
    def num_layers(self) -> int:
        """MoE layers of the model."""
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        """Experts of each token at each layer."""
        return self.expert_ids.shape[2]

    def eam(self, request: int) -> npt.NDArray[np.int64]:
        """Expert activation matrix of one request, int64 ``[layers, experts]``."""
        return count_experts(self.expert_ids[self.request == request], self.num_experts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz``; a file already there is replaced only by a complete one."""
        save_npz(
            path,
            expert_ids=self.expert_ids,
            request=self.request,
            step=self.step,
            num_experts=np.int64(self.num_experts),
            request_ids=np.asarray(self.request_ids, dtype=np.str_),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Read what :meth:`save` wrote. No pickle is ever read.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no routing trace.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(
                    file["expert_ids"],
                    file["request"],
                    file["step"],
                    int(file["num_experts"]),
                    [str(name) for name in file["request_ids"]],
                )
        except (KeyError, EOFError, AttributeError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{path} is no routing trace: {error}") from error


def count_experts(expert_ids: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.int64]:
    """Choices of each expert, int64 ``[layers, experts]``, of ``expert_ids`` ``[tokens, layers, top_k]``."""
    layers = expert_ids.shape[1]
    keys = expert_ids.astype(np.int64) + np.arange(layers)[:, None] * num_experts
    return np.bincount(keys.reshape(-1), minlength=layers * num_experts).reshape(layers, num_experts)


def kept_experts(trace: RoutingTrace) -> float | None:
    """Share of a token's experts that its request's token before it used at the same layer; None without any.

    Random routing gives ``top_k / num_experts``; the more it is, the more any cache of recent experts hits.
    """
    shares = []
    for request in range(len(trace.request_ids or ())):
        ids = trace.expert_ids[trace.request == request]
        if len(ids) > 1:
            shares.append((ids[1:, :, :, None] == ids[:-1, :, None, :]).any(axis=3).reshape(-1))
    return float(np.concatenate(shares).mean()) if shares else None


class TraceRecorder:
    """Collects routing layer by layer while an engine runs."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self._shape = (num_layers, num_experts, top_k)
        self._names: dict[str, int] = {}
        self._steps: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int]] = []

    def record(
        self, step: int, layer: int, rows: Sequence[tuple[str, slice]], chosen: npt.NDArray[np.integer]
    ) -> None:
        """Record the choices ``[tokens, top_k]`` of one layer in one step; layers come in ascending order."""
        if not self._steps or self._steps[-1][2] != step:
            layers, _, top_k = self._shape
            request = np.empty(len(chosen), dtype=np.int32)
            for name, part in rows:
                request[part] = self._names.setdefault(name, len(self._names))
            self._steps.append((np.zeros((len(chosen), layers, top_k), np.int32), request, step))
        self._steps[-1][0][:, layer] = chosen

    def collect(self) -> RoutingTrace:
        """All that was recorded; begins anew."""
        layers, experts, top_k = self._shape
        steps, names = self._steps, self._names
        self._steps, self._names = [], {}
        steps = steps or [(np.zeros((0, layers, top_k), np.int32), np.zeros(0, np.int32), 0)]
        return RoutingTrace(
            np.concatenate([ids for ids, _, _ in steps]),
            np.concatenate([request for _, request, _ in steps]),
            np.concatenate([np.full(len(ids), number, np.int32) for ids, _, number in steps]),
            experts,
            list(names),
        )

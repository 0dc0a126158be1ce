"""Columns computed from others when a trajectory is committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from rl_replay_gear.spec import ColumnSpec


class Derived(ABC):
    """A column that the table computes. Subclasses are frozen dataclasses with a ``name``."""

    name: str
    registry: ClassVar[dict[str, type[Derived]]] = {}

    def __init_subclass__(cls) -> None:
        Derived.registry[cls.__name__] = cls

    @abstractmethod
    def column(self, given: Mapping[str, ColumnSpec]) -> ColumnSpec:
        """The specification of the column, from those of the written ones; KeyError if one is missing."""

    @abstractmethod
    def compute(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The column ``[n, *shape]`` of one trajectory of ``n`` steps."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the class under ``kind`` and its fields."""
        return {"kind": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Derived:
        """Inverse of ``to_dict``; ValueError for an unknown kind."""
        kind = Derived.registry.get(data["kind"])
        if kind is None:
            raise ValueError(f"derived column of unknown kind {data['kind']!r}; import its module first")
        return kind(**{key: value for key, value in data.items() if key != "kind"})


def _source(given: Mapping[str, ColumnSpec], name: str, needed_by: str) -> ColumnSpec:
    if name not in given:
        raise KeyError(
            f"derived column {needed_by!r} needs the column {name!r} (columns: {', '.join(given)})"
        )
    return given[name]


def discounted_suffix_sums(values: np.ndarray, gamma: float) -> np.ndarray:
    """``out[t] = sum_{k >= t} gamma^(k-t) values[k]`` in float64, along the first axis."""
    values = values.astype(np.float64)
    if gamma == 1.0:
        return np.cumsum(values[::-1], axis=0)[::-1]
    out = np.empty_like(values)
    running = np.zeros(values.shape[1:])
    for t in range(len(values) - 1, -1, -1):
        running = values[t] + gamma * running
        out[t] = running
    return out


@dataclass(frozen=True)
class ReturnsToGo(Derived):
    """``R_t = scale * sum_{k >= t} gamma^(k-t) r_k`` (Chen et al. 2021; gamma = 1 there).

    Summed in float64 and stored as float32 of the reward's shape.
    """

    name: str = "returns_to_go"
    reward: str = "rewards"
    gamma: float = 1.0
    scale: float = 1.0

    def column(self, given: Mapping[str, ColumnSpec]) -> ColumnSpec:
        """float32 of the reward's shape."""
        from rl_replay_gear.spec import ColumnSpec

        return ColumnSpec(self.name, _source(given, self.reward, self.name).shape)

    def compute(self, columns: Mapping[str, Tensor]) -> Tensor:
        """``[n, *reward shape]``."""
        sums = discounted_suffix_sums(columns[self.reward].numpy(), self.gamma)
        if self.scale != 1.0:
            sums = sums * self.scale
        return torch.from_numpy(sums.astype(np.float32))


@dataclass(frozen=True)
class NStepReturn(Derived):
    """``G_t = sum_{k=0}^{m-1} gamma^k r_{t+k}`` with ``m = min(steps, n - t)``, float32.

    The bootstrap of step ``t`` is at ``t + m``: multiply the value there by ``gamma^m``.
    """

    name: str = "n_step_return"
    reward: str = "rewards"
    gamma: float = 0.99
    steps: int = 3

    def column(self, given: Mapping[str, ColumnSpec]) -> ColumnSpec:
        """float32 of the reward's shape."""
        from rl_replay_gear.spec import ColumnSpec

        return ColumnSpec(self.name, _source(given, self.reward, self.name).shape)

    def compute(self, columns: Mapping[str, Tensor]) -> Tensor:
        """``[n, *reward shape]``."""
        reward = columns[self.reward].double()
        total = torch.zeros_like(reward)
        for k in range(min(self.steps, len(reward))):
            total[: len(reward) - k] += self.gamma**k * reward[k:]
        return total.float()


@dataclass(frozen=True)
class GeneralizedAdvantage(Derived):
    """GAE (Schulman et al. 2016, eq. 16): ``A_t = sum_l (gamma lam)^l delta_{t+l}``, float32.

    ``delta_t = r_t + gamma V_{t+1} - V_t``; the column ``value`` is final (``n + 1`` rows), its last row
    being the bootstrap value, 0 where the episode terminated. Shapes broadcast over agents.
    """

    name: str = "advantage"
    reward: str = "rewards"
    value: str = "values"
    gamma: float = 0.99
    lam: float = 0.95

    def column(self, given: Mapping[str, ColumnSpec]) -> ColumnSpec:
        """float32 of the reward's shape; ValueError when the value column is not final."""
        from rl_replay_gear.spec import ColumnSpec

        reward = _source(given, self.reward, self.name)
        value = _source(given, self.value, self.name)
        if not value.final or value.shape != reward.shape:
            raise ValueError(
                f"derived column {self.name!r}: {self.value!r} must be final and of shape {reward.shape}, "
                f"got final={value.final} and shape {value.shape}"
            )
        return ColumnSpec(self.name, reward.shape)

    def compute(self, columns: Mapping[str, Tensor]) -> Tensor:
        """``[n, *reward shape]``."""
        reward, value = columns[self.reward].double(), columns[self.value].double()
        delta = reward + self.gamma * value[1:] - value[:-1]
        return torch.from_numpy(discounted_suffix_sums(delta.numpy(), self.gamma * self.lam)).float()

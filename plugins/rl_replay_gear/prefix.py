"""Exact draws from many weights: a tree of float64 sums and the inverse of their cumulative sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear import loops

_FANOUT = {"cpu": 64, "cuda": 512}  # cpu: one scan is a few cache lines; cuda: three levels reach 1.3e8
_REBUILD_SHARE = 16  # more than 1/16 of the leaves touched: recompute whole levels


class PrefixSumTree:
    """Weights ``w_0 .. w_{capacity-1}`` (float64, all 0 at first) with draws in O(log capacity).

    ``draw(u)`` returns the smallest ``i`` with ``cumsum_i > u * total``, so an item of weight 0 is never
    drawn and, with a 53-bit ``u``, none is out of reach for lack of precision. Sums of touched blocks are
    recomputed from their children, never by difference, so they do not drift.

    Args:
        capacity: Number of leaves.
        device: Where the tree lives. On a CPU the loops are compiled by numba where it is installed; on CUDA
            they are Triton kernels; otherwise the torch twins below run.
    """

    def __init__(self, capacity: int, *, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"a tree needs at least one leaf, got capacity={capacity}")
        self.capacity = capacity
        self.device = torch.device(device)
        self.fanout = _FANOUT.get(self.device.type, 64)
        sizes = [capacity]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // self.fanout))
        if len(sizes) == 1:
            sizes.append(1)
        # Every level but the root is padded to whole blocks, so that a block's children lie side by side.
        padded = [-(-size // self.fanout) * self.fanout for size in sizes[:-1]] + [1]
        self._offsets = [0, *np.cumsum(padded)[:-1].tolist()]
        self._sizes = sizes
        total = sum(padded)
        self._values = torch.zeros(total, dtype=torch.float64, device=self.device)
        self._minima = torch.full(
            (total - self._offsets[1],), float("inf"), dtype=torch.float64, device=self.device
        )
        self._compiled = self.device.type == "cpu" and loops.COMPILED
        if self._compiled:
            self._values_np, self._minima_np = self._values.numpy(), self._minima.numpy()
            self._offsets_np = np.array(self._offsets, dtype=np.int64)

    @property
    def total(self) -> float:
        """Sum of the weights (waits for the device)."""
        return float(self._values[-1])

    @property
    def minimum(self) -> float:
        """Smallest positive weight, inf when there is none (waits for the device)."""
        return float(self._minima[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the tree."""
        return self._values.nbytes + self._minima.nbytes

    def weight(self, index: Tensor) -> Tensor:
        """Weights of the leaves ``index``: float64 of its shape."""
        return self._values[index]

    def update(self, index: Tensor, weight: Tensor) -> None:
        """Set ``w[index] = weight``; ``index`` int64 [m] unique, ``weight`` float64 [m], finite and >= 0.

        On the CPU a bad weight or index raises before anything changes; on CUDA that is the caller's duty,
        since checking would wait for the device.
        """
        if self.device.type == "cpu":
            self.update_array(index.numpy(), weight.numpy())
        elif index.numel() * _REBUILD_SHARE > self.capacity:
            self._values[index] = weight
            self._rebuild()
        elif self.device.type == "cuda" and index.numel():
            from rl_replay_gear import kernels

            kernels.tree_update(self._values, self._minima, self._offsets, self.fanout, index, weight)
        else:
            self._update_torch(index, weight)

    def update_array(self, index: np.ndarray, weight: np.ndarray) -> None:
        """``update`` of a tree on the CPU, for arrays."""
        bad = loops.first_bad_leaf(index, weight, self.capacity)
        if bad >= 0:
            if 0 <= index[bad] < self.capacity:
                raise ValueError(f"weights must be finite and >= 0; index {bad} is {float(weight[bad])}")
            raise IndexError(f"leaf {int(index[bad])} is outside 0..{self.capacity - 1}")
        if len(index) == 0:
            return
        if len(index) * _REBUILD_SHARE > self.capacity:
            self._values.numpy()[index] = weight
            self._rebuild()
        elif self._compiled:
            loops.tree_update(self._values_np, self._minima_np, self._offsets_np, self.fanout, index, weight)
        else:
            self._update_torch(torch.from_numpy(index), torch.from_numpy(weight))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves at the quantiles ``u``: float64 [k] in [0, 1) -> (int64 [k], their weights float64 [k]).

        On the CPU ValueError("no item has positive weight") when the total is 0; on CUDA leaf 0 is returned.
        """
        if self.device.type == "cpu" and not float(self._values[-1]) > 0.0:
            raise ValueError("no item has positive weight")
        if self._compiled:
            index, weight = np.empty(len(u), np.int64), np.empty(len(u), np.float64)
            loops.tree_draw(self._values_np, self._offsets_np, self.fanout, u.numpy(), index, weight)
            return torch.from_numpy(index), torch.from_numpy(weight)
        if self.device.type == "cuda":
            from rl_replay_gear import kernels

            return kernels.tree_draw(self._values, self._offsets, self.fanout, u)
        return self.draw_torch(u)

    def draw_torch(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The torch twin of ``draw``, on any device."""
        u = u.to(self.device)
        rest = u * self._values[-1]
        node = torch.zeros(len(u), dtype=torch.int64, device=self.device)
        child = torch.arange(self.fanout, device=self.device)
        for level in range(len(self._offsets) - 2, -1, -1):
            children = self._values[self._offsets[level] + node[:, None] * self.fanout + child]
            cumulative = children.cumsum(1)
            below = (cumulative <= rest[:, None]).sum(1)
            last = torch.where(children > 0, child, 0).amax(1)
            past = below > last
            chosen = torch.minimum(below, last)
            value = children.gather(1, chosen[:, None])[:, 0]
            before = cumulative.gather(1, chosen[:, None])[:, 0] - value
            rest = torch.where(past, value, rest - before)
            node = node * self.fanout + chosen
        return node, self._values[node]

    def _update_torch(self, index: Tensor, weight: Tensor) -> None:
        self._values[index] = weight
        child = torch.arange(self.fanout, device=self.device)
        node = index
        for level in range(1, len(self._offsets)):
            node = node // self.fanout
            positions = self._offsets[level - 1] + node[:, None] * self.fanout + child
            children = self._values[positions]
            low = self._minima[positions - self._offsets[1]] if level > 1 else children
            low = torch.where(children > 0, low, float("inf"))
            self._values[self._offsets[level] + node] = children.sum(1)
            self._minima[self._offsets[level] + node - self._offsets[1]] = low.amin(1)

    def _rebuild(self) -> None:
        if self._compiled:
            loops.tree_rebuild(self._values_np, self._minima_np, self._offsets_np, self.fanout)
            return
        for level in range(1, len(self._offsets)):
            below, size = self._offsets[level - 1], self._sizes[level]
            stop = below + size * self.fanout
            children = self._values[below:stop].view(size, self.fanout)
            low = children
            if level > 1:
                low = self._minima[below - self._offsets[1] : stop - self._offsets[1]].view(children.shape)
            smallest = torch.where(children > 0, low, float("inf")).amin(1)
            here = self._offsets[level]
            self._values[here : here + size] = children.sum(1)
            self._minima[here - self._offsets[1] : here - self._offsets[1] + size] = smallest

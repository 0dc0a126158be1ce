"""Collectives of a process group, on CPU tensors whatever its backend; failures name the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Communicator:
    """The processes of ``group`` (None: the default group, or this process alone where there is none).

    Attributes:
        rank, size: Of this process, and of the group.
        device: Where the backend's tensors lie: the current CUDA device for NCCL, else the CPU.
        step: What the caller is doing; part of the message when a peer is gone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        initialised = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if initialised else 0
        self.size = dist.get_world_size(group) if initialised else 1
        self.device = torch.device("cpu")
        if initialised and dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.step = "setting up"

    def sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over the processes."""
        if self.size == 1:
            return tensor
        there = tensor.to(self.device)
        with self._named():
            dist.all_reduce(there, group=self.group)
        return there.cpu()

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes (equal shapes), stacked in rank order."""
        if self.size == 1:
            return tensor[None]
        there = tensor.contiguous().to(self.device)
        out = torch.empty((self.size, *there.shape), dtype=there.dtype, device=self.device)
        with self._named():
            dist.all_gather(list(out.unbind()), there, group=self.group)
        return out.cpu()

    def gather_floats(self, values: list[float]) -> np.ndarray:
        """float64 [size, len(values)]."""
        return self.gather(torch.tensor(values, dtype=torch.float64)).numpy()

    def gather_objects(self, value: Any) -> list[Any]:
        """Objects of all processes; the group is trusted, as torch.distributed pickles them."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        with self._named():
            dist.all_gather_object(out, value, group=self.group)
        return out

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send the first ``sent[0]`` rows to process 0, and so on; what arrives, in rank order.

        ``rows`` [sum(sent), ...] and the result [sum(received), ...] lie on ``device``.
        """
        if self.size == 1:
            return rows
        out = torch.empty((sum(received), *rows.shape[1:]), dtype=rows.dtype, device=self.device)
        with self._named():
            dist.all_to_all_single(out, rows, list(received), list(sent), group=self.group)
        return out

    def exchange_unknown(self, rows: Tensor, sent: Tensor) -> Tensor:
        """As ``exchange``, on the CPU, where no process knows what it will receive."""
        if self.size == 1:
            return rows
        counts = self.gather(sent)[:, self.rank]
        there = self.exchange(rows.contiguous().to(self.device), sent.tolist(), counts.tolist())
        return there.cpu()

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            with self._named():
                dist.barrier(self.group)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"sharded table, {self.step}: process {self.rank} of {self.size} got no answer from a peer. "
                f"It has died, or did not make the same call ({error})"
            ) from error

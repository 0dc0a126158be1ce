"""Send and receive between workers in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Message = tuple[int, Tensor]  # the other worker, a contiguous tensor


class Pending(Protocol):
    """A batch under way."""

    def wait(self) -> None:
        """Return once received tensors may be read and sent ones overwritten (on the current stream)."""


class Transport(Protocol):
    """What :func:`megatron_tenplex.execute` needs to reach other workers."""

    worker: int
    device: torch.device

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start a batch. Messages of a pair of workers arrive in the order they are given on both sides."""


class TorchTransport:
    """Point-to-point operations of a ``torch.distributed`` group that spans all workers.

    Args:
        group: e.g. ``World.data``.
        worker: rank of this worker in the group.
        device: where messages live: ``cuda`` for NCCL, ``cpu`` for gloo.
    """

    def __init__(self, group: Any, worker: int, device: torch.device | str | None = None) -> None:
        self.group, self.worker = group, worker
        default = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or default)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start a batch; NCCL gets it as one group of calls."""
        coalesce = self.device.type == "cuda"
        if coalesce:
            self.group._start_coalescing(self.device)
        works: list[Any] = []
        peers: list[int] = []
        for peer, tensor in receives:
            works.append(self.group.recv([tensor], peer, 0))
            peers.append(peer)
        for peer, tensor in sends:
            works.append(self.group.send([tensor], peer, 0))
            peers.append(peer)
        if coalesce:
            works, peers = [self.group._end_coalescing(self.device)], [-1]
        return _Works(works, peers)


class _Works:
    def __init__(self, works: list[Any], peers: list[int]) -> None:
        self.works, self.peers = works, peers

    def wait(self) -> None:
        """Wait for each operation; a failure names the worker on the other side."""
        for work, peer in zip(self.works, self.peers, strict=True):
            try:
                work.wait()
            except RuntimeError as error:
                whom = f"worker {peer}" if peer >= 0 else "another worker"
                raise RuntimeError(f"the exchange with {whom} failed: {error}") from error


class CopyServiceTransport:
    """Use a ``megatron.core.resharding`` CopyService (NCCL, gloo, NVSHMEM) as it is.

    Its ranks are those of the default group, so all workers must have a role.
    """

    def __init__(self, service: Any, worker: int, device: torch.device | str) -> None:
        self.service, self.worker, self.device = service, worker, torch.device(device)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Submit everything and run it; the batch is done on return."""
        for peer, tensor in receives:
            self.service.submit_recv(tensor, peer)
        for peer, tensor in sends:
            self.service.submit_send(tensor, peer)
        self.service.run()
        return _Works([], [])

"""Where workers sit and how fast the links between them are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Hosts of ``ranks_per_host`` consecutive workers.

    Attributes:
        ranks_per_host: workers of one host.
        intra_host_bandwidth: bytes/s of one worker and direction inside its host.
        inter_host_bandwidth: bytes/s of one worker and direction between hosts.
        latency: seconds a message between two workers adds.
    """

    ranks_per_host: int = 8
    intra_host_bandwidth: float = 300e9
    inter_host_bandwidth: float = 40e9
    latency: float = 2e-5

    def __post_init__(self) -> None:
        if self.ranks_per_host < 1:
            raise ValueError(f"ranks_per_host must be at least 1, got {self.ranks_per_host}")
        if min(self.intra_host_bandwidth, self.inter_host_bandwidth) <= 0 or self.latency < 0:
            raise ValueError("bandwidths must be positive and the latency not negative")

    def host(self, worker: int) -> int:
        """Host number of a worker."""
        return worker // self.ranks_per_host

"""What the policies see of a cluster, and what they answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vllm_serverless_loader.scheduling.estimators import LoadingTimeEstimator, MigrationTimeEstimator


@dataclass(frozen=True)
class ModelInfo:
    """A model: one partition a GPU."""

    name: str
    partition_bytes: tuple[int, ...]

    @property
    def num_gpus(self) -> int:
        """GPUs that an instance takes."""
        return len(self.partition_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all partitions."""
        return sum(self.partition_bytes)


@dataclass
class Instance:
    """A model on GPUs.

    Attributes:
        busy: serving a request; idle ones may be reused or evicted.
        migratable: a busy one may be moved.
        context_tokens: tokens that a migration would recompute.
        last_used: when it was last busy, seconds.
    """

    id: str
    model: str
    busy: bool = True
    migratable: bool = True
    context_tokens: int = 0
    last_used: float = 0.0


@dataclass
class ServerState:
    """A server.

    Attributes:
        tiers: model -> ``"host"`` or ``"disk"``; a model not in it is ``"remote"``.
        loading, migration: this server's estimators.
        instances: what runs here.
        io_free_at: when its queue of loads from disk and remote ends, seconds.
        host_cache_bytes: size of its pool; a larger model cannot be staged there.
    """

    id: str
    num_gpus: int
    tiers: dict[str, str]
    loading: LoadingTimeEstimator
    migration: MigrationTimeEstimator
    instances: list[Instance] = field(default_factory=list)
    io_free_at: float = 0.0
    host_cache_bytes: float = math.inf


@dataclass(frozen=True)
class Migration:
    """Move a busy instance to another server."""

    instance: str
    source: str
    destination: str
    estimated_s: float


@dataclass(frozen=True)
class Allocation:
    """Where a model starts.

    Attributes:
        tier: where its bytes come from; ``"device"`` when an instance is reused.
        estimated_startup_s: until it can serve.
        migrations: to be done first.
        evictions: ids of idle instances to stop first.
        reuse: id of the idle instance that serves.
        staged: the bytes go to host memory at once, while the migrations are done.
    """

    server: str
    tier: str
    estimated_startup_s: float
    migrations: tuple[Migration, ...] = ()
    evictions: tuple[str, ...] = ()
    reuse: str | None = None
    staged: bool = False

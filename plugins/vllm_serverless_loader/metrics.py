"""What each rank loaded, for vLLM's ``/metrics``.

A rank may live in a process of its own, while ``/metrics`` is served by the one that started it. So each
process that loads keeps one small file in memory-backed storage, and the serving process reads those of the
processes below it.
"""

from __future__ import annotations

import atexit
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_serverless_loader.loading.options import LoadReport

_lock = threading.Lock()
_totals: dict[tuple[str, int], dict[str, Any]] = {}


def folder() -> Path:
    """Where this user's processes publish."""
    shared = Path("/dev/shm")
    root = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return root / f"vllm_serverless_loader-{os.getuid()}"


def record(report: LoadReport, *, model: str, rank: int) -> None:
    """Add a finished load to this process's totals and publish them.

    Args:
        report: of one rank's load.
        model: as it is to be labelled.
        rank: of the process among those of the engine.

    Raises:
        OSError: the totals cannot be published.
    """
    import psutil

    with _lock:
        total = _totals.setdefault(
            (model, rank), {"model": model, "rank": rank, "loads": 0, "seconds": 0.0, "bytes": {}, "rate": {}}
        )
        total["loads"] += 1
        total["seconds"] += report.seconds
        for tier, count in report.bytes_read.items():
            total["bytes"][tier] = total["bytes"].get(tier, 0) + count
        if report.seconds > 0:
            total["rate"] = {tier: count / report.seconds for tier, count in report.bytes_read.items()}
        content = {
            "pid": os.getpid(),
            "parents": [parent.pid for parent in psutil.Process().parents()],
            "ranks": list(_totals.values()),
        }
        place = folder()
        place.mkdir(mode=0o700, exist_ok=True)
        if place.stat().st_uid != os.getuid():
            raise PermissionError(f"{place} belongs to another user; remove it")
        path = place / f"{os.getpid()}.json"
        if not path.exists():
            atexit.register(path.unlink, missing_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.replace(path)


def published() -> list[dict[str, Any]]:
    """Totals of each rank below this process, itself included; files of dead processes are removed."""
    found: list[dict[str, Any]] = []
    own = os.getpid()
    for path in sorted(folder().glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            is_alive = Path(f"/proc/{content['pid']}").exists()
            is_below = own == content["pid"] or own in content["parents"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being removed, or not written by this package
        if not is_alive:
            path.unlink(missing_ok=True)
        elif is_below:
            found += content["ranks"]
    return found


class LoadCollector:
    """Prometheus collector of :func:`published`."""

    def describe(self) -> Iterable[Any]:
        """Nothing in advance: there may be no load yet."""
        return ()

    def collect(self) -> Iterator[Any]:
        """The families; none before the first load."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        ranks = published()
        if not ranks:
            return
        of_rank, of_tier = ["model_name", "rank"], ["model_name", "rank", "tier"]
        name = "vllm:serverless_loader"
        loads = CounterMetricFamily(f"{name}_loads", "Finished loads of weights", labels=of_rank)
        seconds = CounterMetricFamily(f"{name}_load_seconds", "Seconds that loads took", labels=of_rank)
        read = CounterMetricFamily(f"{name}_bytes_read", "Bytes taken from a tier", labels=of_tier)
        rate = GaugeMetricFamily(
            f"{name}_bytes_per_second", "Bytes from a tier over the seconds of the last load", labels=of_tier
        )
        for rank in ranks:
            labels = [rank["model"], str(rank["rank"])]
            loads.add_metric(labels, rank["loads"])
            seconds.add_metric(labels, rank["seconds"])
            for metric, values in ((read, rank["bytes"]), (rate, rank["rate"])):
                for tier, value in values.items():
                    metric.add_metric([*labels, tier], value)
        yield from (loads, seconds, read, rate)


def register_collector() -> None:
    """Add the collector to the registry of this process that vLLM's ``/metrics`` shows. Idempotent."""
    from prometheus_client import REGISTRY

    if not any(isinstance(collector, LoadCollector) for collector in REGISTRY._collector_to_names):
        REGISTRY.register(LoadCollector())

"""Counters of loads, read by the process that serves /metrics (SL-25)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vllm_serverless_loader import LoadReport, metrics

CHILD = """
import sys
from vllm_serverless_loader import LoadReport
from vllm_serverless_loader.metrics import record
record(LoadReport(10, 2.0, "disk", {"disk": 10, "host": 6}), model="child", rank=3)
record(LoadReport(10, 0.5, "host", {"host": 10}), model="child", rank=3)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def child():
    """A process below this one that has loaded twice."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def of_child():
    return [rank for rank in metrics.published() if rank["model"] == "child"]


def test_sl25_totals_of_a_child_are_seen_until_it_ends(child):
    assert of_child() == [
        {
            "model": "child",
            "rank": 3,
            "loads": 2,
            "seconds": 2.5,
            "bytes": {"disk": 10, "host": 16},
            "rate": {"host": 20.0},
        }
    ]
    child.stdin.close()
    assert child.wait() == 0
    assert not (metrics.folder() / f"{child.pid}.json").exists()
    assert of_child() == []


def test_sl25_file_of_a_killed_process_is_removed(child):
    child.kill()
    child.wait()
    path = metrics.folder() / f"{child.pid}.json"
    assert path.exists()
    assert of_child() == []
    assert not path.exists()


def test_sl25_foreign_and_damaged_files_are_passed_over(place):
    (place / "1.json").write_text(json.dumps({"pid": 1, "parents": [], "ranks": [{"model": "other"}]}))
    (place / "2.json").write_text("{")
    (place / "3.json").write_text("[]")
    assert metrics.published() == []
    assert list(metrics.LoadCollector().collect()) == []


def test_sl25_no_time_is_no_rate(place):
    metrics.record(LoadReport(0, 0.0, "host", {"host": 0}), model="empty", rank=0)
    assert [rank["rate"] for rank in metrics.published() if rank["model"] == "empty"] == [{}]


def test_sl25_folder_of_another_user_is_refused(place, monkeypatch):
    monkeypatch.setattr(metrics.os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        metrics.record(LoadReport(0, 1.0, "host", {"host": 0}), model="m", rank=0)
    assert list(place.iterdir()) == []

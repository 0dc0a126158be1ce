"""Counters of running engines as other processes see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_moe_offload import live
from vllm_moe_offload.__main__ import _live_table, main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "live_folder", lambda: tmp_path / "live")
    return tmp_path / "live"


def counters(**values):
    names = [*live._COUNTERS, *live._GAUGES, "expert_nbytes"]
    return dict.fromkeys(names, 0) | values


def test_mo16_readers_see_the_last_state_and_nothing_after_the_end(folder):
    publisher = live.LivePublisher({"model": "m", "rank": 0})
    publisher.publish(counters(hits=123456))
    publisher.publish(counters(hits=7, accesses=10))  # shorter than the one before
    (report,) = live.read_live()
    assert (report["hits"], report["accesses"], report["model"], report["pid"]) == (7, 10, "m", os.getpid())
    publisher.publish({"hits": "x" * live._SIZE})  # too long: the last one stays
    assert live.read_live()[0]["hits"] == 7
    publisher.close()
    publisher.close()
    assert live.read_live() == []


def test_files_of_dead_processes_are_removed(folder):
    code = (
        "import sys; from pathlib import Path; from vllm_moe_offload import live; "
        "live.live_folder = lambda: Path(sys.argv[1]); live.LivePublisher({'rank': 1}).publish({'hits': 1})"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
    assert len(list(folder.iterdir())) == 1
    assert live.read_live() == []
    assert list(folder.iterdir()) == []


def test_mo16_prometheus_shows_the_workers_of_this_process_only(folder):
    prometheus_client = pytest.importorskip("prometheus_client")
    registry = prometheus_client.CollectorRegistry()
    registry.register(live.LiveCollector())
    assert prometheus_client.generate_latest(registry) == b""
    publisher = live.LivePublisher({"model": "m", "rank": 0})
    publisher.publish(counters(accesses=10, hits=7, misses=3, num_slots=5))
    stranger = {**counters(accesses=99), "pid": os.getpid(), "parents": [], "rank": 3, "model": "other"}
    child = stranger | {"pid": os.getppid(), "parents": [os.getpid()], "rank": 1, "model": "m"}
    (folder / f"{os.getppid()}-1.json").write_text(json.dumps(child))
    (folder / f"{os.getppid()}-2.json").write_text(json.dumps(stranger | {"pid": os.getppid()}))
    text = prometheus_client.generate_latest(registry).decode()
    assert 'vllm:moe_offload_expert_hits_total{model_name="m",rank="0"} 7.0' in text
    assert 'vllm:moe_offload_expert_accesses_total{model_name="m",rank="1"} 99.0' in text
    assert 'vllm:moe_offload_expert_slots{model_name="m",rank="0"} 5.0' in text
    assert "other" not in text
    publisher.close()


def test_live_table_shows_totals_and_recent_rates(folder, capsys):
    old = counters(accesses=100, hits=50, misses=50, copies=50, expert_nbytes=10**9)
    facts = {"model": "m", "rank": 0, "pid": 1}
    before = [{**facts, **old, "time": 10.0}]
    new = old | {"accesses": 200, "hits": 140, "misses": 60, "copies": 54, "in_place": 6}
    table = _live_table(before, [{**facts, **new, "time": 12.0}])
    (row,) = zip(*(column.cells for column in table.columns), strict=True)
    assert row == ("m", "0", "0", "0", "0.700", "0.900", "5", "3", "5.00")
    assert main(["trace", "--live", "--seconds", "0"]) == 1
    assert "no engine with moe_offload is running" in capsys.readouterr().out
    assert main(["trace"]) == 2
    assert "give a recorded trace, or --live" in capsys.readouterr().err

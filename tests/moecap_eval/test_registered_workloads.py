"""Every workload that a plugin registers, in its smallest form, through the command line."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecap_eval import compare, list_workloads, load_workload, read_records

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import moecap

ROOT = Path(__file__).parents[2]
TINY_MOE = ROOT / "examples" / "tiny_moe"
# Small params, and a second arm that differs from the first one. A workload that is not named here runs with
# its defaults and twice the same arm.
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "moe_offload.generate": (
        {
            "model": str(TINY_MOE / "model"),
            "tasks": str(TINY_MOE / "tasks" / "add.jsonl"),
            "max_new_tokens": 4,
            "concurrency": 2,
            "threads": 1,
        },
        {"residency": 0.5},
    ),
    "phdropout.render": (
        {"views": 2, "resolution": 16, "gaussians": 60},
        {"estimator": "monte_carlo", "num_trials": 2},
    ),
    "quiver.sample_and_gather": (
        {"nodes": 400, "edges": 4000, "features": 8, "batch_size": 32, "batches": 2},
        {"placement": "degree"},
    ),
    "serverless_loader.cold_start": (
        {"model": str(TINY_MOE / "model"), "loads": 2},
        {"format": "safetensors"},
    ),
    "tenplex.reconfigure": (
        {"hidden_size": 32, "layers": 2, "steps": 2, "changes": 2},
        {"method": "checkpoint"},
    ),
    "replay_gear.train": ({"trajectories": 8, "steps": 40, "batch_size": 8, "batches": 2}, {"store": "rows"}),
    "spe.fit": ({"side": 8, "steps": 5, "width": 8}, {"encoding": "relu"}),
}
SLOW = {"moe_offload.generate", "tenplex.reconfigure"}


class WellFormed(HTMLParser):
    """Remembers whether the report names its verdict."""

    headings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.headings += tag in ("h1", "h2")


def test_cap17_every_workload_can_be_listed_without_its_framework() -> None:
    done = moecap("list", "workloads")
    assert done.returncode == 0, done.stderr
    for name in list_workloads():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert "error" not in line.lower()
        workload = load_workload(name)
        assert workload.name == name
        assert any(axis.kind == "accuracy" for axis in workload.axes), (
            "an accuracy axis says what 'the same' is"
        )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in list_workloads()],
)
def test_cap17_every_workload_runs_with_two_items(name: str, tmp_path: Path) -> None:
    params, other = SMALL.get(name, ({}, {}))
    config = {
        "name": "smallest",
        "workload": name,
        "params": {**params, "seed": 3},
        "arms": {"first": {}, "second": other},
        "compare": {"warm_up": 1, "aa_control": False, "timeout_s": 500},
        "hardware": {"profile": "cpu-reference", "peaks": "spec"},
        "cost": {"device_usd": 1000, "watts": 50},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    done = moecap("run", tmp_path / "c.yaml", "-o", out, "--limit", 2, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(out)
    assert {arm: len(blocks) for arm, blocks in records.blocks.items()} == {"first": 2, "second": 2}
    known = {row.axis for row in compare(records).rows if row.arm == "second" and row.value is not None}
    headline = {axis.name for axis in load_workload(name).axes if axis.headline}
    assert {"throughput", "usd_per_million", "startup_s"} <= known
    assert headline <= known, f"headline axes without a value: {sorted(headline - known)}"
    page = WellFormed()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    assert page.headings > 3
    json.dumps(compare(records).to_dict(), allow_nan=False)

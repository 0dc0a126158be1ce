"""Utilisation from recorded passes equals the accounting on the same passes; what cannot be is null."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from moecap_eval import (
    ModelSpec,
    StepRecord,
    compare,
    mbu,
    mfu,
    parse_config,
    read_records,
    run,
    s_mbu,
    s_mfu,
    step_bytes,
    write_report,
)
from moecap_eval.report.money import cost_sheet, utilisation_tables
from moecap_eval.utilisation import peaks_of, utilisation

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data

TINY = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "torch_dtype": "bfloat16",
}
STEPS = [
    StepRecord(1e-3, 4, 1, 1, 4, 4, 10, {0: 5, 1: 6}, None, {"dram->hbm": 1000}),
    StepRecord(2e-3, 1, 1, 1, 1, 5, 5, {0: 2, 1: 2}, None, {"dram->hbm": 500}),
]


def run_with_steps(folder: Path, steps: list[StepRecord], model: dict | None = TINY) -> Path:
    run(parse_config(config_data({"plain": {}, "fast": {"slowdown": 0.5}})), folder)
    path = folder / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "arm":
            line["facts"] = {"model_config": model} if model else {}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"v": 1, "arm": arm, "block": block, "attempt": "a", **asdict(step)}
        for arm in ("plain", "fast")
        for block in range(2)
        for step in steps
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_cap07_shares_are_ratios_of_sums_over_all_passes(tmp_path):
    records = read_records(run_with_steps(tmp_path, STEPS))
    found = utilisation(records, "fast")
    spec, steps = ModelSpec.from_config(TINY), STEPS * 2
    (peak,) = peaks_of(records.environment, "bfloat16")
    assert peak.source == "spec"
    assert found.shares == {
        ("S-MBU", "spec"): s_mbu(spec, steps, peak.bytes_per_s),
        ("MBU", "spec"): mbu(spec, steps, peak.bytes_per_s),
        ("S-MFU", "spec"): s_mfu(spec, steps, peak.flops_per_s),
        ("MFU", "spec"): mfu(spec, steps, peak.flops_per_s),
    }
    assert (found.passes, found.tokens) == (4, 10)
    total = sum(step_bytes(spec, step).total for step in steps)
    assert sum(found.bytes_by_component.values()) == total


def test_cap09_moved_bytes_per_link_are_in_the_report(tmp_path):
    folder = run_with_steps(tmp_path, STEPS)
    records = read_records(folder)
    assert utilisation(records, "plain").moved_bytes == {"dram->hbm": 3000}
    rows = utilisation_tables(records, compare(records))["links"]
    assert [(row["arm"], row["total"]) for row in rows] == [("plain", "2.93 KiB"), ("fast", "2.93 KiB")]
    assert rows[0]["rate"] == "500 kB/s"  # 3000 B in 6 ms
    text = write_report(folder).read_text()
    assert "dram → hbm" in text
    assert "2.93 KiB" in text


def test_cap07_above_one_is_null_with_the_reason(tmp_path):
    fast = [StepRecord(1e-9, 1, 1, 1, 1, 5, 5, {0: 2, 1: 2})]
    folder = run_with_steps(tmp_path, fast)
    found = utilisation(read_records(folder), "plain")
    assert found.shares["S-MBU", "spec"] is None
    assert "> 1: peak" in found.reasons["S-MBU", "spec"]
    assert "&gt; 1: peak" in write_report(folder).read_text()


def test_an_invalid_pass_makes_the_measure_unknown(tmp_path):
    hole = StepRecord(1e-3, 1, 1, 1, 1, 5, 5, {0: 2, 1: 2}, invalid="tokens*k = 2, observed 1")
    found = utilisation(read_records(run_with_steps(tmp_path, [*STEPS, hole])), "plain")
    assert found.shares["S-MBU", "spec"] is None
    assert "tokens*k = 2, observed 1" in found.reasons["S-MBU", "spec"]


def test_an_unknown_model_makes_all_of_them_unknown(tmp_path):
    found = utilisation(read_records(run_with_steps(tmp_path, STEPS, model=None)), "plain")
    assert set(found.shares.values()) == {None}
    assert set(found.reasons.values()) == {"the arm does not state its model's config"}
    assert found.moved_bytes == {"dram->hbm": 3000}


def test_without_passes_there_is_no_section(tmp_path):
    run(parse_config(config_data({"plain": {}, "fast": {}})), tmp_path)
    records = read_records(tmp_path)
    assert utilisation(records, "plain") is None
    assert "How much of the machine was used" not in write_report(tmp_path).read_text()


def test_cap10_cost_sheet_by_hand(tmp_path):
    """32 items of 10 ms at 1000 USD over 3 years at 80 %, plus 50 W at 0.15 USD/kWh and PUE 1.25."""
    run(parse_config(config_data({"plain": {}, "fast": {"slowdown": 0.5}})), tmp_path)
    records = read_records(tmp_path)
    seconds = 32 * 0.010
    usd = seconds * 1000 / (3 * 365 * 86400 * 0.8) + 50 * seconds * 1.25 * 0.15 / 3.6e6
    row = compare(records).row("usd_per_million", "fast")
    assert row.baseline_value == pytest.approx(1e6 * usd / (32 * 8), rel=1e-9)
    assert row.value == pytest.approx(0.5 * row.baseline_value, rel=1e-9)
    sheet = cost_sheet(records, compare(records))
    assert sheet["rows"][0]["time"] == "320 ms"
    assert sheet["rows"][0]["energy"] == "not measured"
    assert {row["source"] for row in sheet["assumptions"]} == {"config"}

"""Comparisons of hand-written records against values worked out beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moecap_eval import compare, paired_ratio, parse_config, read_records
from moecap_eval.comparison import compare_runs
from moecap_eval.report.narrative import recommend, tell

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data

AXES = [
    ("throughput", "performance", "token/s", "higher", "block", 0.05, True),
    ("usd_per_million", "cost", "USD per 1e6 token", "lower", "block", 0.05, True),
    ("startup_s", "performance", "s", "lower", "block", 0.03, False),
    ("fast_memory_bytes", "cost", "B", "lower", "block", 0.03, False),
    ("exact_match", "accuracy", "share of items", "higher", "item", 0.3, True),
    ("loss", "accuracy", "nat", "lower", "block", 0.01, False),
    ("s_mbu", "performance", "share of peak", "higher", "block", 0.05, False),
]
KEYS = ("name", "kind", "unit", "better", "level", "margin", "headline")


def write_run(folder: Path, arms: dict[str, dict], *, items_of=None, failures=None) -> Path:
    """Records of 4 blocks of 2 items. Per arm: wall (4 values), usd, right (8 scores), memory, values."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [arm for arm in arms if "#" not in arm]
    config = dict(parse_config(config_data({name: {} for name in names})).content)
    lines: list[dict] = [
        {
            "kind": "run",
            "config_digest": "d",
            "config": config,
            "workload": "w",
            "work_unit": "token",
            "axes": [dict(zip(KEYS, axis, strict=True)) for axis in AXES],
            "slots": list(arms),
            "blocks": 4,
            "items_per_block": 2,
            "left_out": 0,
            "created_s": 0.0,
        }
    ]
    for arm in names:
        memory = {"hbm": arms[arm].get("memory", 100), "dram": 5}
        lines.append({"kind": "arm", "arm": arm, "startup_s": 1.0, "memory_bytes": memory, "facts": {}})
    for arm, data in arms.items():
        for block in range(data.get("blocks", 4)):
            for item in (items_of or {}).get(arm, [2 * block, 2 * block + 1]):
                right = float(data.get("right", [1.0] * 8)[item % 8])
                digest = f"{item}-{right}"
                sample = {"values": {"exact_match": right}, "digest": digest, "detail": {}}
                lines.append({"kind": "sample", "arm": arm, "block": block, "item": f"t/{item}", **sample})
            values = {name: series[block] for name, series in data.get("values", {}).items()}
            lines.append(
                {
                    "kind": "block",
                    "arm": arm,
                    "block": block,
                    "slot": 0,
                    "wall_s": data["wall"][block],
                    "work": 10.0,
                    "values": values,
                    "reasons": data.get("reasons", {}),
                    "energy_j": None,
                    "energy_source": "none",
                    "usd": None if data.get("usd") is None else data["usd"] * data["wall"][block],
                }
            )
    lines += [{"kind": "failure", "arm": a, "block": 0, "message": m} for a, m in (failures or {}).items()]
    text = "".join(json.dumps({"v": 1, **line}) + "\n" for line in lines)
    (folder / "records.jsonl").write_text(text)
    return folder


PLAIN = {"wall": [1.0, 1.1, 0.9, 1.0], "usd": 0.002}


@contextmanager
def edited_header(folder: Path) -> Iterator[dict]:
    """The run's first record, written back when the block ends."""
    first, *others = (folder / "records.jsonl").read_text().splitlines()
    header = json.loads(first)
    yield header
    (folder / "records.jsonl").write_text("\n".join([json.dumps(header), *others]) + "\n")


def test_ratios_are_paired_by_block_and_values_are_ratios_of_sums(tmp_path):
    half = {"wall": [0.5, 0.55, 0.45, 0.5], "usd": 0.002}
    comparison = compare(write_run(tmp_path, {"plain": PLAIN, "fast": half}))
    row = comparison.row("throughput", "fast")
    assert row.baseline_value == pytest.approx(40 / 4.0)
    assert row.value == pytest.approx(40 / 2.0)
    assert row.effect == "ratio"
    assert (row.estimate.value, row.estimate.low, row.estimate.high) == pytest.approx((2.0, 2.0, 2.0))
    assert comparison.row("usd_per_million", "fast").value == pytest.approx(1e6 * 0.002 * 2.0 / 40)
    assert comparison.row("usd_per_million", "fast").estimate.value == pytest.approx(0.5)


def test_holm_is_over_the_headline_axes_of_one_arm(tmp_path):
    fast = {"wall": [0.5, 0.56, 0.44, 0.5], "usd": 0.002}
    comparison = compare(write_run(tmp_path, {"plain": PLAIN, "fast": fast}))
    row = comparison.row("throughput", "fast")
    assert row.estimate.p_value == 2 / 16
    assert row.adjusted_p == pytest.approx(3 * 2 / 16)  # throughput, cost, exact match (p = 1)
    assert row.verdict == "inconclusive"  # four blocks cannot reach 5 %
    assert comparison.row("startup_s", "fast").adjusted_p is None


def test_single_values_are_shown_and_not_tested(tmp_path):
    comparison = compare(write_run(tmp_path, {"plain": PLAIN, "small": {**PLAIN, "memory": 25}}))
    row = comparison.row("fast_memory_bytes", "small")
    assert (row.baseline_value, row.value, row.estimate.value) == (100, 25, 0.25)
    assert (row.estimate.low, row.estimate.p_value, row.verdict) == (None, None, "inconclusive")
    assert row.reason == "one value per arm: shown, not tested"


def test_accuracy_is_a_difference_by_item_and_outputs_are_compared(tmp_path):
    worse = {**PLAIN, "right": [1, 1, 1, 0, 1, 0, 1, 1]}
    comparison = compare(write_run(tmp_path, {"plain": PLAIN, "worse": worse}))
    row = comparison.row("exact_match", "worse")
    assert (row.baseline_value, row.value, row.effect) == (1.0, 0.75, "difference")
    assert row.estimate.value == -0.25
    assert row.estimate.n == 8
    assert row.estimate.p_value == 0.5
    assert comparison.identical_outputs == {"worse": (6, 8)}


def test_block_level_accuracy_is_a_difference_too(tmp_path):
    first = {**PLAIN, "values": {"loss": [2.0, 2.1, 1.9, 2.0]}}
    second = {**PLAIN, "values": {"loss": [1.5, 1.6, 1.4, 1.5]}}
    row = compare(write_run(tmp_path, {"plain": first, "other": second})).row("loss", "other")
    assert row.effect == "difference"
    assert (row.estimate.value, row.estimate.n) == (pytest.approx(-0.5), 4)


def test_cost_per_thousand_right_answers(tmp_path):
    worse = {**PLAIN, "right": [1, 1, 1, 0, 1, 0, 1, 1]}
    comparison = compare(write_run(tmp_path, {"plain": PLAIN, "worse": worse}))
    row = comparison.row("usd_per_thousand_correct", "worse")
    assert row.baseline_value == pytest.approx(0.008 / 8 * 1000)
    assert row.value == pytest.approx(0.008 / 6 * 1000)
    assert row.estimate.value == pytest.approx(8 / 6)
    assert row.estimate.p_value is None


def test_utilisation_is_weighted_by_time(tmp_path):
    plain = {**PLAIN, "values": {"s_mbu": [0.2, 0.1, 0.4, 0.2]}}
    row = compare(write_run(tmp_path, {"plain": plain, "other": plain})).row("s_mbu", "other")
    assert row.value == pytest.approx((0.2 * 1.0 + 0.1 * 1.1 + 0.4 * 0.9 + 0.2 * 1.0) / 4.0)


def test_cap11_unknown_is_null_with_a_reason(tmp_path):
    free = {"wall": PLAIN["wall"], "values": {"s_mbu": [None] * 4}, "reasons": {"s_mbu": "S-MBU 1.130 > 1"}}
    comparison = compare(write_run(tmp_path, {"plain": free, "other": free}))
    cost = comparison.row("usd_per_million", "other")
    assert (cost.value, cost.estimate, cost.verdict) == (None, None, "inconclusive")
    assert cost.reason == "no price for 'cpu-reference': add cost.device_usd"
    assert comparison.row("s_mbu", "other").reason == "S-MBU 1.130 > 1"
    assert comparison.row("loss", "other").reason == "not measured by this arm"
    as_json = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert next(row for row in as_json["rows"] if row["axis"] == "usd_per_million")["value"] is None


def test_the_control_makes_verdicts_noisy(tmp_path):
    control = {"wall": [1.5, 0.8, 1.3, 0.7], "usd": 0.002}
    fast = {"wall": [0.9, 0.99, 0.8, 0.9], "usd": 0.002}
    comparison = compare(write_run(tmp_path, {"plain": PLAIN, "fast": fast, "plain#aa": control}))
    row = comparison.row("throughput", "fast")
    assert row.verdict == "noisy"
    assert "the baseline against itself gave" in row.reason
    expected = paired_ratio([10 / w for w in PLAIN["wall"]], [10 / w for w in control["wall"]])
    assert comparison.aa_control["throughput"] == expected
    assert "plain#aa" not in comparison.arms
    assert "too noisy to tell" in recommend(comparison).reason


def test_a_failed_arm_is_compared_on_the_blocks_it_has(tmp_path):
    fast = {"wall": [0.5, 0.55], "usd": 0.002, "blocks": 2}
    folder = write_run(tmp_path, {"plain": PLAIN, "fast": fast}, failures={"fast": "it fell over"})
    comparison = compare(folder)
    row = comparison.row("throughput", "fast")
    assert row.estimate.n == 2
    assert row.baseline_value == pytest.approx(20 / 2.1)
    assert row.reason == "arm failed after 2 of 4 blocks: it fell over"
    assert comparison.failures == {"fast": "it fell over"}


def test_different_items_are_an_error(tmp_path):
    items = {"fast": [90, 91]}
    folder = write_run(tmp_path, {"plain": PLAIN, "fast": PLAIN}, items_of=items)
    with pytest.raises(
        ValueError, match=r"^item ids differ between arms: 8 only in 'plain' \(e\.g\. 't/0'\)"
    ):
        compare(folder)


def test_another_baseline_and_an_unknown_one(tmp_path):
    folder = write_run(tmp_path, {"plain": PLAIN, "fast": {"wall": [0.5, 0.55, 0.45, 0.5], "usd": 0.002}})
    assert compare(folder, "fast").row("throughput", "plain").estimate.value == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"compare.baseline 'x' is not an arm \(arms: plain, fast\)"):
        compare(folder, "x")


def eight_blocks_like(scale: float) -> dict:
    return {"wall": [scale * wall for wall in PLAIN["wall"]], "usd": 0.002}


def test_stories_and_recommendation(tmp_path):
    """Verdicts need small p-values: a confidence of 0.5 lets four blocks show what twelve would at 95 %."""
    arms = {"plain": PLAIN, "slow": {**eight_blocks_like(1.3), "memory": 30}, "fast": eight_blocks_like(0.8)}
    folder = write_run(tmp_path, arms)
    with edited_header(folder) as header:
        header["config"]["compare"]["confidence"] = 0.5
    comparison = compare(folder)
    assert tell(comparison, "fast").outcome == "better"
    slow = tell(comparison, "slow")
    assert slow.outcome == "trade-off"
    assert slow.gains == ("0.30× the fast memory",)
    assert slow.losses == ("23.1\u00a0% lower throughput", "30.0\u00a0% higher cost per unit of work")
    assert slow.same == ("exact match",)
    advice = recommend(comparison)
    assert advice.arm == "fast"
    assert advice.headline == "Choose fast"
    assert advice.otherwise[0].startswith("Choose slow only if 0.30× the fast memory is worth")


@pytest.mark.parametrize("headline", [True, False])
def test_only_a_headline_axis_is_a_reason_to_change(tmp_path, headline):
    folder = write_run(tmp_path, {"plain": PLAIN, "small": {**PLAIN, "memory": 30}})
    with edited_header(folder) as header:
        next(axis for axis in header["axes"] if axis["name"] == "fast_memory_bytes")["headline"] = headline
    comparison = compare(folder)
    assert tell(comparison, "small").outcome == "better"
    advice = recommend(comparison)
    assert advice.headline == ("Choose small" if headline else "Keep plain")
    assert ("headline axis" in advice.reason) != headline


def test_an_arm_of_unsettled_accuracy_is_not_recommended(tmp_path):
    """One answer of eight lost: far from a verdict at a margin of 0.3, but the outputs differ."""
    fast = {**eight_blocks_like(0.8), "right": [1, 1, 1, 1, 1, 1, 1, 0]}
    folder = write_run(tmp_path, {"plain": PLAIN, "fast": fast})
    with edited_header(folder) as header:
        header["config"]["compare"]["confidence"] = 0.6
        next(axis for axis in header["axes"] if axis["name"] == "exact_match")["margin"] = 0.05
    advice = recommend(compare(folder))
    assert advice.headline == "Keep plain"
    assert advice.reason == "Another arm looks better, but whether it stays as accurate is not settled."
    assert "exact match (interval too wide) is not settled" in advice.otherwise[0]


def test_one_arm_compares_with_nothing(tmp_path):
    comparison = compare(write_run(tmp_path, {"plain": PLAIN}))
    assert comparison.rows == []
    assert recommend(comparison).headline == "Only plain was measured"
    assert "nothing to compare" in comparison.to_text()


def test_cap25_runs_are_compared_arm_by_arm(tmp_path):
    old = read_records(write_run(tmp_path / "old", {"plain": PLAIN, "fast": eight_blocks_like(0.5)}))
    new = read_records(write_run(tmp_path / "new", {"plain": PLAIN, "fast": eight_blocks_like(0.6)}))
    comparison = compare_runs(new, old)
    assert comparison.row("throughput", "plain").verdict == "equivalent"
    assert comparison.row("throughput", "fast").estimate.value == pytest.approx(5 / 6)


def test_text_has_every_arm_and_no_colour(tmp_path):
    text = compare(write_run(tmp_path, {"plain": PLAIN, "fast": eight_blocks_like(0.5)})).to_text()
    assert "\x1b" not in text
    assert "fast" in text
    assert "throughput" in text


def test_items_without_a_score_are_named(tmp_path):
    """Two of the candidate's items have no score: they make no pair, and the row says so."""
    same = {"wall": [1, 1, 1, 1], "usd": 1.0}
    write_run(tmp_path / "a", {"plain": same, "fast": same})
    records = tmp_path / "a" / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    of_fast = [line for line in lines if line["kind"] == "sample" and line["arm"] == "fast"]
    for line in of_fast[:2]:
        line["values"]["exact_match"] = None
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = compare(tmp_path / "a").row("exact_match", "fast")
    assert row.estimate.n == 6
    assert row.reason == "2 of 8 items have no score in one of the arms and are left out"


def test_sentences_name_headline_axes_and_count_the_others(tmp_path):
    """Of two gains only the headline one is in the sentence; where none is, all are."""
    plain = {**PLAIN, "values": {"s_mbu": [0.2] * 4, "loss": [1.0] * 4}}
    quick = {"wall": [wall / 4 for wall in PLAIN["wall"]], "usd": 0.002}
    arms = {
        "plain": plain,
        "fast": {**quick, "values": {"s_mbu": [0.8] * 4, "loss": [1.0] * 4}},
        "busy": {**PLAIN, "values": {"s_mbu": [0.8] * 4, "loss": [1.0] * 4}},
    }
    folder = write_run(tmp_path, arms)
    with edited_header(folder) as header:
        header["config"]["compare"]["confidence"] = 0.5
    comparison = compare(folder)
    fast, busy = tell(comparison, "fast"), tell(comparison, "busy")
    assert len(fast.gains) == 3
    assert fast.gain == "4.00× the throughput and 0.25× the cost per unit of work (1 more below)"
    assert busy.gains == (busy.gain,) == ("4.00× the bandwidth use (S-MBU)",)

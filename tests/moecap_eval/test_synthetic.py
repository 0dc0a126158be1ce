"""The synthetic workload has the effects it states, and the whole chain finds them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moecap_eval import ArmConfig, RunContext, compare, load_hardware, parse_config, run
from moecap_eval.workloads.synthetic import ITEM_S, SyntheticWorkload

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data


def open_arm(tmp_path: Path, name: str = "plain", **options):
    context = RunContext(seed=1, out_dir=tmp_path, hardware=load_hardware("cpu-reference"), params={})
    return SyntheticWorkload().open(ArmConfig(name, options), context)


def test_items_depend_on_params_and_seed_alone():
    workload = SyntheticWorkload()
    first = workload.items({"items": 10, "tasks": 3}, seed=1)
    assert first == workload.items({"items": 10, "tasks": 3}, seed=1)
    assert [item.id for item in first] == [
        item.id for item in workload.items({"items": 10, "tasks": 3}, seed=2)
    ]
    assert {item.id.split("/")[0] for item in first} == {"task0", "task1", "task2"}
    with pytest.raises(ValueError, match=r"params.itms: unknown key; did you mean 'items'"):
        workload.items({"itms": 1}, seed=0)


def test_time_is_simulated(tmp_path):
    system = open_arm(tmp_path, slowdown=2.0)
    items = SyntheticWorkload().items({"items": 5}, 1)
    result = system.run(items)
    assert system.clock() == pytest.approx(2.0 * ITEM_S * 5)
    assert result.values == {"unknown": None}
    assert result.reasons == {"unknown": "this axis is never measured"}
    assert [sample.item_id for sample in result.samples] == [item.id for item in items]


def test_noise_differs_between_visits_but_not_between_runs(tmp_path):
    items = SyntheticWorkload().items({"items": 5}, 1)
    times = []
    for _ in range(2):
        system = open_arm(tmp_path, noise=0.1)
        marks = [system.clock()]
        for _ in range(2):
            system.run(items)
            marks.append(system.clock())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    assert times[0] == times[1]
    assert times[0][0] != times[0][1]


@pytest.mark.parametrize("options", [{"slowdown": 0.0}, {"accuracy": 1.5}])
def test_impossible_options_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"arms.plain: slowdown must be positive and accuracy in \[0, 1\]"):
        open_arm(tmp_path, **options)


def test_cap13_known_effects_through_the_whole_chain(tmp_path):
    arms = {
        "plain": {"noise": 0.01},
        "slower": {"noise": 0.01, "slowdown": 1.25},
        "same": {"noise": 0.01},
        "sloppy": {"noise": 0.01, "accuracy": 0.5},
    }
    data = config_data(arms, items=512, blocks=8)
    data["compare"]["margins"] = {"throughput": 0.05, "exact_match": 0.05}
    run(parse_config(data), tmp_path)
    comparison = compare(tmp_path)
    verdicts = {arm: comparison.row("throughput", arm).verdict for arm in comparison.arms}
    assert verdicts == {"slower": "worse", "same": "equivalent", "sloppy": "equivalent"}
    slower = comparison.row("throughput", "slower").estimate
    assert slower.low < 1 / 1.25 < slower.high
    assert comparison.row("exact_match", "sloppy").verdict == "worse"
    assert comparison.row("exact_match", "same").verdict == "equivalent"
    assert comparison.identical_outputs["same"] == (512, 512)
    same, total = comparison.identical_outputs["sloppy"]
    assert same < total == 512

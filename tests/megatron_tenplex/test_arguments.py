from __future__ import annotations

import argparse
import json

import pytest

from megatron_tenplex import GPTShape, ParallelConfig, Topology, assign_roles, gpt_layout, plan_reshard
from megatron_tenplex.arguments import Schedule, add_tenplex_args, store_from_args
from megatron_tenplex.policy import feasible_layouts, smallest_move

SHAPE = GPTShape(4, 64, 4, 128)


def parsed(*arguments):
    return add_tenplex_args(argparse.ArgumentParser()).parse_args(arguments)


def test_arguments_name_schedule_and_store(tmp_path):
    file = tmp_path / "changes.json"
    file.write_text(json.dumps({"20": "tp=1,pp=2", "10": "tp=2"}))
    arguments = parsed(
        "--tenplex-schedule", str(file), "--tenplex-snapshot-every", "5", "--tenplex-store", "/x"
    )
    schedule = Schedule.from_args(arguments)
    assert list(schedule.changes.items()) == [(10, ParallelConfig(tp=2)), (20, ParallelConfig(pp=2))]
    assert schedule.snapshot_every == 5
    assert str(store_from_args(arguments).root) == "/x"
    assert Schedule.from_args(parsed()).changes == {}
    assert store_from_args(parsed()) is None


def test_bad_schedules_are_refused(tmp_path):
    file = tmp_path / "changes.json"
    for text in ("[1, 2]", '{"ten": "tp=2"}', '{"10": "tpp=2"}', "{"):
        file.write_text(text)
        with pytest.raises(ValueError, match="is not a schedule of changes"):
            Schedule.from_args(parsed("--tenplex-schedule", str(file)))
    with pytest.raises(ValueError, match="iteration 1 or later"):
        Schedule({0: ParallelConfig()})
    with pytest.raises(ValueError, match="needs --tenplex-store"):
        store_from_args(parsed("--tenplex-snapshot-every", "5"))


@pytest.mark.parametrize(
    ("current", "workers"), [("tp=2,pp=2,dp=1", 8), ("tp=1,pp=1,dp=4", 2), ("tp=4,dp=2", 4)]
)
def test_tx27_the_policy_takes_the_smallest_predicted_move(current, workers):
    current, hosts = ParallelConfig.parse(current), Topology(ranks_per_host=4)
    chosen = smallest_move(SHAPE, current, workers, hosts)
    source = gpt_layout(SHAPE, current)

    def seconds(parallel):
        target = gpt_layout(SHAPE, parallel)
        placement = assign_roles(source, target, topology=hosts)
        return plan_reshard(source, target, placement=placement, topology=hosts).predict()

    assert seconds(chosen) == min(map(seconds, feasible_layouts(SHAPE, workers)))


def test_tx27_feasible_layouts_divide_model_and_workers():
    assert {str(p) for p in feasible_layouts(SHAPE, 4, least_model_parallel=2)} == {
        "tp=1,pp=2,dp=2",
        "tp=1,pp=4,dp=1",
        "tp=2,pp=1,dp=2",
        "tp=2,pp=2,dp=1",
        "tp=4,pp=1,dp=1",
    }
    with pytest.raises(ValueError, match="fits 3 workers"):
        smallest_move(SHAPE, ParallelConfig(tp=2, dp=1), 3, Topology(), least_model_parallel=2)

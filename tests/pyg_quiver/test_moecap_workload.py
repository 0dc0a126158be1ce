"""The harness's workload: arms that agree in accuracy, a law that is checked, options that are refused."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moecap_eval.workload import ArmConfig, RunContext
from pyg_quiver.moecap_workloads import SampleAndGatherWorkload

pytestmark = pytest.mark.pyg
SMALL = {"nodes": 2000, "edges": 60_000, "batches": 2, "items": 2}


def context(**params) -> RunContext:
    return RunContext(0, Path(), SimpleNamespace(), {**SMALL, **params})


def test_it_is_found_by_its_entry_point():
    (found,) = [e for e in entry_points(group="moecap.workloads") if e.name == "quiver.sample_and_gather"]
    assert found.load() is SampleAndGatherWorkload


@pytest.mark.parametrize("placement", ["none", "fap", "degree"])
def test_every_placement_gives_the_same_answers(placement):
    workload = SampleAndGatherWorkload()
    system = workload.open(ArmConfig("a", {"placement": placement}), context())
    result = system.run(workload.items(SMALL, 0))
    assert result.work > 0
    assert set(result.values) == {"batch_p99_s"}
    plain = workload.open(ArmConfig("b"), context()).run(workload.items(SMALL, 0))
    for mine, other in zip(result.samples, plain.samples, strict=True):
        assert (
            mine.values["validation_accuracy"] == other.values["validation_accuracy"] > 0.3
        )  # chance: 0.125
        assert mine.values["distribution"] == 1.0
        assert mine.detail == other.detail


def test_draws_that_prefer_some_neighbours_fail_the_law():
    workload = SampleAndGatherWorkload()
    system = workload.open(ArmConfig("a"), context())
    honest = system._first_hop_deciles
    system._first_hop_deciles = lambda batch: honest(batch) + torch.eye(2, 10) * 300
    assert system.run(workload.items(SMALL, 0)[:1]).samples[0].values["distribution"] == 0.0


def test_wrong_options_are_refused_before_anything_is_made():
    workload = SampleAndGatherWorkload()
    for options, message in [
        ({"placment": "fap"}, "did you mean 'placement'"),
        ({"sampler": "dgl"}, "sampler must be one of quiver, pyg, got 'dgl'"),
        ({"sampler": "pyg", "placement": "fap"}, "pyg has only mode: cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            workload.open(ArmConfig("a", options), context())
    with pytest.raises(ValueError, match=r"unknown option 'node' .*did you mean 'nodes'"):
        workload.items({"node": 3}, 0)

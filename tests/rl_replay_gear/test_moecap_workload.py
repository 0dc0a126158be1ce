"""The harness workload (GR-28): every access on the CPU, and its refusals."""

from __future__ import annotations

import pytest

from moecap_eval.workload import ArmConfig, RunContext
from rl_replay_gear.moecap_workloads import ACCESSES, TrainWorkload

PARAMS = {"trajectories": 40, "steps": 60, "batch_size": 32, "batches": 4, "items": 2}


def opened(tmp_path, options, **params):
    context = RunContext(0, tmp_path, None, {**PARAMS, **params})
    return TrainWorkload().open(ArmConfig("arm", options), context)


@pytest.mark.parametrize("access", ACCESSES)
def test_gr28_every_access_runs_without_a_gpu(tmp_path, access):
    system = opened(tmp_path, {}, access=access)
    result = system.run(TrainWorkload().items(PARAMS, 0))
    assert result.work > 0
    assert len(result.samples) == 2
    for sample in result.samples:
        assert sample.values["sampling_law"] == 1.0
        assert sample.values["validation_loss"] == pytest.approx(1.0, abs=0.1)
        assert sample.values["bytes_per_s"] > 0
    assert result.values["sample_p99_s"] > 0
    assert system.memory_bytes()["dram"] > 0


@pytest.mark.rl
@pytest.mark.parametrize("store", ["rows", "torchrl"])
def test_gr28_other_stores_deliver_the_same_law(tmp_path, store):
    if store == "torchrl":
        pytest.importorskip("torchrl", reason="torchrl is not installed")
    system = opened(tmp_path, {"store": store})
    result = system.run(TrainWorkload().items(PARAMS, 0))
    assert all(sample.values["sampling_law"] == 1.0 for sample in result.samples)
    system.close()


def test_gr28_unknown_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'store'"):
        opened(tmp_path, {"stor": "gear"})
    with pytest.raises(ValueError, match="access must be one of"):
        opened(tmp_path, {}, access="random")
    with pytest.raises(ValueError, match="has only tier: host"):
        opened(tmp_path, {"store": "rows", "tier": "device"})
    with pytest.raises(ValueError, match="needs store: gear"):
        opened(tmp_path, {"store": "rows"}, access="prioritized")

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
import tenplex_jobs  # noqa: F401 - imports Megatron before the workers are forked

from megatron_tenplex.moecap_workloads import ReconfigureWorkload
from moecap_eval.hardware import load_hardware
from moecap_eval.workload import ArmConfig, RunContext

pytestmark = pytest.mark.megatron


def run(tmp_path, **options):
    params = {"changes": 1, "hidden_size": 32, "steps": 3}
    workload = ReconfigureWorkload()
    context = RunContext(0, tmp_path, load_hardware("cpu-reference"), params)
    system = workload.open(ArmConfig("arm", options), context)
    try:
        return system.run(workload.items(params, 0)).samples[0].values
    finally:
        system.close()


@pytest.mark.parametrize("method", ["live", "checkpoint"])
def test_tenplex_reconfigure_keeps_the_losses(method, tmp_path):
    values = run(tmp_path, method=method, **{"from": "tp=2", "to": "dp=2"})
    assert values["loss_continuity"] == 1
    assert values["stall_s"] > 0
    if method == "live":
        assert values["moved_over_minimum"] == 1


def test_tenplex_reconfigure_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="method must be one of live, checkpoint"):
        run(tmp_path, method="lives")
    with pytest.raises(ValueError, match="unknown degree 'ttp'"):
        run(tmp_path, to="ttp=2")

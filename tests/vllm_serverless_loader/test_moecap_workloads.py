"""The workload ``serverless_loader.cold_start`` in the harness (SL-21)."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecap_eval import load_config, read_records, run

MODEL = Path("examples/tiny_moe/model").resolve()
CONFIG = """
name: cold
workload: serverless_loader.cold_start
params: {{model: {model}, loads: 4}}
arms:
  safetensors-cold: {{format: safetensors, cache: cold}}
  safetensors-warm: {{format: safetensors, cache: warm}}
  store-cold: {{format: store, cache: cold}}
  store-warm: {{format: store, cache: warm}}
  store-pool: {{format: store, cache: pool}}
compare: {{baseline: safetensors-warm, blocks: 2, warm_up: 1, aa_control: false}}
hardware: {{profile: cpu-reference}}
cost: {{device_usd: 1200, watts: 90}}
"""


def test_sl21_every_arm_loads_identical_tensors(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(model=MODEL))
    summary = run(load_config(path), tmp_path / "out")
    assert not summary.failed
    records = read_records(tmp_path / "out")
    samples = [one for arm in records.samples.values() for one in arm]
    assert {one.arm for one in samples} == {
        "safetensors-cold",
        "safetensors-warm",
        "store-cold",
        "store-warm",
        "store-pool",
    }
    assert all(one.values["tensors_identical"] == 1 for one in samples)
    assert all(one.values["bytes_per_s"] > 0 for one in samples)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "pickle"}, "format is one of"),
        ({"cach": "warm"}, "did you mean 'cache'"),
        ({"format": "safetensors", "cache": "pool"}, "has no pool"),
    ],
)
def test_sl21_bad_arms_are_refused(options, text, tmp_path):
    from moecap_eval import ArmConfig
    from moecap_eval.workload import RunContext
    from vllm_serverless_loader.moecap_workloads import ColdStartWorkload

    context = RunContext(seed=0, out_dir=tmp_path, hardware=None, params={"model": str(MODEL)})
    with pytest.raises(ValueError, match=text):
        ColdStartWorkload().open(ArmConfig("arm", options), context)

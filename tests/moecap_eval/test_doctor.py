"""The doctor names what is missing, and says whether a config can run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from moecap_eval import parse_config
from moecap_eval.doctor import diagnose, doctor_text
from moecap_eval.memory import ARM_OVERHEAD_BYTES, check_memory, memory_needed

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data, moecap, write_config


def test_cap19_every_check_has_a_reason_and_a_remedy_when_it_fails():
    checks = diagnose()
    names = [check.name for check in checks]
    for expected in ("vLLM engine", "lm_eval tasks", "NVIDIA GPU", "GPU energy (nvml)", "CPU energy (rapl)"):
        assert expected in names
    assert all(check.why for check in checks)
    assert all(check.remedy for check in checks if not check.ok)
    assert not any(check.required for check in checks)


def test_cap19_exit_code_follows_the_config(tmp_path):
    good = write_config(tmp_path / "good.yaml", {"plain": {}})
    done = moecap("doctor", good)
    assert done.returncode == 0, done.stdout
    assert "the config can run" in done.stdout


@pytest.mark.parametrize(
    ("path", "value", "failing"),
    [
        ("compare.blokcs", 4, "config"),
        ("workload", "nowhere.at_all", "workload and items"),
        ("params.items", 3, "workload and items"),
        ("hardware.profile", "cpu-referense", "hardware profile"),
    ],
)
def test_cap19_what_cannot_run_exits_1(tmp_path, path, value, failing):
    data = config_data({"plain": {}})
    node = data
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(data))
    done = moecap("doctor", config)
    assert done.returncode == 1
    assert f"the config cannot run: {failing}" in done.stdout
    assert "Traceback" not in done.stderr


def test_memory_is_counted_per_arm_that_stays_loaded(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_bytes(b"0" * 1000)
    (model / "b.safetensors").write_bytes(b"0" * 24)
    data = config_data({"plain": {}, "other": {}})
    data["params"]["model"] = "model"
    config = parse_config(data, tmp_path)
    assert memory_needed(config) == 2 * (1024 + ARM_OVERHEAD_BYTES)
    monkeypatch.setattr("moecap_eval.memory.total_memory_bytes", lambda: 2**30)
    assert check_memory(config) == (
        "2 arms need at least 2.0 GiB, 1.0 GiB are present; set compare.keep_alive: false"
    )
    data["compare"]["keep_alive"] = False
    assert memory_needed(parse_config(data, tmp_path)) == 1024 + ARM_OVERHEAD_BYTES
    assert memory_needed(parse_config(config_data({"plain": {}}))) is None


def test_brackets_of_extras_survive_the_table():
    assert "graft-plugins[eval]" in doctor_text(diagnose(), width=200) or "yes" in doctor_text(diagnose())

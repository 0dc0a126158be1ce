"""Doctor names every reason for silent inactivity; the command line's exit codes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from vllm_moe_offload import RoutingTrace
from vllm_moe_offload.__main__ import main
from vllm_moe_offload.doctor import Problem, diagnose

pytestmark = pytest.mark.vllm


def test_mo19_all_good(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8}))
    lines = diagnose({"moe_offload": {"cache_fraction": 0.5}}, tmp_path)
    assert len(lines) == 6
    assert "8 experts a layer" in lines[-1]


def test_mo19_filtered_by_vllm_plugins(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moe_offload is configured but the plugin is not active: VLLM_PLUGINS='other'")


def test_mo19_no_entry_point(monkeypatch):
    monkeypatch.setattr("vllm_moe_offload.doctor.entry_points", lambda group: [])
    with pytest.raises(Problem, match="not active: no entry point 'moe_offload'"):
        diagnose()


def test_mo19_registration_fails(monkeypatch):
    from vllm_moe_offload import vllm_layer

    def broken():
        raise RuntimeError("another plugin replaces vLLM's RoutedExperts")

    monkeypatch.setattr(vllm_layer, "register", broken)
    with pytest.raises(Problem, match="not active: registering failed: another plugin"):
        diagnose()


def test_mo19_too_old_vllm(monkeypatch):
    from vllm.model_executor.custom_op import PluggableLayer

    monkeypatch.delattr(PluggableLayer, "register_oot")
    with pytest.raises(Problem, match=r"has no .*PluggableLayer\.register_oot; vLLM 0\.25\.1 or newer"):
        diagnose()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "additional_config has no key 'moe_offload'"),
        ({"moeoffload": {"cache_fraction": 1}}, r"has no key 'moe_offload' \(found moeoffload\)"),
        ({"moe_offload": {"cache_frction": 1}}, "did you mean 'cache_fraction'"),
        ({"cache_frction": 1}, "did you mean 'cache_fraction'"),
        ({"moe_offload": 7}, "options must be an object"),
    ],
)
def test_mo19_options(options, message):
    with pytest.raises(Problem, match=message):
        diagnose(options)


def test_mo19_models(tmp_path):
    with pytest.raises(Problem, match=r"cannot read .*config\.json"):
        diagnose(model=tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Problem, match="is not JSON"):
        diagnose(model=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(Problem, match="has no routed experts"):
        diagnose(model=tmp_path)
    sizes = {"num_experts": 8, "num_experts_per_tok": 4, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert "8 experts a layer" in diagnose({"cache_fraction": 0.5}, tmp_path)[-1]
    with pytest.raises(Problem, match=r"3 slots are fewer than top_k=4; at least 4 slots are needed$"):
        diagnose({"moe_offload": {"slots_per_layer": 1}}, tmp_path)


def test_cli_exit_codes(tmp_path, capsys):
    assert main(["doctor", "--additional-config", "{"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "none.npz")]) == 2
    assert capsys.readouterr().err.endswith("none.npz: No such file or directory\n")
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (20, 2, 1)), axis=2)[:, :, :2]
    RoutingTrace(ids, np.zeros(20), np.arange(20), 8).save(tmp_path / "trace.npz")
    command = [
        "replay",
        str(tmp_path / "trace.npz"),
        "--residency",
        "0.5",
        "--policy",
        "lru",
        "belady",
        "--json",
    ]
    assert main(command) == 0
    lru, belady = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert lru["hits"] <= belady["hits"]
    assert lru["slots"] == 8
    assert main(["trace", str(tmp_path / "trace.npz"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    kept = [
        len(set(a) & set(b)) for x, y in itertools.pairwise(ids.tolist()) for a, b in zip(x, y, strict=True)
    ]
    assert summary["tokens"] == 20
    assert summary["kept_from_token_to_token"] == pytest.approx(np.mean(kept) / 2)
    assert main(["trace", str(tmp_path / "trace.npz")]) == 0
    assert f"{'tokens':<26}{20:>12}" in capsys.readouterr().out
    assert main([*command[:2], "--residency", "2"]) == 2
    assert main(["trace", str(tmp_path / "trace.npz"), "--live"]) == 2
    assert main(["trace", "--live", "--seconds", "-1"]) == 2
    assert "--seconds must be 0 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command[:2], "--policy", "lur"])
    assert "invalid choice: 'lur'" in capsys.readouterr().err


def test_import_is_cheap():
    code = "import sys, vllm_moe_offload as m; m.MoEOffloadConfig; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

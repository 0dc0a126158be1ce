"""Plans against equations 7 and 8 worked out by hand for Qwen3-30B-A3B."""

from __future__ import annotations

import json

import pytest

from moecap_eval import CostModel, ModelSpec, load_hardware
from moecap_eval.cli import main
from moecap_eval.plan import demand, plan

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "torch_dtype": "bfloat16",
}
WEIGHTS, KV = 30_532_122_624 * 2, 98_304


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec.from_config(QWEN3_30B)


def test_cap21_demand_of_one_request(spec):
    """One request reads a batch-1 pass (published: 3,041,869,824 weights' elements) and its cache."""
    need = demand(spec, batch=1, context=1000)
    assert need.resident_bytes == WEIGHTS + 1000 * KV
    assert need.read_bytes == 2 * 3_041_869_824 + 1000 * KV
    assert need.flops == 6_869_745_664


def test_cap21_equations_7_and_8(spec):
    (row,) = plan(
        spec, [load_hardware("h200-sxm")], tpot_s=0.01, batch=1, context=1000, s_mbu=0.5, s_mfu=0.25
    )
    read = 2 * 3_041_869_824 + 1000 * KV
    assert row.needed_bytes_per_s == pytest.approx(read / 0.01 / 0.5)
    assert row.needed_flops_per_s == pytest.approx(6_869_745_664 / 0.01 / 0.25)
    assert row.tpot_s == pytest.approx(read / (4.8e12 * 0.5))
    assert (row.meets, row.limit) == (True, "bandwidth")


def test_cap21_each_limit_can_bind(spec):
    machines = [load_hardware("h200-sxm"), load_hardware("cpu-reference")]
    fast, small = plan(spec, machines, tpot_s=1e-4)
    assert (fast.meets, fast.limit) == (False, "bandwidth")
    assert (small.meets, small.limit, small.tpot_s) == (False, "memory", None)
    (starved,) = plan(spec, machines[:1], tpot_s=0.05, batch=64, s_mfu=1e-4)
    assert starved.limit == "compute"
    (unknown,) = plan(ModelSpec.from_config(QWEN3_30B, weight_dtype="float16"), [machines[1]], tpot_s=1.0)
    assert unknown.limit == "memory"


def test_cap21_price_per_million_tokens(spec):
    costs = {"h200-sxm": CostModel(usd_per_hour=3.6)}
    (row,) = plan(spec, [load_hardware("h200-sxm")], tpot_s=0.05, batch=4, costs=costs)
    assert row.usd_per_million == pytest.approx(1e6 * row.tpot_s * 0.001 / 4)


@pytest.mark.parametrize(
    "options", [{"tpot_s": 0.0}, {"tpot_s": 1.0, "s_mbu": 1.5}, {"tpot_s": 1.0, "batch": 0}]
)
def test_cap21_out_of_range(spec, options):
    with pytest.raises(ValueError, match="must"):
        plan(spec, [load_hardware("h200-sxm")], **options)


def test_cap21_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    (tmp_path / "costs.yaml").write_text("h200-sxm: {usd_per_hour: 3.6}\n")
    arguments = ["plan", str(tmp_path), "--tpot", "0.01", "--costs", str(tmp_path / "costs.yaml")]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "h200-sxm" in text
    assert "bandwidth" in text
    assert "the bound that no engine can beat" in text
    (tmp_path / "costs.yaml").write_text("h200-sxm: {usd_per_hor: 3.6}\n")
    assert main(arguments) == 2
    assert "did you mean 'usd_per_hour'?" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none"), "--tpot", "0.01"]) == 2

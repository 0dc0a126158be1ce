"""The plugin's workload: options, counters and memory on a real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moecap_eval import ArmConfig, RunContext, load_hardware
from vllm_moe_offload.moecap_workloads import GenerateWorkload, OffloadSystem, offload_options

HARDWARE = load_hardware("cpu-reference")
MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe"


@pytest.fixture(scope="module")
def context() -> RunContext:
    params = {
        "model": str(MODEL / "model"),
        "tasks": str(MODEL / "tasks"),
        "limit": 12,
        "max_new_tokens": 12,
        "concurrency": 2,
    }
    return RunContext(seed=7, out_dir=Path(), hardware=HARDWARE, params=params)


def test_options_become_the_plugins() -> None:
    arm = ArmConfig("half", {"residency": 0.5, "policy": "lru", "engine": {"max_model_len": 64}})
    arguments = GenerateWorkload().engine_arguments(arm)
    assert arguments == {
        "max_model_len": 64,
        "additional_config": {"moe_offload": {"cache_fraction": 0.5, "policy": "lru"}},
    }
    assert GenerateWorkload().engine_arguments(ArmConfig("plain")) == {}
    other = ArmConfig("half", {"residency": 0.5, "engine": {"additional_config": {"other": 1}}})
    assert GenerateWorkload().engine_arguments(other)["additional_config"]["other"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "lru"}, r"arms\.x: policy needs residency"),
        ({"residency": 0.0}, "cache_fraction"),
        ({"residency": 1.5}, "cache_fraction"),
        ({"residency": 0.5, "policy": "lifo"}, "policy must be one of"),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        offload_options(ArmConfig("x", options))


def test_an_unknown_option_is_refused(context: RunContext) -> None:
    with pytest.raises(ValueError, match=r"arms\.x\.residence: unknown key; did you mean 'residency'\?"):
        GenerateWorkload().open(ArmConfig("x", {"residence": 0.5}), context)


@pytest.mark.vllm
def test_cap09_plain_and_offloaded_arms(context: RunContext) -> None:
    """Equal tokens; traffic equals what the plugin counted; the pool is what hbm saves."""
    from vllm_moe_offload import stats

    workload = GenerateWorkload()
    items = workload.items(context.params, 7)
    plain = workload.open(ArmConfig("plain"), context)
    expected = plain.run(items)
    plain_memory, plain_facts = plain.memory_bytes(), plain.describe()
    plain.close()
    assert expected.values["hit_rate"] is None
    assert expected.reasons["hit_rate"] == "no expert cache in this arm"
    all_experts = 6 * 32 * 3 * 128 * 64 * 2  # layers, experts, three matrices, bfloat16
    assert expected.values["expert_memory_bytes"] == all_experts
    assert all(step.invalid is None for step in expected.steps)

    system = workload.open(ArmConfig("half", {"residency": 0.5}), context)
    assert isinstance(system, OffloadSystem)
    system.warm_up(items)
    before = stats(system.llm)[0]
    result = system.run(items)
    after = stats(system.llm)[0]
    assert result.values["expert_memory_bytes"] == all_experts // 2
    memory, facts = system.memory_bytes(), system.describe()
    system.close()

    assert [sample.digest for sample in result.samples] == [sample.digest for sample in expected.samples]
    copies = after["copies"] - before["copies"]
    assert copies > 0
    moved = sum(step.moved_bytes["dram->hbm"] for step in result.steps)
    assert moved == copies * after["expert_nbytes"]
    accesses = after["accesses"] - before["accesses"]
    assert result.values["hit_rate"] == (after["hits"] - before["hits"]) / accesses
    # The plugin asks once for each distinct expert of a layer and pass: exactly what the routers show.
    assert accesses == sum(sum(step.experts_touched.values()) for step in result.steps)
    assert all(step.invalid is None for step in result.steps)

    expert_bytes = after["expert_nbytes"] * after["num_layers"] * after["num_experts"]
    slot_bytes = after["expert_nbytes"] * after["num_slots"]
    assert memory["dram"] == expert_bytes
    assert plain_memory["hbm"] - memory["hbm"] == expert_bytes - slot_bytes
    assert facts["moe_offload"]["num_slots"] == after["num_slots"]
    assert "hbm_means" in plain_facts
    assert json.loads(json.dumps(facts)) == facts

"""CAP-22: fewer experts per token read fewer bytes and answer worse, on the model of the examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecap_eval import ArmConfig, RunContext, load_config, load_hardware, step_bytes
from moecap_eval.engines import vllm as engine
from moecap_eval.stats import judge, paired_difference
from moecap_eval.workloads.text_generation import TextGeneration

EXAMPLE = Path(__file__).parents[2] / "examples" / "fewer_experts.yaml"


@pytest.mark.vllm
def test_cap22_one_expert_of_four_reads_less_and_is_worse() -> None:
    """Two of four lose less than one in a hundred answers, which 384 items cannot tell from none."""
    config, workload = load_config(EXAMPLE, overrides={"params.limit": 192}), TextGeneration()
    params = {name: value for name, value in config.params.items() if name != "seed"}
    context = RunContext(config.seed, Path(), load_hardware("cpu-reference"), params)
    items = workload.items(params, config.seed)
    scores, experts_per_token = {}, {}
    for arm in (config.arms[0], ArmConfig("top-1", {"engine": {"hf_overrides": {"num_experts_per_tok": 1}}})):
        system = workload.open(arm, context)
        spec, result = engine.model_spec(system.llm), system.run(items)
        scores[arm.name] = {sample.item_id: sample.values["exact_match"] for sample in result.samples}
        read = sum(step_bytes(spec, step)["routed_experts"] for step in result.steps)
        experts_per_token[arm.name] = read / sum(step.tokens for step in result.steps)
        system.close()
    assert experts_per_token["top-1"] < 0.6 * experts_per_token["top-4"]
    lost = paired_difference(scores["top-4"], scores["top-1"])
    (axis,) = (axis for axis in workload.axes_for(params) if axis.name == "exact_match")
    assert judge(lost, axis, effect="difference") == "worse", lost

"""CAP-26: Transformers gives the same answers and the same records of its passes as vLLM, on a real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moecap_eval import ArmConfig, RunContext, load_hardware, step_bytes, step_flops
from moecap_eval.engines import hf
from moecap_eval.engines import vllm as vllm_engine
from moecap_eval.workload import StepRecord
from moecap_eval.workloads.text_generation import TextGeneration

TINY_MOE = Path(__file__).parents[2] / "examples" / "tiny_moe"
# Both compute in float32, where no choice on the way is too close for two implementations.
EQUAL_LENGTHS = ["sort 40712=", "sort 88123=", "sort 90210=", "sort 13579="]
MIXED_LENGTHS = ["add 17+5=", "sort 40712=", "rev harbour=", "max 512 88=", "rot 3 word="]
TOKENS = 6


@pytest.fixture(scope="module")
def engine() -> hf.HfEngine:
    return hf.open_engine(str(TINY_MOE / "model"), dtype="float32", max_num_seqs=8)


@pytest.fixture(scope="module")
def from_vllm() -> Iterator[dict[str, tuple]]:
    llm = vllm_engine.open_llm(
        str(TINY_MOE / "model"),
        dtype="float32",
        max_num_seqs=8,
        enable_prefix_caching=False,
        max_model_len=128,
    )
    found = {}
    for name, prompts in (("equal", EQUAL_LENGTHS), ("mixed", MIXED_LENGTHS)):
        answers = vllm_engine.generate(llm, prompts, max_new_tokens=TOKENS)
        found[name] = answers, vllm_engine.drain_steps(llm), vllm_engine.model_spec(llm)
    yield found
    vllm_engine.close(llm)


def comparable(step: StepRecord) -> StepRecord:
    """Without the time, and without experts that padding alone loads: vLLM pads nothing on a CPU."""
    return dataclasses.replace(step, duration_s=0.0, experts_loaded=None)


@pytest.mark.vllm
@pytest.mark.parametrize(("name", "prompts"), [("equal", EQUAL_LENGTHS), ("mixed", MIXED_LENGTHS)])
def test_cap26_answers_and_passes_equal_those_of_vllm(
    engine: hf.HfEngine, from_vllm: dict, name: str, prompts: list[str]
) -> None:
    expected, steps, spec = from_vllm[name]
    hf.drain_steps(engine)
    answers = hf.generate(engine, prompts, max_new_tokens=TOKENS)
    found = hf.drain_steps(engine)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert [comparable(step) for step in found] == [comparable(step) for step in steps]
    assert hf.model_spec(engine) == spec
    for mine, theirs in zip(found, steps, strict=True):
        assert mine.invalid is None
        assert mine.duration_s > 0
        assert step_flops(spec, mine) == step_flops(spec, theirs)
        assert step_bytes(spec, mine) == step_bytes(spec, theirs)
        if name == "equal" or mine.tokens == mine.requests:
            assert mine.experts_loaded is None  # nothing is padded


def test_cap26_experts_of_padding_are_read_and_route_nothing(engine: hf.HfEngine) -> None:
    """A short prompt beside a long one: its own tokens and the padding before them, row by row."""
    hf.drain_steps(engine)
    hf.generate(engine, ["1=", "sort 40712="], max_new_tokens=1)
    (together,) = hf.drain_steps(engine)
    layers: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda module, inputs, output: layers.append(output[-1].clone()))
        for router in hf._routers(engine.model)
    ]
    hf.generate(engine, ["1=", "sort 40712="], max_new_tokens=1)
    for hook in hooks:
        hook.remove()
    hf.drain_steps(engine)
    padding = 12 - 3  # with a leading BOS each
    loaded = dict(enumerate(ids.unique().numel() for ids in layers))
    touched = dict(enumerate(ids[padding:].unique().numel() for ids in layers))
    assert together.tokens == 3 + 12
    assert together.experts_touched == touched
    assert (together.experts_loaded or touched) == loaded
    assert loaded != touched, "the padding of these prompts reads no expert of its own: choose others"


def test_cap26_groups_change_no_answer(engine: hf.HfEngine) -> None:
    """Two at a time, and as many as fit few rows: the same tokens, in more passes."""
    together = [answer.token_ids for answer in hf.generate(engine, MIXED_LENGTHS, max_new_tokens=TOKENS)]
    hf.drain_steps(engine)
    limits = engine.max_num_seqs, engine.max_num_batched_tokens
    try:
        for engine.max_num_seqs, engine.max_num_batched_tokens in ((2, 8192), (8, 30)):
            apart = hf.generate(engine, MIXED_LENGTHS, max_new_tokens=TOKENS)
            assert [answer.token_ids for answer in apart] == together
            assert max(step.requests for step in hf.drain_steps(engine)) == 2
        engine.max_num_batched_tokens = 8
        with pytest.raises(ValueError, match=r"more than max_num_batched_tokens = 8: raise it"):
            hf.generate(engine, MIXED_LENGTHS, max_new_tokens=TOKENS)
    finally:
        engine.max_num_seqs, engine.max_num_batched_tokens = limits


def test_cap26_each_request_has_its_own_limit_and_stops(engine: hf.HfEngine) -> None:
    whole = hf.generate(engine, EQUAL_LENGTHS[:1], max_new_tokens=TOKENS)[0]
    assert len(whole.text) >= 4
    word = whole.text[2]
    end = whole.text.index(word)
    limits, stops = [2, TOKENS], [(), (word,)]
    short, stopped = hf.generate(engine, EQUAL_LENGTHS[:1] * 2, max_new_tokens=limits, stop=stops)
    assert short.token_ids == whole.token_ids[:2]
    assert stopped.text == whole.text[:end]
    assert stopped.token_ids == whole.token_ids[: end + 1]
    assert short.ttft_s > 0
    assert short.tpot_s > 0


def test_cap26_a_model_whose_routers_are_elsewhere_is_refused(engine: hf.HfEngine, monkeypatch) -> None:
    monkeypatch.setattr(hf, "_ROUTER_SUFFIX", "Nowhere")
    with pytest.raises(RuntimeError, match=r"6 MoE layers but 0 modules named \*Nowhere"):
        hf.HfEngine(engine.model, engine.tokenizer, 8, 64)


def test_cap26_an_arm_of_the_text_workload() -> None:
    params = {
        "model": str(TINY_MOE / "model"),
        "tasks": str(TINY_MOE / "tasks" / "sort.jsonl"),
        "limit": 6,
        "max_new_tokens": 8,
        "concurrency": 4,
    }
    context = RunContext(seed=1, out_dir=Path(), hardware=load_hardware("cpu-reference"), params=params)
    workload, arm = TextGeneration(), ArmConfig("hf", {"engine": "transformers"})
    items = workload.items(params, 1)
    system = workload.open(arm, context)
    result = system.run(items)
    assert sum(step.sampled_tokens for step in result.steps) == result.work
    assert [sample.item_id for sample in result.samples] == [item.id for item in items]
    assert result.values["s_mbu"] > 0
    weights = sum(parameter.nbytes for parameter in system.llm.model.parameters())
    assert system.memory_bytes()["dram"] > weights
    assert system.describe()["engine"].startswith("transformers ")
    system.close()
    with pytest.raises(ValueError, match=r"arms\.hf: params\.arrivals needs vLLM"):
        workload.open(arm, dataclasses.replace(context, params={**params, "arrivals": {"rate": 1.0}}))
    with pytest.raises(ValueError, match="must be transformers or map"):
        workload.open(ArmConfig("x", {"engine": "sglang"}), context)


@pytest.mark.gpu
def test_cap26_records_on_a_gpu(engine: hf.HfEngine) -> None:
    assert engine.model.device.type == "cuda"
    hf.generate(engine, MIXED_LENGTHS, max_new_tokens=TOKENS)
    assert not any(step.invalid for step in hf.drain_steps(engine))
    assert torch.cuda.memory_allocated() == hf.memory_bytes(engine)["hbm"]

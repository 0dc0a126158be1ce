"""CAP-24: with speculative decoding, draft bytes count and tokens are the accepted ones."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from moecap_eval.accounting import draft_bytes, s_mbu, s_mfu, step_bytes, step_flops
from moecap_eval.engines import vllm as engine
from moecap_eval.model_spec import ModelSpec
from moecap_eval.workload import StepRecord

sys.path.insert(0, str(Path(__file__).parent))
import tiny_configs as tiny
from test_accounting import TouchedParameters

DRAFTS = 3
# Drafts accepted in each pass, for two requests with 10 and 20 tokens before the first one.
ACCEPTED = ([3, 0, 2], [1, 1, 3])
PAST = (10, 20)


def spec_of(family: str) -> ModelSpec:
    return ModelSpec.from_config(tiny.random_config(family, 1).to_dict(), weight_dtype="float32")


def speculative_passes(spec: ModelSpec, draft: ModelSpec) -> list[StepRecord]:
    """Each pass checks three drafts of each request; what it accepts decides where the next one begins."""
    past, steps = list(PAST), []
    for accepted in zip(*ACCEPTED, strict=True):
        rows = 1 + DRAFTS
        step = StepRecord(
            duration_s=0.5,
            tokens=2 * rows,
            requests=2,
            sampled_tokens=2 * rows,
            distinct_tokens=5,
            kv_tokens_read=sum(before + rows for before in past),
            attended_positions=sum(before * rows + rows * (rows + 1) // 2 for before in past),
            experts_touched=dict.fromkeys(spec.moe_layers, 3),
            accepted_tokens=sum(1 + count for count in accepted),
        )
        steps.append(replace(step, draft_bytes=draft_bytes(draft, step, DRAFTS)))
        past = [before + 1 + count for before, count in zip(past, accepted, strict=True)]
    return steps


def test_cap24_draft_bytes_equal_what_the_draft_model_touches() -> None:
    """The draft model really proposes three tokens: one pass over the checked rows, two of a row each."""
    config = tiny.random_config("qwen3", 2)
    model, spec = tiny.build_model(config), ModelSpec.from_config(config.to_dict(), weight_dtype="float32")
    ids, touched = torch.arange(9)[None] % config.vocab_size, 0
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        rows = ids[:, 5:]  # four rows, as the target checked them
        for _ in range(DRAFTS):
            with TouchedParameters(model) as parameters:
                output = model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
            touched += parameters.nbytes
            rows = output.logits[:, -1].argmax(-1, keepdim=True)
    step = StepRecord(1.0, 4, 1, 4, ids[:, 5:].unique().numel(), 9, 5 * 4 + 10, {})
    cache_bytes = sum((9 + index) * spec.kv_bytes_per_token for index in range(DRAFTS))
    assert draft_bytes(spec, step, DRAFTS) == touched + cache_bytes


def test_cap24_a_fixed_acceptance_sequence() -> None:
    spec, draft = spec_of("qwen3_moe"), spec_of("qwen3")
    steps = speculative_passes(spec, draft)
    assert [step.accepted_tokens for step in steps] == [6, 3, 7]
    target = sum(step_bytes(spec, replace(step, draft_bytes=0)).total for step in steps)
    drafts = sum(step.draft_bytes for step in steps)
    assert drafts > 0
    assert sum(step_bytes(spec, step)["draft"] for step in steps) == drafts
    assert s_mbu(spec, steps, 1e12) == pytest.approx((target + drafts) / 1.5 / 1e12, rel=1e-12)
    assert "draft" not in step_bytes(spec, steps[0], convention="paper")


def test_cap24_useful_operations_are_those_of_the_accepted_tokens() -> None:
    """Outside of attention, decoding the same 16 tokens one by one takes exactly the same operations."""
    spec = spec_of("qwen3_moe")
    steps = speculative_passes(spec, spec_of("qwen3"))
    one = StepRecord(1.0, 1, 1, 1, 1, 1, 1, dict.fromkeys(spec.moe_layers, spec.top_k))
    plain = step_flops(spec, one)
    linear = 16 * (plain.total - plain["attention_scores"])
    pair_flops = sum(layer.pair_flops for layer in spec.layers)
    pairs = sum(round(step.attended_positions * step.accepted_tokens / step.tokens) for step in steps)
    seconds = sum(step.duration_s for step in steps)
    useful = s_mfu(spec, steps, 1e15) * 1e15 * seconds
    assert useful == pytest.approx(linear + pairs * pair_flops, rel=1e-12)
    every_row = [replace(step, accepted_tokens=None) for step in steps]
    assert s_mfu(spec, every_row, 1e15) > s_mfu(spec, steps, 1e15)


def test_cap24_moe_drafts_are_refused() -> None:
    spec = spec_of("qwen3_moe")
    step = StepRecord(1.0, 4, 1, 4, 4, 9, 30, dict.fromkeys(spec.moe_layers, 3))
    with pytest.raises(ValueError, match="draft model has MoE layers, whose routing is not recorded"):
        draft_bytes(spec, step, 2)


def save_dense_draft(folder: Path) -> Path:
    """A random Qwen3 with the vocabulary of the random Qwen3-MoE."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 256}
    config = transformers.AutoConfig.for_model("qwen3", **sizes, **heads, **special)
    tiny.build_model(config).to(torch.bfloat16).save_pretrained(folder)
    tiny.save_character_tokenizer(folder)
    return folder


@pytest.mark.vllm
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_cap24_accepted_tokens_of_a_real_engine(method: str, tmp_path: Path) -> None:
    """Whatever is accepted: every pass states how many sampled tokens stand, and what drafts cost."""
    model = tiny.save_random_model(tmp_path / "model")
    speculative = {"method": method, "num_speculative_tokens": DRAFTS}
    if method == "draft_model":
        speculative["model"] = str(save_dense_draft(tmp_path / "draft"))
    else:
        speculative |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = engine.open_llm(
        str(model), max_model_len=128, max_num_seqs=4, speculative_config=speculative, seed=0
    )
    prompts = ["abababab", "xyz", "qqqqqq"]
    answers = engine.generate(llm, prompts, max_new_tokens=24)
    steps = engine.drain_steps(llm)
    engine.close(llm)
    assert sum(step.accepted_tokens for step in steps) >= sum(len(answer.token_ids) for answer in answers)
    checked = [step for step in steps if step.sampled_tokens > step.requests]
    assert checked, "no draft was ever checked"
    for step in steps:
        assert step.requests <= step.accepted_tokens <= step.sampled_tokens
        assert step.invalid is None
        assert (step.draft_bytes > 0) == (method == "draft_model")

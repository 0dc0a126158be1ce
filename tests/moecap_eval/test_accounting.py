"""Bytes against touched parameters, FLOPs against PyTorch's counter, utilisations against hand sums."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from moecap_eval.accounting import clip_to_window, mbu, mfu, s_mbu, s_mfu, step_bytes, step_flops
from moecap_eval.model_spec import ModelSpec
from moecap_eval.workload import StepRecord

sys.path.insert(0, str(Path(__file__).parent))
import tiny_configs as tiny

MOE_FAMILIES = sorted(set(tiny.FAMILIES) - {"llama", "qwen2", "qwen3"})


class TouchedParameters(TorchDispatchMode):
    """Marks every element of a parameter or persistent buffer that a computing operation reads."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
        self._masks = {
            tensor.untyped_storage().data_ptr(): (torch.zeros(tensor.numel(), dtype=torch.bool), tensor)
            for tensor in tensors
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(value.alias_info is not None for value in func._schema.returns)
        if is_view:
            return result
        if func is torch.ops.aten.embedding.default:
            self._mark_rows(args[0], args[1])
        elif func is torch.ops.aten.index.Tensor:
            self._mark_rows(args[0], args[1][0])
        else:
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, torch.Tensor):
                    self._mark_view(leaf)
        return result

    def _mark_view(self, tensor: torch.Tensor) -> None:
        entry = self._masks.get(tensor.untyped_storage().data_ptr())
        if entry is not None and tensor.numel():
            mask = torch.as_strided(entry[0], tensor.shape, tensor.stride(), tensor.storage_offset())
            mask.fill_(True)

    def _mark_rows(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        for row in rows.reshape(-1).unique():
            self._mark_view(tensor[int(row)])

    @property
    def nbytes(self) -> int:
        return sum(int(mask.sum()) * tensor.element_size() for mask, tensor in self._masks.values())


@contextmanager
def routed_experts(model: torch.nn.Module, spec: ModelSpec) -> Iterator[dict[int, int]]:
    """Distinct experts per MoE layer, read from the routers' own outputs during the block."""
    touched: dict[int, int] = {}
    handles = []
    for index in spec.moe_layers:
        mlp = model.model.layers[index].mlp
        router = mlp.gate if hasattr(mlp, "gate") else mlp.router

        def note(_module, _args, output, index=index):
            touched[index] = output[2].unique().numel()

        handles.append(router.register_forward_hook(note))
    yield touched
    for handle in handles:
        handle.remove()


def decode_pass(family: str, seed: int, batch: int, past: int, **changes):
    """One real decode pass: its spec, its record, the bytes of the parameters it touched."""
    config = tiny.random_config(family, seed, **changes)
    model, spec = tiny.build_model(config), ModelSpec.from_config(config.to_dict(), weight_dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (batch, past + 1), generator=generator)
    with torch.no_grad(), routed_experts(model, spec) as experts:
        cache = model(ids[:, :past], use_cache=True).past_key_values
        with TouchedParameters(model) as touched:
            model(ids[:, past:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    step = StepRecord(
        duration_s=1.0,
        tokens=batch,
        requests=batch,
        sampled_tokens=batch,
        distinct_tokens=ids[:, past:].unique().numel(),
        kv_tokens_read=batch * (past + 1),
        attended_positions=batch * (past + 1),
        experts_touched=dict(experts),
    )
    return spec, step, touched.nbytes


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cap05_decode_bytes_equal_touched_parameters(family: str, batch: int) -> None:
    spec, step, touched = decode_pass(family, seed=batch, batch=batch, past=5)
    parts = step_bytes(spec, step)
    assert parts.total - parts["kv_cache"] == touched


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_cap05_tied_and_untied_heads(seed: int, tied: bool) -> None:
    spec, step, touched = decode_pass("qwen3_moe", seed, batch=2, past=3, tie_word_embeddings=tied)
    parts = step_bytes(spec, step)
    assert parts.total - parts["kv_cache"] == touched


@pytest.mark.parametrize("samples", [True, False])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cap05_prefill_bytes_equal_touched_parameters(family: str, samples: bool) -> None:
    """A pass that samples reads the head; one that does not sample reads no head."""
    config = tiny.random_config(family, 8)
    model, spec = tiny.build_model(config), ModelSpec.from_config(config.to_dict(), weight_dtype="float32")
    ids = torch.randint(0, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(8))
    run = (lambda: model(ids, use_cache=False, logits_to_keep=1)) if samples else (lambda: model.model(ids))
    with torch.no_grad(), routed_experts(model, spec) as experts, TouchedParameters(model) as touched:
        run()
    step = StepRecord(1.0, 9, 1, int(samples), ids.unique().numel(), 9, 45, dict(experts))
    parts = step_bytes(spec, step)
    assert parts.total - parts["kv_cache"] == touched.nbytes


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cap05_cache_bytes_equal_the_stored_cache(family: str) -> None:
    changes = {"sliding_window": 4096, "layer_types": None} if family == "gpt_oss" else {}
    config = tiny.random_config(family, 5, **changes)
    model, spec = tiny.build_model(config), ModelSpec.from_config(config.to_dict(), weight_dtype="float32")
    with torch.no_grad():
        cache = model(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
    stored = sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )
    assert spec.kv_bytes_per_token * 2 * 7 == stored


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cap06_flops_equal_the_counter(family: str, tokens: int) -> None:
    changes = {"sliding_window": 4096, "layer_types": None} if family == "gpt_oss" else {}
    config = tiny.random_config(family, tokens, **changes)
    model, spec = tiny.build_model(config), ModelSpec.from_config(config.to_dict())
    ids = torch.arange(tokens).reshape(1, -1) % config.vocab_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False, logits_to_keep=1)
    causal = tokens * (tokens + 1) // 2
    step = StepRecord(1.0, tokens, 1, 1, tokens, tokens, causal, dict.fromkeys(spec.moe_layers, 1))
    pair_flops = sum(layer.pair_flops for layer in spec.layers)
    eager_square = pair_flops * (tokens * tokens - causal)
    assert step_flops(spec, step).total + eager_square == counter.get_total_flops()


def test_cap05_cap06_reference_models() -> None:
    qwen = ModelSpec.from_config(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "vocab_size": 151936,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        }
    )
    step = StepRecord(1.0, 1, 1, 1, 1, 1000, 1000, dict.fromkeys(qwen.moe_layers, 8))
    parts = step_bytes(qwen, step)
    assert (parts.total - parts["kv_cache"]) // 2 == 3_041_869_824
    assert parts["kv_cache"] == 98_304 * 1000
    assert step_flops(qwen, step).total == 6_869_745_664


def test_cap05_paper_convention_is_equation_4() -> None:
    spec, step, _ = decode_pass("deepseek_v3", seed=1, batch=4, past=5)
    paper, exact = step_bytes(spec, step, convention="paper"), step_bytes(spec, step)
    kept = {"attention", "dense_ffn", "routed_experts", "shared_experts", "kv_cache"}
    assert {key for key, value in paper.items() if value} <= kept
    assert all(paper[key] == exact[key] for key in kept)
    assert paper.total < exact.total


def test_cap05_loaded_convention_counts_padding_experts() -> None:
    spec, step, _ = decode_pass("mixtral", seed=1, batch=1, past=5)
    padded = replace(step, experts_loaded=dict.fromkeys(spec.moe_layers, spec.num_experts))
    extra = sum(
        (layer.num_experts - step.experts_touched[layer.index]) * layer.expert_bytes for layer in spec.layers
    )
    assert step_bytes(spec, padded).total == step_bytes(spec, step).total
    assert step_bytes(spec, padded, convention="loaded").total == step_bytes(spec, step).total + extra


@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (0, 3), (0, 9), (2, 5), (8, 1), (8, 6)])
def test_sliding_window_pairs_by_enumeration(past: int, tokens: int) -> None:
    spec = ModelSpec.from_config(
        tiny.random_config("mixtral", 0, num_hidden_layers=1, sliding_window=4).to_dict()
    )
    layer = spec.layers[0]
    pairs = {
        (query, key)
        for query in range(past, past + tokens)
        for key in range(past + tokens)
        if key <= query < key + 4
    }
    causal = tokens * past + tokens * (tokens + 1) // 2
    step = StepRecord(1.0, tokens, 1, 1, tokens, past + tokens, causal, {0: 1})
    assert step_flops(spec, step)["attention_scores"] == layer.pair_flops * len(pairs)
    assert step_bytes(spec, step)["kv_cache"] == layer.kv_bytes * len({key for _, key in pairs})


def test_sliding_windows_are_clipped_request_by_request() -> None:
    """Three requests of one pass: enumeration, which the sum over requests alone cannot give."""
    config = tiny.random_config("mixtral", 0, num_hidden_layers=1, sliding_window=4)
    spec, requests = ModelSpec.from_config(config.to_dict()), [(0, 9), (7, 1), (2, 3)]
    layer, windowed = spec.layers[0], [clip_to_window(past, tokens, 4) for past, tokens in requests]
    seen = [
        {(q, k) for q in range(past, past + tokens) for k in range(past + tokens) if k <= q < k + 4}
        for past, tokens in requests
    ]
    assert windowed == [(len({key for _, key in pairs}), len(pairs)) for pairs in seen]
    rows = sum(tokens for _, tokens in requests)
    total = sum(past + tokens for past, tokens in requests)
    causal = sum(tokens * past + tokens * (tokens + 1) // 2 for past, tokens in requests)
    sums = tuple(map(sum, zip(*windowed, strict=True)))
    step = StepRecord(1.0, rows, 3, 3, rows, total, causal, {0: 1}, windowed={4: sums})
    assert step_flops(spec, step)["attention_scores"] == layer.pair_flops * sums[1]
    assert step_bytes(spec, step)["kv_cache"] == layer.kv_bytes * sums[0]
    bound = replace(step, windowed={})
    assert step_flops(spec, bound)["attention_scores"] > step_flops(spec, step)["attention_scores"]


def test_cap07_ratio_of_sums() -> None:
    spec, step, _ = decode_pass("qwen3_moe", seed=1, batch=2, past=5)
    steps = [replace(step, duration_s=0.25), replace(step, duration_s=0.75)]
    nbytes, flops = step_bytes(spec, step).total, step_flops(spec, step).total
    assert s_mbu(spec, steps, 10.0 * nbytes) == pytest.approx(2 * nbytes / 1.0 / (10.0 * nbytes), rel=1e-12)
    assert s_mfu(spec, steps, 10.0 * flops) == pytest.approx(0.2, rel=1e-12)
    assert mbu(spec, steps, 10.0 * nbytes) > s_mbu(spec, steps, 10.0 * nbytes)
    assert mfu(spec, steps, 10.0 * flops) > s_mfu(spec, steps, 10.0 * flops)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_cap07_dense_models_have_equal_utilisations(family: str) -> None:
    spec, step, _ = decode_pass(family, seed=3, batch=4, past=5)
    assert s_mbu(spec, [step], 1e9) == mbu(spec, [step], 1e9)
    assert s_mfu(spec, [step], 1e9) == mfu(spec, [step], 1e9)


def test_cap07_impossible_or_unknown_utilisation_is_an_error() -> None:
    spec, step, _ = decode_pass("qwen3_moe", seed=1, batch=2, past=5)
    nbytes = step_bytes(spec, step).total
    with pytest.raises(ValueError, match=r"S-MBU 1\.130 > 1: peak .* too low or the model fits in the cache"):
        s_mbu(spec, [step], nbytes / 1.13)
    with pytest.raises(ValueError, match=r"S-MFU .* > 1"):
        s_mfu(spec, [step], 1.0)
    with pytest.raises(ValueError, match=r"MBU .* > 1: .* counts experts that no token used \(see S-MBU\)"):
        mbu(spec, [step], nbytes * 1.01)
    with pytest.raises(ValueError, match="a pass is invalid: layer 0 saw 3 of 8"):
        s_mbu(spec, [step, replace(step, invalid="layer 0 saw 3 of 8")], 1e12)
    with pytest.raises(ValueError, match="no passes were recorded"):
        s_mbu(spec, [], 1e12)
    with pytest.raises(ValueError, match="peak must be positive"):
        s_mbu(spec, [step], 0.0)
    with pytest.raises(ValueError, match="no expert count for MoE layer"):
        step_bytes(spec, replace(step, experts_touched={}))
    with pytest.raises(ValueError, match="distinct experts of"):
        step_bytes(spec, replace(step, experts_touched=dict.fromkeys(spec.moe_layers, 999)))

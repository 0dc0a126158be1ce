"""The weights of each supported family, derived from its configuration alone.

One function a family returns the blueprint of a layer: its tensors, cached elements and attention cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Weight:
    """One tensor of the model, or ``copies`` equal ones (one per expert).

    ``matrix`` marks what a token is multiplied with; ``linear`` marks what quantisation schemes convert.
    """

    name: str
    component: str
    shape: tuple[int, ...]
    copies: int = 1
    matrix: bool = False
    linear: bool = False
    dtype: str | None = None

    @property
    def elements(self) -> int:
        """Elements of one copy."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayerBlueprint:
    """One layer: its tensors, cached elements per token, cost of a (query, key) pair, sliding window."""

    weights: tuple[Weight, ...]
    num_experts: int
    top_k: int
    kv_elements: int
    pair_flops: int
    window: int | None


@dataclass(frozen=True)
class Blueprint:
    """A model before dtypes are known; embedding, final norm and head follow from the sizes."""

    model_type: str
    hidden_size: int
    vocab_size: int
    tied: bool
    layers: tuple[LayerBlueprint, ...]


@dataclass(frozen=True)
class _Attention:
    weights: tuple[Weight, ...]
    kv_elements: int
    pair_flops: int


class _Config:
    """Keys of a configuration, with an error that names the missing one."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def integer(self, *names: str, default: int | None = None) -> int:
        for name in names:
            if self._data.get(name) is not None:
                return int(self._data[name])
        if default is None:
            raise ValueError(f"config.json of model_type {self._data.get('model_type')!r} lacks {names[0]!r}")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._data.get(name)
        return default if value is None else bool(value)

    def get(self, name: str) -> Any:
        return self._data.get(name)


def _linear(name: str, component: str, rows: int, cols: int, *, bias: bool = False) -> tuple[Weight, ...]:
    weight = Weight(f"{name}.weight", component, (rows, cols), matrix=True, linear=True)
    return (weight, Weight(f"{name}.bias", component, (rows,))) if bias else (weight,)


def _norm(name: str, size: int) -> Weight:
    return Weight(f"{name}.weight", "norm", (size,))


def _grouped_query_attention(
    config: _Config,
    *,
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norm: bool = False,
    full_norm: bool = False,
    sinks: bool = False,
) -> _Attention:
    """Grouped-query attention; ``head_norm`` is Qwen3's, ``full_norm`` OLMoE's."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    head_dim = config.integer("head_dim", default=default_head_dim or hidden // heads)
    weights = [
        *_linear("self_attn.q_proj", "attention", heads * head_dim, hidden, bias=qkv_bias),
        *_linear("self_attn.k_proj", "attention", kv_heads * head_dim, hidden, bias=qkv_bias),
        *_linear("self_attn.v_proj", "attention", kv_heads * head_dim, hidden, bias=qkv_bias),
        *_linear("self_attn.o_proj", "attention", hidden, heads * head_dim, bias=output_bias),
    ]
    if head_norm:
        weights += [_norm("self_attn.q_norm", head_dim), _norm("self_attn.k_norm", head_dim)]
    if full_norm:
        weights += [_norm("self_attn.q_norm", hidden), _norm("self_attn.k_norm", hidden // heads * kv_heads)]
    if sinks:
        weights.append(Weight("self_attn.sinks", "attention", (heads,)))
    return _Attention(tuple(weights), 2 * kv_heads * head_dim, 4 * heads * head_dim)


def _latent_attention(config: _Config) -> _Attention:
    """Multi-head latent attention (MLA): the cache holds the latent and one rotary key."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    rank, query_rank = config.integer("kv_lora_rank"), config.get("q_lora_rank")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value = config.integer("v_head_dim")
    bias = config.flag("attention_bias")
    if query_rank is None:
        query = _linear("self_attn.q_proj", "attention", heads * (nope + rope), hidden)
    else:
        query = (
            *_linear("self_attn.q_a_proj", "attention", query_rank, hidden, bias=bias),
            _norm("self_attn.q_a_layernorm", query_rank),
            *_linear("self_attn.q_b_proj", "attention", heads * (nope + rope), query_rank),
        )
    weights = (
        *query,
        *_linear("self_attn.kv_a_proj_with_mqa", "attention", rank + rope, hidden, bias=bias),
        _norm("self_attn.kv_a_layernorm", rank),
        *_linear("self_attn.kv_b_proj", "attention", heads * (nope + value), rank),
        *_linear("self_attn.o_proj", "attention", hidden, heads * value, bias=bias),
    )
    return _Attention(weights, rank + rope, 2 * heads * (nope + rope + value))


def _gated_ffn(
    name: str, component: str, hidden: int, intermediate: int, *, bias: bool = False
) -> tuple[Weight, ...]:
    return (
        *_linear(f"{name}.gate_proj", component, intermediate, hidden, bias=bias),
        *_linear(f"{name}.up_proj", component, intermediate, hidden, bias=bias),
        *_linear(f"{name}.down_proj", component, hidden, intermediate, bias=bias),
    )


def _experts(hidden: int, intermediate: int, count: int) -> tuple[Weight, ...]:
    return tuple(
        replace(weight, copies=count)
        for weight in _gated_ffn("mlp.experts.*", "routed_experts", hidden, intermediate)
    )


def _router(hidden: int, count: int) -> Weight:
    return Weight("mlp.gate.weight", "router", (count, hidden), matrix=True)


def _layer(
    config: _Config,
    attention: _Attention,
    ffn: tuple[Weight, ...],
    *,
    num_experts: int = 0,
    top_k: int = 0,
    window: int | None = None,
) -> LayerBlueprint:
    hidden = config.integer("hidden_size")
    norms = (_norm("input_layernorm", hidden), _norm("post_attention_layernorm", hidden))
    weights = (*attention.weights, *norms, *ffn)
    return LayerBlueprint(weights, num_experts, top_k, attention.kv_elements, attention.pair_flops, window)


def _window(config: _Config, index: int, default_kind: str) -> int | None:
    """Sliding window of a layer whose kind ``layer_types`` may state."""
    kinds = config.get("layer_types")
    kind = kinds[index] if kinds else default_kind
    return config.get("sliding_window") or None if kind == "sliding_attention" else None


def _dense_layer(config: _Config, index: int) -> LayerBlueprint:
    """Llama, Qwen2 and Qwen3."""
    family = config.get("model_type")
    bias = config.flag("attention_bias")
    if family == "qwen2":
        attention = _grouped_query_attention(config, qkv_bias=True)
    elif family == "qwen3":
        attention = _grouped_query_attention(
            config, default_head_dim=128, qkv_bias=bias, output_bias=bias, head_norm=True
        )
    else:
        attention = _grouped_query_attention(config, qkv_bias=bias, output_bias=bias)
    ffn = _gated_ffn(
        "mlp",
        "dense_ffn",
        config.integer("hidden_size"),
        config.integer("intermediate_size"),
        bias=family == "llama" and config.flag("mlp_bias"),
    )
    sliding = config.flag("use_sliding_window") and index >= config.integer("max_window_layers", default=28)
    window = None
    if family != "llama" and config.flag("use_sliding_window"):
        window = _window(config, index, "sliding_attention" if sliding else "full_attention")
    return _layer(config, attention, ffn, window=window)


def _mixtral_layer(config: _Config, _index: int) -> LayerBlueprint:
    hidden, count = config.integer("hidden_size"), config.integer("num_local_experts", "num_experts")
    ffn = (_router(hidden, count), *_experts(hidden, config.integer("intermediate_size"), count))
    return _layer(
        config,
        _grouped_query_attention(config),
        ffn,
        num_experts=count,
        top_k=config.integer("num_experts_per_tok"),
        window=config.get("sliding_window"),
    )


def _olmoe_layer(config: _Config, _index: int) -> LayerBlueprint:
    hidden, count = config.integer("hidden_size"), config.integer("num_experts", "num_local_experts")
    bias = config.flag("attention_bias")
    attention = _grouped_query_attention(config, qkv_bias=bias, output_bias=bias, full_norm=True)
    ffn = (_router(hidden, count), *_experts(hidden, config.integer("intermediate_size"), count))
    return _layer(config, attention, ffn, num_experts=count, top_k=config.integer("num_experts_per_tok"))


def _qwen_moe_layer(config: _Config, index: int) -> LayerBlueprint:
    """Qwen2-MoE (shared expert with a gate) and Qwen3-MoE (none; normalised query and key heads)."""
    second = config.get("model_type") == "qwen2_moe"
    hidden, count = config.integer("hidden_size"), config.integer("num_experts", "num_local_experts")
    sliding = config.flag("use_sliding_window")
    if second:
        attention = _grouped_query_attention(config, qkv_bias=config.flag("qkv_bias", True))
        early = index % 2 == 0 and index < config.integer("max_window_layers", default=28)
        window = (
            _window(config, index, "sliding_attention" if early else "full_attention") if sliding else None
        )
    else:
        bias = config.flag("attention_bias")
        attention = _grouped_query_attention(config, qkv_bias=bias, output_bias=bias, head_norm=True)
        window = config.get("sliding_window") if sliding else None
    sparse = (index + 1) % config.integer("decoder_sparse_step", default=1) == 0
    if count == 0 or not sparse or index in (config.get("mlp_only_layers") or ()):
        dense = _gated_ffn("mlp", "dense_ffn", hidden, config.integer("intermediate_size"))
        return _layer(config, attention, dense, window=window)
    ffn = (_router(hidden, count), *_experts(hidden, config.integer("moe_intermediate_size"), count))
    if second:
        size = config.integer("shared_expert_intermediate_size")
        gate = replace(_linear("mlp.shared_expert_gate", "router", 1, hidden)[0], linear=False)
        ffn = (*ffn, *_gated_ffn("mlp.shared_expert", "shared_experts", hidden, size), gate)
    top_k = config.integer("num_experts_per_tok")
    return _layer(config, attention, ffn, num_experts=count, top_k=top_k, window=window)


def _deepseek_layer(config: _Config, index: int) -> LayerBlueprint:
    """DeepSeek V2 and V3: dense layers first, then shared and routed experts; V3 adds a selection bias."""
    hidden, count = config.integer("hidden_size"), config.integer("n_routed_experts", "num_local_experts")
    attention = _latent_attention(config)
    third = config.get("model_type") == "deepseek_v3"
    bias = not third and config.flag("mlp_bias")
    if index < config.integer("first_k_dense_replace", default=3 if third else 0):
        dense = _gated_ffn("mlp", "dense_ffn", hidden, config.integer("intermediate_size"), bias=bias)
        return _layer(config, attention, dense)
    size = config.integer("moe_intermediate_size")
    shared_size = size * config.integer("n_shared_experts")
    ffn = (
        _router(hidden, count),
        *_experts(hidden, size, count),
        *_gated_ffn("mlp.shared_experts", "shared_experts", hidden, shared_size, bias=bias),
    )
    if third:
        ffn = (*ffn, Weight("mlp.gate.e_score_correction_bias", "router", (count,), dtype="float32"))
    return _layer(config, attention, ffn, num_experts=count, top_k=config.integer("num_experts_per_tok"))


def _gpt_oss_layer(config: _Config, index: int) -> LayerBlueprint:
    """gpt-oss: attention sinks, biases everywhere, alternating windows."""
    hidden, count = config.integer("hidden_size"), config.integer("num_local_experts", "num_experts")
    size = config.integer("intermediate_size")
    bias = config.flag("attention_bias", True)
    attention = _grouped_query_attention(
        config, default_head_dim=64, qkv_bias=bias, output_bias=bias, sinks=True
    )
    experts = (
        Weight("mlp.experts.gate_up_proj", "routed_experts", (hidden, 2 * size), count, True, True),
        Weight("mlp.experts.gate_up_proj_bias", "routed_experts", (2 * size,), count),
        Weight("mlp.experts.down_proj", "routed_experts", (size, hidden), count, True, True),
        Weight("mlp.experts.down_proj_bias", "routed_experts", (hidden,), count),
    )
    router = (
        Weight("mlp.router.weight", "router", (count, hidden), matrix=True),
        Weight("mlp.router.bias", "router", (count,)),
    )
    window = _window(config, index, "sliding_attention" if index % 2 == 0 else "full_attention")
    return _layer(
        config,
        attention,
        (*router, *experts),
        num_experts=count,
        top_k=config.integer("num_experts_per_tok", "experts_per_token"),
        window=window,
    )


_FAMILIES = {
    "deepseek_v2": _deepseek_layer,
    "deepseek_v3": _deepseek_layer,
    "gpt_oss": _gpt_oss_layer,
    "llama": _dense_layer,
    "mixtral": _mixtral_layer,
    "olmoe": _olmoe_layer,
    "qwen2": _dense_layer,
    "qwen2_moe": _qwen_moe_layer,
    "qwen3": _dense_layer,
    "qwen3_moe": _qwen_moe_layer,
}


def blueprint_of(data: Mapping[str, Any]) -> Blueprint:
    """The blueprint of a configuration; ValueError names an unsupported family or a missing key."""
    family = data.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported by the accounting (supported: {', '.join(_FAMILIES)}); "
            "performance and cost can be measured without it"
        )
    config = _Config(data)
    build = _FAMILIES[family]
    layers = tuple(build(config, index) for index in range(config.integer("num_hidden_layers")))
    tied = config.flag("tie_word_embeddings")
    return Blueprint(family, config.integer("hidden_size"), config.integer("vocab_size"), tied, layers)

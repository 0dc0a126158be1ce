"""Random small configurations of every supported family, and the models they describe."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers


def _common(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([2, 4])
    return {
        "vocab_size": rng.choice([61, 97, 128]),
        "hidden_size": heads * rng.choice([8, 16]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, heads]),
        "max_position_embeddings": 512,
        "tie_word_embeddings": rng.choice([True, False]),
        "pad_token_id": None,
    }


def _llama(rng: random.Random) -> dict[str, Any]:
    return {
        **_common(rng),
        "intermediate_size": rng.choice([24, 40]),
        "attention_bias": rng.choice([True, False]),
        "mlp_bias": rng.choice([True, False]),
        "head_dim": rng.choice([None, 8]),
    }


def _qwen2(rng: random.Random) -> dict[str, Any]:
    return {**_common(rng), "intermediate_size": rng.choice([24, 40])}


def _qwen3(rng: random.Random) -> dict[str, Any]:
    bias = rng.choice([True, False])
    return {**_common(rng), "intermediate_size": 24, "head_dim": rng.choice([8, 24]), "attention_bias": bias}


def _mixtral(rng: random.Random) -> dict[str, Any]:
    return {
        **_common(rng),
        "intermediate_size": rng.choice([24, 40]),
        "num_local_experts": rng.choice([4, 8]),
        "num_experts_per_tok": rng.choice([1, 2]),
    }


def _olmoe(rng: random.Random) -> dict[str, Any]:
    return {
        **_common(rng),
        "intermediate_size": rng.choice([16, 24]),
        "num_experts": rng.choice([4, 8]),
        "num_experts_per_tok": rng.choice([2, 3]),
        "attention_bias": rng.choice([True, False]),
    }


def _qwen_moe(rng: random.Random) -> dict[str, Any]:
    layers = rng.choice([2, 3])
    return {
        **_common(rng),
        "num_hidden_layers": layers,
        "intermediate_size": 40,
        "moe_intermediate_size": rng.choice([16, 24]),
        "num_experts": rng.choice([6, 8]),
        "num_experts_per_tok": rng.choice([2, 4]),
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "mlp_only_layers": rng.choice([[], [layers - 1]]),
    }


def _qwen2_moe(rng: random.Random) -> dict[str, Any]:
    return {
        **_qwen_moe(rng),
        "shared_expert_intermediate_size": rng.choice([24, 48]),
        "qkv_bias": rng.choice([True, False]),
    }


def _qwen3_moe(rng: random.Random) -> dict[str, Any]:
    return {**_qwen_moe(rng), "head_dim": rng.choice([8, 24]), "attention_bias": rng.choice([True, False])}


def _deepseek(rng: random.Random) -> dict[str, Any]:
    common = _common(rng)
    return {
        **common,
        "num_key_value_heads": common["num_attention_heads"],
        "num_hidden_layers": rng.choice([2, 3]),
        "intermediate_size": 40,
        "moe_intermediate_size": rng.choice([16, 24]),
        "n_routed_experts": 8,
        "n_shared_experts": rng.choice([1, 2]),
        "num_experts_per_tok": rng.choice([2, 3]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "q_lora_rank": rng.choice([None, 12]),
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": rng.choice([6, 8]),
        "n_group": 2,
        "topk_group": 2,
        "attention_bias": rng.choice([True, False]),
    }


def _deepseek_v2(rng: random.Random) -> dict[str, Any]:
    return {**_deepseek(rng), "mlp_bias": rng.choice([True, False]), "topk_method": "greedy"}


def _gpt_oss(rng: random.Random) -> dict[str, Any]:
    return {
        **_common(rng),
        "intermediate_size": rng.choice([16, 24]),
        "num_local_experts": rng.choice([4, 8]),
        "num_experts_per_tok": rng.choice([2, 3]),
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": None,
    }


FAMILIES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


def random_config(family: str, seed: int, **changes: Any) -> transformers.PretrainedConfig:
    """A seeded random configuration of ``family``; ``changes`` win."""
    options = {**FAMILIES[family](random.Random(seed)), **changes}
    return transformers.AutoConfig.for_model(family, **options)


def build_model(config: transformers.PretrainedConfig, device: str = "cpu") -> torch.nn.Module:
    """The Hugging Face model in float32, eager attention and eager experts."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        )
    return model.eval()


def save_character_tokenizer(folder: Path) -> None:
    """A tokenizer with one id per printable ASCII character, after three special ids."""
    vocabulary = ["<pad>", "<s>", "</s>", *(chr(code) for code in range(32, 127))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {token: index for index, token in enumerate(vocabulary)}, unk_token="<pad>"
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_random_model(folder: Path, **changes: Any) -> Path:
    """A random Qwen3-MoE checkpoint that vLLM serves on a CPU (sizes divisible by 32), with a tokenizer."""
    options = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        **changes,
    }
    model = build_model(transformers.AutoConfig.for_model("qwen3_moe", **options))
    model.to(torch.bfloat16).save_pretrained(folder)
    save_character_tokenizer(folder)
    return folder

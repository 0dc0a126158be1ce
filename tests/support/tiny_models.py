"""Tiny random models of the MoE families that vLLM serves, written to a folder; no tokenizer, no network.

``python -m tests.support.tiny_models FAMILY FOLDER`` writes one by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3")
VOCABULARY = 256
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # of 32: vLLM's CPU attention needs a multiple of 32
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_MLA: dict[str, Any] = {  # vLLM's CPU kernel for multi-head latent attention knows these sizes only
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def write_tiny_model(family: str, folder: str | Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write config and random bf16 weights of a tiny model and return its folder.

    Router weights have a standard deviation of 0.3, so that routing varies by token. ``changes`` overrides
    fields of the config, e.g. ``num_experts=16``.
    """
    import torch
    import transformers

    config = _config(transformers, family, changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            router = name.endswith(("gate.weight", "router.weight"))
            scale = 0.3 if router else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    folder = Path(folder)
    model.save_pretrained(folder)
    return folder


def _config(transformers: Any, family: str, changes: dict[str, Any]) -> Any:
    experts = {"num_experts": 8, "num_experts_per_tok": 2}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "qwen3_moe": (
            "Qwen3MoeConfig",
            {**experts, "head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
            | {"norm_topk_prob": True, "decoder_sparse_step": 1},
        ),
        "mixtral": (
            "MixtralConfig",
            {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}
            | {"sliding_window": None},
        ),
        "olmoe": ("OlmoeConfig", {**experts, "intermediate_size": 32, "num_key_value_heads": 2}),
        "gpt_oss": (
            "GptOssConfig",
            {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "intermediate_size": 64},
        ),
        "deepseek_v2": ("DeepseekV2Config", {**_MLA, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
        "deepseek_v3": (
            "DeepseekV3Config",
            {**_MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 2, "topk_group": 1},
        ),
    }
    if family not in configs:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    name, fields = configs[family]
    return getattr(transformers, name)(**(_SHAPE | fields | changes))


if __name__ == "__main__":
    print(write_tiny_model(sys.argv[1], sys.argv[2]))

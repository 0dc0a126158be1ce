"""The model of moecap_eval_gpu.py: the shape of Qwen3-30B-A3B with fewer layers and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def random_weights(module: torch.nn.Module, *_args: Any, **_kwargs: Any) -> None:
    """Random weights of a module's own parameters, norms one; vLLM calls it for every module."""
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point() and parameter.numel() and parameter.device.type != "meta":
            if "norm" in type(module).__name__.lower():
                parameter.data.fill_(1.0)
            else:
                parameter.data.uniform_(-0.05, 0.05)


def write_model(folder: Path, layers: int) -> str:
    """A folder with the configuration of Qwen3-30B-A3B, cut to ``layers`` layers."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)

"""The architecture, and how its experts are computed while training."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ExpertsInterface

from examples.tiny_moe.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE


def model_config() -> Qwen3MoeConfig:
    """Return a Qwen3-MoE configuration of 5.1 million parameters, all sizes divisible by 32."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def dense_experts(
    experts: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of each token's chosen experts, computed as two products over all experts.

    For experts this small, multiplying by every expert and weighting the unchosen ones by zero is faster than
    gathering tokens by expert, and has the same value and gradient. Shapes: T tokens, H hidden, K chosen,
    E experts, I expert width; ``experts`` holds ``gate_up_proj`` (E, 2I, H) and ``down_proj`` (E, H, I).
    """
    num_experts, double_width, hidden = experts.gate_up_proj.shape
    scale_TE = x_TH.new_zeros(len(x_TH), num_experts).scatter(1, index_TK, weight_TK.to(x_TH.dtype))
    both = F.linear(x_TH, experts.gate_up_proj.reshape(num_experts * double_width, hidden))
    gate_TEI, up_TEI = both.view(len(x_TH), num_experts, double_width).chunk(2, dim=-1)
    inner_TEI = experts.act_fn(gate_TEI) * up_TEI * scale_TE.to(both.dtype).unsqueeze(-1)
    return F.linear(inner_TEI.flatten(1), experts.down_proj.transpose(0, 1).flatten(1)).to(x_TH.dtype)


def new_model(seed: int, device: str) -> Qwen3MoeForCausalLM:
    """Return a randomly initialised float32 model whose experts use ``dense_experts``."""
    torch.manual_seed(seed)
    ExpertsInterface.register("tiny_moe_dense", dense_experts)
    model = Qwen3MoeForCausalLM(model_config())
    model.set_experts_implementation("tiny_moe_dense")
    return model.to(device)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int, mask_T: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6), mean over layers.

    ``router_logits`` has one (T, E) tensor a layer, ``mask_T`` is 1 where the token counts. Each layer gives
    E * sum_e f_e P_e with f_e the mean number of choices of expert e a token and P_e its mean probability:
    ``top_k`` when the load is even. The batch mixes all tasks, so a task may still prefer its own experts.
    """
    probability_LTE = torch.stack(router_logits).float().softmax(-1)
    chosen_LTE = torch.zeros_like(probability_LTE).scatter_(2, probability_LTE.topk(top_k).indices, 1.0)
    mask_T1 = mask_T.float().unsqueeze(-1)
    tokens = mask_T1.sum()
    load_LE = (chosen_LTE * mask_T1).sum(1) / tokens
    mean_probability_LE = (probability_LTE * mask_T1).sum(1) / tokens
    return probability_LTE.shape[-1] * (load_LE * mean_probability_LE).sum(-1).mean()

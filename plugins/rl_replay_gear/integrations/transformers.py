"""Hugging Face transformers: batches in the form DecisionTransformerModel takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rl_replay_gear.batch import TrajectoryBatch

DEFAULT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "states": "observations",
        "actions": "actions",
        "rewards": "rewards",
        "returns_to_go": "returns_to_go",
    }
)


def decision_transformer_inputs(
    batch: TrajectoryBatch,
    *,
    state_mean: Tensor | None = None,
    state_std: Tensor | None = None,
    return_scale: float = 1.0,
    names: Mapping[str, str] = DEFAULT_NAMES,
    config: Any = None,
) -> dict[str, Tensor]:
    """Keyword arguments of ``transformers.DecisionTransformerModel.forward``.

    Args:
        batch: Windows of one length K with head padding for all columns.
        state_mean, state_std: [S]; states become ``(s - mean) / std``. Padded states are 0 afterwards.
        return_scale: Returns-to-go are divided by it.
        names: Argument -> column.
        config: The model's config; if given, its dimensions and ``max_ep_len`` are checked.

    Returns:
        ``states`` [B, K, S], ``actions`` [B, K, A], ``rewards`` and ``returns_to_go`` [B, K, 1] (float32),
        ``timesteps`` int64 [B, K], ``attention_mask`` int64 [B, K].

    Raises:
        KeyError: a column is missing from the batch.
        ValueError: a dimension differs from the config's, or a timestep is not below ``max_ep_len``.
    """
    missing = [column for column in names.values() if column not in batch]
    if missing:
        raise KeyError(f"the batch lacks {', '.join(missing)} (columns: {', '.join(batch.columns)})")
    mask = batch.mask[names["states"]]
    states = batch[names["states"]].float()
    if state_mean is not None:
        states = states - state_mean.to(states.device)
    if state_std is not None:
        states = states / state_std.to(states.device)
    states = torch.where(mask[..., None], states, 0.0)
    timesteps = batch.timesteps[names["states"]]
    actions = _with_feature(batch[names["actions"]].float())
    if config is not None:
        _check_config(config, states, actions, timesteps)
    return {
        "states": states,
        "actions": actions,
        "rewards": _with_feature(batch[names["rewards"]].float()),
        "returns_to_go": _with_feature(batch[names["returns_to_go"]].float()) / return_scale,
        "timesteps": timesteps,
        "attention_mask": mask.long(),
    }


def _with_feature(values: Tensor) -> Tensor:
    return values.unsqueeze(-1) if values.dim() == 2 else values


def _check_config(config: Any, states: Tensor, actions: Tensor, timesteps: Tensor) -> None:
    for name, tensor, size in (("states", states, config.state_dim), ("actions", actions, config.act_dim)):
        if tensor.shape[-1] != size:
            raise ValueError(f"{name} have {tensor.shape[-1]} features, the model expects {size}")
    if int(timesteps.max()) >= config.max_ep_len:
        raise ValueError(
            f"timestep {int(timesteps.max())} is not below the model's max_ep_len={config.max_ep_len}; "
            "raise it in the config or cut the trajectories"
        )

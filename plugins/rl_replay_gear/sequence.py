"""What sequence models ask of a batch: burn-in, an agent axis, contexts over episodes, sequence
priorities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.batch import TrajectoryBatch


def sequence_priority(td_error: Tensor, mask: Tensor, eta: float = 0.9) -> Tensor:
    """``eta max_t |d_t| + (1 - eta) mean_t |d_t|`` over the masked steps (R2D2, Kapturowski et al. 2019).

    Args:
        td_error: [B, L]. mask: bool [B, L]. A sequence without steps has priority 0.

    Returns:
        [B], of ``td_error``'s dtype.
    """
    size = torch.where(mask, td_error.abs(), 0)
    mean = size.sum(1) / mask.sum(1).clamp(min=1)
    return eta * size.amax(1) + (1 - eta) * mean


def split_burn_in(tensor: Tensor, burn_in: int) -> tuple[Tensor, Tensor]:
    """``[B, burn_in + L, ...] -> [B, burn_in, ...], [B, L, ...]``: the part that only warms the state up,
    the rest.

    Collect with ``Window(burn_in + L, -burn_in, "around")``: the anchor is then the first trained step, and
    where a trajectory begins inside the burn-in the missing steps are padded on the left. The stored
    recurrent state of the first step is ``Window(1, -burn_in)`` of its column.
    """
    if not 0 <= burn_in < tensor.shape[1]:
        raise ValueError(f"burn_in={burn_in} must be in 0..{tensor.shape[1] - 1}")
    return tensor[:, :burn_in], tensor[:, burn_in:]


def prepend_prompt(prompt: TrajectoryBatch, batch: TrajectoryBatch) -> dict[str, Tensor]:
    """Put a segment of another trajectory of the task before each context (Prompt-DT, Xu et al. 2022; Gato).

    Draw the prompts from the task's table, e.g. with ``TopShare(0.1)`` over returns.

    Args:
        prompt: [B, P] windows. batch: [B, L] windows of the same columns.

    Returns:
        The columns [B, P + L, *shape]; ``mask`` and ``is_prompt`` bool and ``timesteps`` int64 [B, P + L].

    Raises:
        ValueError: the batches differ in size or columns.
    """
    if prompt.columns != batch.columns or prompt.batch_size != batch.batch_size:
        raise ValueError(
            f"a prompt of {prompt.batch_size} x ({', '.join(prompt.columns)}) does not fit a batch of "
            f"{batch.batch_size} x ({', '.join(batch.columns)})"
        )
    first = batch.columns[0]
    out = {name: torch.cat([prompt[name], batch[name]], 1) for name in batch.columns}
    out["mask"] = torch.cat([prompt.mask[first], batch.mask[first]], 1)
    out["timesteps"] = torch.cat([prompt.timesteps[first], batch.timesteps[first]], 1)
    length = prompt.mask[first].shape[1]
    out["is_prompt"] = torch.arange(out["mask"].shape[1], device=batch.device) < length
    out["is_prompt"] = out["is_prompt"].expand_as(out["mask"])
    return out


def agents_as_sequence(tensor: Tensor) -> Tensor:
    """``[B, L, A, ...] -> [B * L, A, ...]``: the agents of one step are the tokens (Multi-Agent
    Transformer).
    """
    if tensor.dim() < 3:
        raise ValueError(f"expected [B, L, agents, ...], got {list(tensor.shape)}")
    return tensor.flatten(0, 1)


def chain_episodes(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Join episodes of one task, in the order given, into one trajectory whose windows cross their borders.

    For contexts over episodes (Algorithm Distillation, world models). Adds the bool columns ``is_first`` and
    ``is_last`` (of an episode) and the int64 columns ``episode`` and ``episode_step``.

    Raises:
        ValueError: no episode, or episodes of different columns.
    """
    if not episodes:
        raise ValueError("at least one episode is needed")
    names = list(episodes[0])
    if any(set(episode) != set(names) for episode in episodes):
        raise ValueError("the episodes have different columns")
    lengths = [len(episode[names[0]]) for episode in episodes]
    out = {name: torch.cat([torch.as_tensor(episode[name]) for episode in episodes]) for name in names}
    out["episode"] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    out["episode_step"] = torch.cat([torch.arange(length) for length in lengths])
    out["is_first"] = out["episode_step"] == 0
    last = torch.zeros(sum(lengths), dtype=torch.bool)
    last[torch.tensor(lengths).cumsum(0) - 1] = True
    out["is_last"] = last
    return out


class RunningMoments:
    """Mean and standard deviation per feature over all steps seen, in float64 (Chan et al. 1979).

    ``add`` takes ``[n, *shape]``; ``mean`` and ``std`` (population) have ``shape``.
    """

    def __init__(self, shape: Sequence[int] = ()) -> None:
        self.count = 0
        self.mean = torch.zeros(tuple(shape), dtype=torch.float64)
        self._squares = torch.zeros(tuple(shape), dtype=torch.float64)

    def add(self, values: Any) -> None:
        """Account for ``[n, *shape]`` more steps."""
        tensor = torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values).double()
        if tensor.shape[1:] != self.mean.shape:
            raise ValueError(
                f"expected [n, {', '.join(map(str, self.mean.shape))}], got {list(tensor.shape)}"
            )
        count = len(tensor)
        if count == 0:
            return
        mean = tensor.mean(0)
        delta = mean - self.mean
        total = self.count + count
        self._squares += ((tensor - mean) ** 2).sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """Population standard deviation, 0 before the first step."""
        return (self._squares / max(self.count, 1)).sqrt()

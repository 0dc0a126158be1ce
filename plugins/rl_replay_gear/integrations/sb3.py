"""Stable-Baselines3: ``SAC("MlpPolicy", env, replay_buffer_class=GearReplayBuffer)``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from rl_replay_gear.selectors import Selector, Uniform
from rl_replay_gear.spec import ColumnSpec, TableSpec
from rl_replay_gear.storage_format import load_table, save_table
from rl_replay_gear.table import TrajectoryTable
from rl_replay_gear.window import Window

try:
    from gymnasium import spaces
    from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
except ImportError as error:
    raise ImportError('GearReplayBuffer needs Stable-Baselines3: pip install "graft-plugins[rl]"') from error

_FRAGMENT = 64  # transitions of one environment before they move into the table
_WINDOWS = {
    "observations": Window(2),
    "actions": Window(1),
    "rewards": Window(1),
    "dones": Window(1),
    "timeouts": Window(1),
}


class _GlobalNumpy:
    """NumPy's global generator, which SB3 seeds and its own buffer draws from."""

    def random(self, count: int) -> np.ndarray:
        return np.random.random_sample(count)


class GearReplayBuffer(ReplayBuffer):
    """SB3's replay buffer over a ``TrajectoryTable``: each observation is stored once.

    Every transition added is sampleable at once and with the same probability, as in SB3: those of unfinished
    episodes wait in small arrays until 64 of an environment have come or its episode ends. At most
    ``buffer_size`` transitions are kept over all environments, fewer when episodes average under 8 steps;
    whole fragments go, the oldest first.

    Args:
        buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage,
            handle_timeout_termination: As in SB3; ``optimize_memory_usage`` changes nothing here.
        selector: Another law over the table's fragments; unfinished ones are then not drawn. None is uniform.

    Raises:
        ValueError: dict observations, or a buffer below 8 transitions an environment.
    """

    def __init__(  # noqa: PLR0917 (the framework's signature)
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        selector: Selector | None = None,
    ) -> None:
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if isinstance(observation_space, spaces.Dict):
            raise ValueError("GearReplayBuffer holds one observation array, not a dict of them")
        if buffer_size < 8 * n_envs:
            raise ValueError(f"buffer_size={buffer_size} is below 8 transitions an environment ({n_envs})")
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self._fragment = min(_FRAGMENT, buffer_size // (4 * n_envs))
        steps = buffer_size - n_envs * self._fragment
        self._action_dtype = self._maybe_cast_dtype(action_space.dtype)
        self.table = TrajectoryTable(
            TableSpec(
                (
                    _column("observations", self.obs_shape, observation_space.dtype, final=True),
                    _column("actions", (self.action_dim,), self._action_dtype),
                    _column("rewards", (), np.float32),
                    _column("dones", (), np.float32),
                    _column("timeouts", (), np.float32),
                ),
                max_steps=steps,
                max_trajectories=max(steps // 8, n_envs + 1),
            ),
            memory="host",
        )
        self.selector = selector
        self._uniform = Uniform(over="steps")
        open_shape = (n_envs, self._fragment)
        self._open_observations = np.zeros(
            (n_envs, self._fragment + 1, *self.obs_shape), observation_space.dtype
        )
        self._open_actions = np.zeros((*open_shape, self.action_dim), self._action_dtype)
        self._open_scalars = {
            name: np.zeros(open_shape, np.float32) for name in ("rewards", "dones", "timeouts")
        }
        self._open_counts = np.zeros(n_envs, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all transitions' memory."""
        scalars = sum(array.nbytes for array in self._open_scalars.values())
        return self.table.nbytes + self._open_observations.nbytes + self._open_actions.nbytes + scalars

    def size(self) -> int:
        """Transitions held."""
        return self.table.num_steps + int(self._open_counts.sum())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.table.clear()
        self._open_counts[:] = 0

    def add(  # noqa: PLR0917
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """One transition of every environment, as SB3 gives them."""
        obs = np.asarray(obs).reshape((self.n_envs, *self.obs_shape))
        next_obs = np.asarray(next_obs).reshape((self.n_envs, *self.obs_shape))
        action = np.asarray(action).reshape((self.n_envs, self.action_dim))
        for env in range(self.n_envs):
            count = self._open_counts[env]
            if count and not np.array_equal(self._open_observations[env, count], obs[env]):
                self._commit(env)  # the environment was reset without a done
                count = 0
            self._open_observations[env, count] = obs[env]
            self._open_observations[env, count + 1] = next_obs[env]
            self._open_actions[env, count] = action[env]
            self._open_scalars["rewards"][env, count] = reward[env]
            self._open_scalars["dones"][env, count] = done[env]
            truncated = self.handle_timeout_termination and infos[env].get("TimeLimit.truncated", False)
            self._open_scalars["timeouts"][env, count] = truncated
            self._open_counts[env] = count + 1
            if done[env] or count + 1 == self._fragment:
                self._commit(env)

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """``batch_size`` transitions; ``env`` (VecNormalize) normalises as in SB3."""
        arrays = self._draw(batch_size)
        dones = arrays["dones"] * (1 - arrays["timeouts"])
        data = (
            self._normalize_obs(arrays["observations"][:, 0], env),
            arrays["actions"],
            self._normalize_obs(arrays["observations"][:, 1], env),
            dones.reshape(-1, 1),
            self._normalize_reward(arrays["rewards"].reshape(-1, 1), env),
        )
        return ReplayBufferSamples(*tuple(map(self.to_torch, data)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the buffer to the folder ``path``; unfinished fragments are closed first."""
        for env in range(self.n_envs):
            self._commit(env)
        save_table(self.table, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the content by what ``save`` wrote; ValueError when the schema differs."""
        table = load_table(path, memory="host")
        if table.spec != self.table.spec:
            raise ValueError(f"{path} holds a buffer of another shape or size: {table.spec.to_json()}")
        self.table = table
        self._uniform = Uniform(over="steps")
        self._open_counts[:] = 0

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "GearReplayBuffer is not pickled; use model.replay_buffer.save(folder) and .load(folder)"
        )

    def _commit(self, env: int) -> None:
        count = int(self._open_counts[env])
        if count == 0:
            return
        columns: dict[str, Any] = {
            "observations": self._open_observations[env, : count + 1],
            "actions": self._open_actions[env, :count],
        }
        columns.update({name: array[env, :count] for name, array in self._open_scalars.items()})
        self.table.write({name: torch.from_numpy(array) for name, array in columns.items()})
        self._open_counts[env] = 0

    def _draw(self, batch_size: int) -> dict[str, np.ndarray]:
        source = _GlobalNumpy()
        if self.selector is not None:
            return self._from_table(batch_size, self.selector, source)
        stored = self.table.num_steps
        point = (source.random(batch_size) * self.size()).astype(np.int64)
        in_table = point < stored
        if in_table.all():
            return self._from_table(batch_size, self._uniform, source)
        env, step = self._locate_open(point[~in_table] - stored)
        parts = {
            "observations": np.stack(
                [self._open_observations[env, step], self._open_observations[env, step + 1]], 1
            ),
            "actions": self._open_actions[env, step],
            **{name: array[env, step] for name, array in self._open_scalars.items()},
        }
        if not in_table.any():
            return parts
        rest = self._from_table(int(in_table.sum()), self._uniform, source)
        out = {}
        for name, values in parts.items():
            out[name] = np.empty((batch_size, *values.shape[1:]), values.dtype)
            out[name][in_table], out[name][~in_table] = rest[name], values
        return out

    def _locate_open(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stops = np.cumsum(self._open_counts)
        env = np.searchsorted(stops, point, side="right")
        return env, point - (stops - self._open_counts)[env]

    def _from_table(self, count: int, selector: Selector, source: _GlobalNumpy) -> dict[str, np.ndarray]:
        selection = self.table.select(selector, count, generator=source)
        batch = self.table.collect(selection, _WINDOWS)
        out = {name: batch[name][:, 0].numpy() for name in _WINDOWS if name != "observations"}
        return {**out, "observations": batch["observations"].numpy()}


def _column(name: str, shape: tuple[int, ...], dtype: Any, *, final: bool = False) -> ColumnSpec:
    return ColumnSpec(name, tuple(shape), torch.from_numpy(np.zeros(1, dtype)).dtype, final=final)

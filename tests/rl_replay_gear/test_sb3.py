"""Stable-Baselines3 (GR-18, GR-23): SB3's own buffer is the oracle; SAC and DQN run on it."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.rl
pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from gymnasium import spaces  # noqa: E402
from stable_baselines3.common.buffers import ReplayBuffer  # noqa: E402

from rl_replay_gear.integrations.sb3 import GearReplayBuffer  # noqa: E402

OBS, ACT = spaces.Box(-9, 9, (5,), np.float32), spaces.Box(-1, 1, (2,), np.float32)


def stream(steps, envs, seed=0):
    """What an algorithm adds: episodes that end in terminals and time limits, then reset observations."""
    random = np.random.default_rng(seed)
    obs = random.normal(size=(envs, 5)).astype(np.float32)
    for _ in range(steps):
        next_obs = random.normal(size=(envs, 5)).astype(np.float32)
        done = random.random(envs) < 0.05
        infos = [{"TimeLimit.truncated": bool(random.random() < 0.5)} if d else {} for d in done]
        yield obs, next_obs, random.normal(size=(envs, 2)), random.normal(size=envs), done, infos
        obs = np.where(done[:, None], random.normal(size=(envs, 5)), next_obs).astype(np.float32)


def matrix(samples):
    parts = [samples.observations, samples.actions, samples.next_observations, samples.dones, samples.rewards]
    return np.concatenate([part.numpy().reshape(len(part), -1) for part in parts], 1).round(5).tolist()


def rows(samples):
    return {tuple(row) for row in matrix(samples)}


@pytest.mark.parametrize("envs", [1, 4])
@pytest.mark.parametrize("handle_timeouts", [True, False])
def test_gr18_every_transition_of_sb3s_buffer_and_no_other(envs, handle_timeouts):
    np.random.seed(0)
    options = {"n_envs": envs, "handle_timeout_termination": handle_timeouts}
    ours, theirs = (kind(4000, OBS, ACT, "cpu", **options) for kind in (GearReplayBuffer, ReplayBuffer))
    for step, transition in enumerate(stream(150, envs)):
        ours.add(*transition)
        theirs.add(*transition)
        if step % 40 == 7:
            assert ours.size() == (step + 1) * envs
            assert rows(ours.sample(8000)) == rows(theirs.sample(8000))
    counts = np.zeros(150 * envs)
    keys = {row: i for i, row in enumerate(sorted(rows(theirs.sample(40_000))))}
    draws = 150 * envs * 40
    for _ in range(draws // 1000):
        sample = ours.sample(1000)
        for row in matrix(sample):
            counts[keys[tuple(row)]] += 1
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - len(counts)) < 4.5 * np.sqrt(2 * len(counts))


def test_gr18_a_full_buffer_keeps_only_what_was_added_last():
    np.random.seed(1)
    buffer = GearReplayBuffer(1000, OBS, ACT, "cpu", n_envs=2)
    added = []
    for obs, next_obs, action, reward, done, infos in stream(3000, 2, seed=3):
        buffer.add(obs, next_obs, action, reward, done, infos)
        added += [obs[0].tolist(), obs[1].tolist()]
        assert buffer.size() <= 1000
    assert buffer.size() >= 750
    found = {tuple(row) for row in buffer.sample(5000).observations.tolist()}
    recent = {tuple(row) for row in added[-1000:]}
    assert found <= recent
    buffer.reset()
    assert buffer.size() == 0


def test_gr23_memory_is_at_most_0_6_of_storing_both_observations():
    frames = spaces.Box(0, 255, (1, 84, 84), np.uint8)
    ours = GearReplayBuffer(4000, frames, spaces.Discrete(4), "cpu")
    assert ours.nbytes <= 0.6 * 4000 * 2 * 84 * 84


def test_gr18_save_load_and_refusals(tmp_path):
    buffer = GearReplayBuffer(1000, OBS, ACT, "cpu")
    for transition in stream(100, 1):
        buffer.add(*transition)
    buffer.save(tmp_path / "b")
    other = GearReplayBuffer(1000, OBS, ACT, "cpu")
    other.load(tmp_path / "b")
    assert rows(other.sample(5000)) == rows(buffer.sample(5000))
    with pytest.raises(ValueError, match="another shape or size"):
        GearReplayBuffer(2000, OBS, ACT, "cpu").load(tmp_path / "b")
    with pytest.raises(ValueError, match="dict"):
        GearReplayBuffer(1000, spaces.Dict({"a": OBS}), ACT, "cpu")
    with pytest.raises(ValueError, match="below 8 transitions"):
        GearReplayBuffer(7, OBS, ACT, "cpu")


def test_gr18_sac_and_dqn_run_on_it():
    from stable_baselines3 import DQN, SAC

    model = SAC(
        "MlpPolicy", "Pendulum-v1", replay_buffer_class=GearReplayBuffer, buffer_size=1000,
        learning_starts=50, policy_kwargs={"net_arch": [16]}, seed=0, device="cpu",
    )  # fmt: skip
    model.learn(300)
    assert isinstance(model.replay_buffer, GearReplayBuffer)
    assert model.replay_buffer.size() == 300
    vectorised = DQN(
        "MlpPolicy", "CartPole-v1", replay_buffer_class=GearReplayBuffer, buffer_size=1000,
        learning_starts=50, policy_kwargs={"net_arch": [16]}, seed=0, device="cpu",
    )  # fmt: skip
    vectorised.learn(300)
    sample = vectorised.replay_buffer.sample(64)
    assert sample.actions.dtype.is_floating_point is False
    done = sample.dones[:, 0].bool()
    position = sample.next_observations[done]
    assert bool(((position[:, 0].abs() > 2.4) | (position[:, 2].abs() > 0.2095)).all())  # dones are falls

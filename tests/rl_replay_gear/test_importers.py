"""Data sets as tables (GR-27)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rl_replay_gear import ReturnsToGo, import_hdf5, import_minari


def test_gr27_hdf5_episodes_lengths_and_sums_equal(tmp_path):
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    lengths = [5, 1, 12, 3]
    total = sum(lengths)
    obs, reward = (
        random.normal(size=(total, 3)).astype(np.float32),
        random.normal(size=total).astype(np.float32),
    )
    terminals, timeouts = np.zeros(total, bool), np.zeros(total, bool)
    stops = np.cumsum(lengths)
    terminals[stops[0] - 1] = timeouts[stops[1] - 1] = terminals[stops[2] - 1] = True  # the last is cut off
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["observations"], file["rewards"] = obs, reward
        file["terminals"], file["timeouts"] = terminals, timeouts
    columns = {"observations": "observations", "rewards": "rewards"}
    table = import_hdf5(tmp_path / "d.hdf5", columns, derived=(ReturnsToGo(),))
    assert table.lengths().tolist() == lengths
    begin = 0
    for handle, length in zip(table.handles().tolist(), lengths, strict=True):
        found = table.read(handle)
        assert np.array_equal(found["observations"].numpy(), obs[begin : begin + length])
        exact = reward[begin : begin + length].astype(np.float64).sum()
        assert float(found["returns_to_go"][0]) == pytest.approx(exact, rel=1e-6)
        begin += length
    with pytest.raises(KeyError, match="no data set 'action'"):
        import_hdf5(tmp_path / "d.hdf5", {"a": "action"})


def episodes():
    random = np.random.default_rng(1)
    for n in (3, 8, 1):
        yield SimpleNamespace(
            observations={"pos": random.normal(size=(n + 1, 2)), "t": np.arange(n + 1)},
            actions=random.integers(0, 4, n),
            rewards=random.normal(size=n),
            terminations=np.arange(n) == n - 1,
            truncations=np.zeros(n, bool),
        )


def test_gr27_minari_episodes_of_a_dict_space():
    table = import_minari(SimpleNamespace(iterate_episodes=episodes))
    assert table.lengths().tolist() == [3, 8, 1]
    for handle, episode in zip(table.handles().tolist(), episodes(), strict=True):
        found = table.read(handle)
        assert np.array_equal(found["observations.pos"].numpy(), episode.observations["pos"])
        assert np.array_equal(found["actions"].numpy(), episode.actions)
        assert float(found["rewards"].sum()) == pytest.approx(episode.rewards.sum(), rel=1e-6)
        assert found["terminations"].dtype == torch.bool


def test_gr27_a_real_minari_data_set():
    minari = pytest.importorskip("minari", reason="minari is not installed")
    gymnasium = pytest.importorskip("gymnasium")
    collector = minari.DataCollector(gymnasium.make("CartPole-v1"))
    for seed in range(3):
        collector.reset(seed=seed)
        done = False
        while not done:
            _, _, terminated, truncated, _ = collector.step(collector.action_space.sample())
            done = terminated or truncated
    dataset = collector.create_dataset(dataset_id="graft/cartpole-v0")
    table = import_minari(dataset)
    assert len(table) == dataset.total_episodes
    assert table.num_steps == dataset.total_steps

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


def real_episodes(buffer_class):
    """Of the shapes and nesting that Minari stores: dict in dict, tuples, images, one more observation."""
    random = np.random.default_rng(2)
    for n in (3, 8, 1):
        camera = random.integers(0, 255, (n + 1, 4, 4, 3)).astype(np.uint8)
        yield buffer_class(
            observations={"pos": random.normal(size=(n + 1, 2)).astype(np.float32), "cam": {"image": camera}},
            actions=(random.integers(0, 4, n), random.random((n, 1)).astype(np.float32)),
            rewards=random.normal(size=n),
            terminations=np.arange(n) == n - 1,
            truncations=np.zeros(n, bool),
        )


def test_gr27_a_real_minari_data_set(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="minari is not installed")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    image = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    minari.create_dataset_from_buffers(
        "graft/mixed-v0",
        list(real_episodes(EpisodeBuffer)),
        observation_space=spaces.Dict(
            {"pos": spaces.Box(-9, 9, (2,)), "cam": spaces.Dict({"image": image})},
        ),
        action_space=spaces.Tuple((spaces.Discrete(4), spaces.Box(0, 1, (1,)))),
        jpeg_encoding=False,
    )
    table = import_minari("graft/mixed-v0", derived=(ReturnsToGo(),))
    assert table.lengths().tolist() == [3, 8, 1]
    for handle, episode in zip(table.handles().tolist(), real_episodes(SimpleNamespace), strict=True):
        found = table.read(handle)
        assert np.array_equal(found["observations.pos"].numpy(), episode.observations["pos"])
        assert np.array_equal(found["observations.cam.image"].numpy(), episode.observations["cam"]["image"])
        assert found["observations.cam.image"].dtype == torch.uint8
        for number, action in enumerate(episode.actions):
            assert np.array_equal(found[f"actions.{number}"].numpy(), action)
        assert np.array_equal(found["terminations"].numpy(), episode.terminations)
        assert float(found["returns_to_go"][0]) == pytest.approx(episode.rewards.sum(), rel=1e-6)
    with pytest.raises(ValueError, match="trajectory of 3 steps is longer than max_steps=2"):
        import_minari("graft/mixed-v0", max_steps=2)

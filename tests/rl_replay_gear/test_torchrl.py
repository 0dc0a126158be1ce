"""TorchRL (GR-16): a real ReplayBuffer, its contracts, and a DQN that learns from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.rl, pytest.mark.filterwarnings("ignore:Using `add")]
pytest.importorskip("torchrl", reason="torchrl is not installed")

from tensordict import TensorDict  # noqa: E402
from torchrl.data import ReplayBuffer  # noqa: E402

from rl_replay_gear import ColumnSpec, Prioritized, Shuffle, TableSpec, TrajectoryTable, Window  # noqa: E402
from rl_replay_gear.integrations.torchrl import gear_replay_buffer  # noqa: E402

SPEC = TableSpec(
    (
        ColumnSpec("observation", (4,)),
        ColumnSpec("action", (), torch.int64),
        ColumnSpec("next.observation", (4,)),
        ColumnSpec("next.reward"),
        ColumnSpec("next.done", (), torch.bool),
    ),
    2000,
    40,
)


def episode(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(length + 1, 4, generator=generator)
    return TensorDict(
        {
            "observation": observation[:-1],
            "action": torch.randint(0, 2, (length,), generator=generator),
            "next": {
                "observation": observation[1:],
                "reward": torch.randn(length, 1, generator=generator),
                "done": torch.arange(length)[:, None] == length - 1,
            },
        },
        batch_size=[length],
    )


def test_gr16_it_is_a_replay_buffer_that_samples_windows():
    buffer = gear_replay_buffer(SPEC, window=Window(5, -4, "head"), batch_size=16)
    assert isinstance(buffer, ReplayBuffer)
    episodes = [episode(n, n) for n in (3, 9, 20)]
    handles = [buffer.add(episodes[0]), *buffer.extend(episodes[1:]).tolist()]
    assert len(buffer) == 3
    sample, info = buffer.sample(return_info=True)
    assert sample.batch_size == (16,)
    assert sample["next", "reward"].shape == (16, 5)
    assert torch.equal(info["handle"], sample["handle"])
    for i in range(16):
        source = episodes[handles.index(int(sample["handle"][i]))]
        steps = sample["timesteps"][i][sample["mask"][i]]
        assert torch.equal(sample["observation"][i][sample["mask"][i]], source["observation"][steps])
        assert torch.equal(sample["next", "reward"][i][sample["mask"][i]], source["next", "reward"][steps, 0])
    assert torch.equal(buffer.storage.get(handles[2])["action"], episodes[2]["action"])
    assert handles[1] in buffer.storage
    buffer.empty()
    assert len(buffer) == 0


def test_gr16_transforms_prefetch_and_seeds():
    from torchrl.envs import RewardScaling

    scale = RewardScaling(loc=0.0, scale=10.0, in_keys=[("next", "reward")], out_keys=[("next", "reward")])
    buffers = [
        gear_replay_buffer(
            SPEC, window=Window(4), batch_size=8, prefetch=prefetch, transform=transform,
            generator=torch.Generator().manual_seed(3),
        )
        for prefetch, transform in ((None, None), (2, scale))
    ]  # fmt: skip
    for buffer in buffers:
        buffer.extend([episode(n, n) for n in (6, 12)])
    for _ in range(6):
        plain, scaled = (buffer.sample() for buffer in buffers)
        assert torch.equal(plain["handle"], scaled["handle"])
        assert torch.allclose(plain["next", "reward"] * 10, scaled["next", "reward"])


def test_gr16_priorities_by_handle_without_torchrls_extension():
    buffer = gear_replay_buffer(SPEC, window=Window(1), batch_size=4096, selector=Prioritized(1.0, 1.0))
    handles = buffer.extend([episode(5, n) for n in range(4)])
    buffer.update_priority(handles, torch.tensor([0.0, 1.0, 2.0, 5.0]))
    sample, info = buffer.sample(return_info=True)
    counts = np.array([(sample["handle"] == h).sum() for h in handles])
    assert counts[0] == 0
    expected = np.array([1, 2, 5]) / 8 * 4096
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 20
    which = torch.stack([sample["handle"] == h for h in handles]).float().argmax(0)
    weight = torch.tensor([0.0, 1.0, 1 / 2, 1 / 5])[which]
    assert torch.allclose(sample["weight"], weight)
    assert torch.equal(info["weight"], sample["weight"])
    buffer.update_priority(info["index"], torch.full((4096,), 3.0))
    assert buffer.storage.table.priorities().tolist() == [0.0, 3.0, 3.0, 3.0]


def test_gr16_dumps_and_loads(tmp_path):
    make = lambda: gear_replay_buffer(  # noqa: E731
        SPEC, window=Window(3), batch_size=2, selector=Shuffle(), generator=torch.Generator().manual_seed(0)
    )
    buffer, other = make(), make()
    handles = buffer.extend([episode(n + 1, n) for n in range(8)])
    seen = buffer.sample()["handle"].tolist()
    buffer.dumps(tmp_path)
    other.loads(tmp_path)
    rest = [h for _ in range(3) for h in other.sample()["handle"].tolist()]
    assert sorted(seen + rest) == sorted(handles.tolist())  # the epoch goes on
    third = make()
    third.load_state_dict(buffer.state_dict())
    assert len(third) == 8
    assert torch.equal(third.storage.table.lengths(), buffer.storage.table.lengths())


def test_gr16_bad_data_names_the_entries():
    buffer = gear_replay_buffer(TrajectoryTable(SPEC), window=Window(3), batch_size=2)
    with pytest.raises(KeyError, match="missing columns: action"):
        buffer.add(episode(4).exclude("action"))
    with pytest.raises(TypeError, match="GearWriter"):
        buffer.storage.set(0, episode(3))
    with pytest.raises(RuntimeError, match="table is empty"):
        buffer.sample()


def chain_episode(policy, random, length=12):
    """Walk right along a chain of 6 cells to be paid; epsilon-greedy."""
    cell, rows = 0, {"observation": [], "action": [], "reward": [], "done": []}
    for _ in range(length):
        observation = np.eye(6, dtype=np.float32)[cell]
        action = int(random.integers(2)) if random.random() < 0.5 else policy(observation)
        cell = min(cell + 1, 5) if action else max(cell - 1, 0)
        rows["observation"].append(observation)
        rows["action"].append(action)
        rows["reward"].append(float(cell == 5))
        rows["done"].append(cell == 5)
        if cell == 5:
            break
    observations = np.stack([*rows["observation"], np.eye(6, dtype=np.float32)[cell]])
    n = len(rows["action"])
    return TensorDict(
        {
            "observation": torch.from_numpy(observations[:-1]),
            "action": torch.tensor(rows["action"]),
            "next": {
                "observation": torch.from_numpy(observations[1:]),
                "reward": torch.tensor(rows["reward"])[:, None],
                "done": torch.tensor(rows["done"])[:, None],
                "terminated": torch.tensor(rows["done"])[:, None],
            },
        },
        batch_size=[n],
    )


def test_gr16_torchrls_dqn_learns_a_chain_from_it():
    from torchrl.data import Categorical
    from torchrl.modules import MLP, QValueActor
    from torchrl.objectives import DQNLoss

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    first = chain_episode(lambda _: 1, random)
    columns = {".".join(k) if isinstance(k, tuple) else k: first[k] for k in first.keys(True, True)}
    schema = tuple(ColumnSpec(name, tuple(value.shape[1:]), value.dtype) for name, value in columns.items())
    spec = TableSpec(schema, 5000, 500)
    buffer = gear_replay_buffer(spec, window=Window(1), batch_size=64, selector=Prioritized(over="steps"))
    network = MLP(in_features=6, out_features=2, num_cells=[32])
    actor = QValueActor(network, in_keys=["observation"], spec=Categorical(2))
    loss = DQNLoss(actor, action_space="categorical", delay_value=False)
    loss.make_value_estimator(gamma=0.9)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)

    def greedy(observation):
        with torch.no_grad():
            return int(network(torch.from_numpy(observation)).argmax())

    for _ in range(60):
        buffer.add(chain_episode(greedy, random))
        for _ in range(15):
            sample = buffer.sample()
            batch = sample.select("observation", "action", "next")
            batch = TensorDict({key: batch[key][:, 0] for key in batch.keys(True, True)}, batch_size=[64])
            out = loss(batch)
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            buffer.update_priority(sample["handle"], batch["td_error"] + 1e-3)
    values = network(torch.eye(6)).max(1).values.detach()
    assert network(torch.eye(6)).argmax(1)[:5].tolist() == [1] * 5
    exact = torch.tensor([0.9**4, 0.9**3, 0.9**2, 0.9, 1.0])
    assert torch.allclose(values[:5], exact, atol=0.15)

"""Ray actors as writers (GR-22), with the real Ray."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="ray is not installed")

from rl_replay_gear import ColumnSpec, TableSpec, TrajectoryTable, TrajectoryWriter  # noqa: E402
from rl_replay_gear.integrations.ray import RayInbox  # noqa: E402

SPEC = TableSpec((ColumnSpec("x", (2,)), ColumnSpec("who", (), torch.int64)), 1000, 100)


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_gr22_rows_arrive_as_with_a_local_writer(cluster):
    def act(sink, who):
        writer = TrajectoryWriter(sink)
        for number in range(5):
            for step in range(number + 1):
                writer.append(x=torch.full((2,), float(step)), who=10 * who + number)
            writer.commit(priority=float(number))
        return who

    inbox = RayInbox("gear-inbox", SPEC, max_trajectories=3)
    remote = ray.remote(act)
    running = [remote.remote(inbox.sink(), who) for who in range(2)]
    table, drained = TrajectoryTable(SPEC), 0
    while drained < 10:
        drained += inbox.drain(table)
        ray.wait(running, num_returns=2, timeout=0.1)
    ray.get(running)
    assert inbox.drain(table) == 0
    local = TrajectoryTable(SPEC)
    for who in range(2):
        act(local, who)

    def content(of):
        rows = [of.read(h) for h in of.handles().tolist()]
        priorities = of.priorities().tolist()
        return sorted((r["who"].tolist(), r["x"].tolist(), p) for r, p in zip(rows, priorities, strict=True))

    assert content(table) == content(local)
    with pytest.raises(ValueError, match="column 'x'"):
        inbox.sink().write({"x": torch.zeros(3, 5), "who": torch.zeros(3, dtype=torch.int64)})

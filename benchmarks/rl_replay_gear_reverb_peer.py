"""DeepMind Reverb for rl_replay_gear_reverb.py: a server in one process, a learner in another.

Runs in Reverb's own environment (pip install "dm-reverb[tensorflow]==0.14.0" numpy==1.26.4, Python 3.11),
which has no torch: ``python rl_replay_gear_reverb_peer.py learner TRAJECTORIES LENGTH BATCH`` starts the
server, fills it, prints "ready", and for every line N on its input takes N batches and prints CPU seconds of
server and learner together, and wall seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np

STEPS = 1000
TICKS = os.sysconf("SC_CLK_TCK")
FIELDS = (
    ("obs", (17,), np.float32),
    ("action", (6,), np.float32),
    ("reward", (), np.float32),
    ("done", (), np.uint8),
)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def serve(items: int, length: int) -> None:
    """Serve an empty table of windows until the input closes."""
    import reverb
    import tensorflow as tf

    signature = {name: tf.TensorSpec((length, *shape), dtype) for name, shape, dtype in FIELDS}
    table = reverb.Table(
        "windows",
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=items,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature,
    )
    server = reverb.Server([table])
    print(server.port, flush=True)
    sys.stdin.read()  # until the learner closes it
    server.stop()


def learn(trajectories: int, length: int, batch: int) -> None:
    """Fill a server and sample from it on demand."""
    import reverb

    per_trajectory = STEPS - length + 1
    command = [sys.executable, __file__, "server", str(trajectories * per_trajectory), str(length)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = f"localhost:{int(server.stdout.readline())}"
    client = reverb.Client(address)
    random = np.random.default_rng(0)
    columns = {name: random.normal(size=(STEPS, *shape)).astype(dtype) for name, shape, dtype in FIELDS}
    with client.trajectory_writer(num_keep_alive_refs=length) as writer:
        for _ in range(trajectories):
            for step in range(STEPS):
                writer.append({name: values[step] for name, values in columns.items()})
                if step >= length - 1:
                    window = {name: writer.history[name][-length:] for name in columns}
                    writer.create_item("windows", priority=1.0, trajectory=window)
            writer.end_episode()
    dataset = reverb.TrajectoryDataset.from_table_signature(
        address, "windows", max_in_flight_samples_per_worker=2 * batch
    ).batch(batch)
    batches = iter(dataset)
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        used = time.process_time() + cpu_seconds(server.pid)
        for _ in range(int(line)):
            sample = next(batches)
        assert sample.data["obs"].shape == (batch, length, 17)
        spent = time.process_time() + cpu_seconds(server.pid) - used
        print(spent, time.perf_counter() - begin, flush=True)
    server.kill()


if __name__ == "__main__":
    role, *numbers = sys.argv[1:]
    {"server": serve, "learner": learn}[role](*map(int, numbers))

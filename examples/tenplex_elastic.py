"""A GPT job under torchrun elastic that goes on when a host dies or more join, on the same loss curve.

Worker (torchrun starts it again with every change of membership; replicas in memory carry the state over):

    torchrun --nnodes 1:4 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --max-restarts 9 \
      --rdzv-conf last_call_timeout=2 examples/tenplex_elastic.py --folder /dev/shm/job --host $(hostname)

The whole story on one machine, every agent playing a host: three hosts start, one is killed, two more join:

    python examples/tenplex_elastic.py --demo OUT        # writes OUT/elastic.json and OUT/elastic.png
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from megatron_tenplex import ParallelConfig

STEPS, SNAPSHOT_EVERY = 90, 1
KILL_AT, JOIN_AT = 12, 30


def layout_for(workers: int) -> ParallelConfig:
    """The policy: any function of the number of workers will do."""
    return {1: ParallelConfig(), 2: ParallelConfig(tp=2), 3: ParallelConfig(dp=3)}.get(
        workers, ParallelConfig(tp=2, pp=2)
    )


def train(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    from megatron_tenplex import GPTShape, Reconfigurator, TensorStore, Topology, World
    from megatron_tenplex.testing import install_cpu_compat

    install_cpu_compat()  # nothing on a machine with GPUs
    from megatron_tenplex.testing.gpt import GPTJob

    (options.folder / f"{options.host}.pid").write_text(str(os.getpid()))
    job = GPTJob(GPTShape(4, 64, 4, 128), global_batch_size=12)
    world = World.from_default(timeout=60)
    store = TensorStore(options.folder / "replicas", host=options.host)
    elastic = Reconfigurator(job, world=world, store=store, topology=Topology(ranks_per_host=1))
    state = elastic.start(layout_for(world.num_workers))
    while state.iteration < options.steps:
        started = time.monotonic()
        loss, _ = job.step(state, elastic.parallel)
        time.sleep(max(0.0, options.pace - (time.monotonic() - started)))
        if state.iteration % SNAPSHOT_EVERY == 0:
            elastic.snapshot()
        if elastic.role == 0:
            row = {
                "iteration": state.iteration,
                "loss": loss,
                "layout": str(elastic.parallel),
                "time": time.time(),
            }
            with open(options.folder / "losses.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
    world.agree(None, "finishing")
    sys.stdout.flush()
    os._exit(0)


class Hosts:
    """Agents of torchrun, each with one worker, as if they were hosts."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.agents: dict[str, subprocess.Popen] = {}

    def start(self, name: str) -> None:
        """A new host joins."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc-per-node", "1"]
        command += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{self.port}",
            "--max-restarts",
            "9",
        ]
        command += [
            "--rdzv-id",
            "tenplex",
            "--rdzv-conf",
            f"last_call_timeout=8,is_host={int(not self.agents)}",
        ]
        command += ["--local-addr", "127.0.0.1", __file__, "--folder", str(self.folder), "--host", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        log = open(self.folder / f"{name}.log", "w")  # noqa: SIM115 - the agent keeps it
        self.agents[name] = subprocess.Popen(
            [*command, "--steps", str(self.steps)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def kill(self, name: str) -> None:
        """The host is gone: agent, worker and what was in its memory."""
        os.killpg(self.agents.pop(name).pid, signal.SIGKILL)
        os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)  # it has a session of its own
        shutil.rmtree(self.folder / "replicas" / name, ignore_errors=True)

    def losses(self) -> list[dict]:
        """What the workers of rank 0 wrote so far."""
        path = self.folder / "losses.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, iteration: int, limit: float) -> None:
        """Until training has come so far."""
        deadline = time.monotonic() + limit
        while max((row["iteration"] for row in self.losses()), default=0) < iteration:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"iteration {iteration} was not reached in {limit} s; see {self.folder}/*.log"
                )
            time.sleep(0.2)

    def finish(self) -> None:
        """Wait for all agents."""
        for agent in self.agents.values():
            try:
                agent.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(agent.pid, signal.SIGKILL)


def demo(out: Path, steps: int, limit: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name in ("uninterrupted", "elastic"):
        hosts = Hosts(Path(tempfile.gettempdir()) / f"tenplex_{name}", steps)
        try:
            for host in ("a", "b", "c"):
                hosts.start(host)
            if name == "elastic":
                hosts.wait_for(KILL_AT, limit)
                hosts.kill("b")
                hosts.wait_for(JOIN_AT, limit)
                hosts.start("d")
                hosts.start("e")
            hosts.wait_for(steps, limit)
        finally:
            hosts.finish()
        curves[name] = hosts.losses()
    steady = {row["iteration"]: row["loss"] for row in curves["uninterrupted"]}
    gap = max(abs(row["loss"] - steady[row["iteration"]]) for row in curves["elastic"])
    print(f"largest loss difference over {len(curves['elastic'])} steps: {gap:.2e}")
    (out / "elastic.json").write_text(json.dumps({"largest_loss_difference": gap, **curves}, indent=1) + "\n")
    draw(curves, out / "elastic.png")


def draw(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    steady = curves["uninterrupted"]
    axis.plot(
        [r["iteration"] for r in steady], [r["loss"] for r in steady], color="0.75", linewidth=6,
        label=f"uninterrupted, {steady[0]['layout']}",
    )  # fmt: skip
    colours = iter(("#0072B2", "#D55E00", "#009E73", "#CC79A7"))
    for layout in dict.fromkeys(r["layout"] for r in curves["elastic"]):
        rows = [r for r in curves["elastic"] if r["layout"] == layout]
        axis.plot(
            [r["iteration"] for r in rows], [r["loss"] for r in rows], "o", markersize=4, color=next(colours),
            label=f"elastic, {layout}",
        )  # fmt: skip
    axis.set_xlabel("iteration")
    axis.set_ylabel("loss")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, metavar="OUT")
    parser.add_argument("--folder", type=Path, help="in shared memory: losses and replicas")
    parser.add_argument("--host", help="name of this host; its replicas are lost with it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--pace", type=float, default=0.5, help="least seconds a step, to have time to interrupt"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for each stage of the demo")
    options = parser.parse_args()
    if options.demo:
        demo(options.demo, options.steps, options.limit)
    elif options.folder and options.host:
        train(options)
    else:
        parser.error("give --demo, or --folder and --host under torchrun")


if __name__ == "__main__":
    main()

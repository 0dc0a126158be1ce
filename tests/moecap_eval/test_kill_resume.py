"""SIGKILL while a real engine works, at points that no clock decides, and what the next run makes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moecap_eval import read_records

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import moecap

TINY_MOE = Path(__file__).parents[2] / "examples" / "tiny_moe"
BLOCKS, ITEMS = 4, 8
# `moecap run` in a process that kills itself: when the arm has been told to work on a block (`ask`, call
# number N), or with half of a block's records on disk (`append`, append number N).
RUNNER = """
import os, signal, sys
from moecap_eval import arm_process, cli, records

where, number = sys.argv[1], int(sys.argv[2])
ask, write_all = arm_process.ArmProcess.ask, records._write_all
calls = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killing_ask(self, command, timeout_s):
    global calls
    calls += where == "ask" and command["command"] == "run"
    if where == "ask" and calls == number:
        self._read_reply = lambda timeout_s: die()
    return ask(self, command, timeout_s)

def killing_write(descriptor, data):
    global calls
    if where == "append" and b'"kind":"block"' in data:
        calls += 1
        if calls == number:
            write_all(descriptor, data[: len(data) - 40])
            die()
    write_all(descriptor, data)

arm_process.ArmProcess.ask = killing_ask
records._write_all = killing_write
sys.exit(cli.main(sys.argv[3:]))
"""


def killed_run(where: str, number: int, config: Path, out: Path) -> None:
    command = [sys.executable, "-c", RUNNER, where, str(number), "run", str(config), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def recorded_blocks(out: Path) -> list[tuple[str, int]]:
    """Whole lines only: the last one may be torn."""
    lines = (out / "records.jsonl").read_bytes().split(b"\n")[:-1]
    blocks = [line for line in map(json.loads, lines) if line["kind"] == "block"]
    return [(block["arm"], block["block"]) for block in blocks]


@pytest.mark.slow
@pytest.mark.vllm
def test_cap15_a_real_engine_killed_twice_leaves_every_block_once(tmp_path: Path) -> None:
    params = {
        "model": str(TINY_MOE / "model"),
        "tasks": str(TINY_MOE / "tasks" / "max.jsonl"),
        "limit": ITEMS,
        "max_new_tokens": 6,
        "concurrency": 2,
        "threads": 1,
        "seed": 5,
    }
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    content = {
        "name": "killed",
        "workload": "moecap_eval.workloads.text_generation:TextGeneration",
        "params": params,
        "arms": {"plain": {}},
        "compare": {"blocks": BLOCKS, "warm_up": 0, "aa_control": True},
        "hardware": {"profile": "cpu-reference", "peaks": "spec"},
    }
    config.write_text(yaml.safe_dump(content))
    killed_run("ask", 3, config, out)  # the engine answers the third block while its runner dies
    first = recorded_blocks(out)
    assert len(first) == 2
    killed_run("append", 2, config, out)  # the second block of this run is half on disk
    second = recorded_blocks(out)
    assert len(second) == 3
    assert second[:2] == first
    assert not (out / "records.jsonl").read_bytes().endswith(b"\n")
    torn = moecap("compare", out)
    assert torn.returncode == 2
    assert "is cut off, the run was interrupted there" in torn.stderr

    done = moecap("run", config, "-o", out, timeout=300)
    assert done.returncode == 0, done.stderr
    finished = recorded_blocks(out)
    assert finished[:3] == second
    assert sorted(finished) == [(arm, block) for arm in ("plain", "plain#aa") for block in range(BLOCKS)]
    records = read_records(out)
    for arm in records.slots:
        assert [sample.item for sample in records.samples[arm]] == [
            sample.item for sample in records.samples["plain"]
        ]
        for block in records.blocks[arm]:
            steps = records.steps[arm, block.block]
            assert sum(step.sampled_tokens for step in steps) == block.work
            assert not any(step.invalid for step in steps)
    assert len({sample.item for sample in records.samples["plain"]}) == ITEMS
    # Greedy answers are those of one engine, however often it was killed.
    digests = [{sample.item: sample.digest for sample in records.samples[arm]} for arm in records.slots]
    assert digests[0] == digests[1]

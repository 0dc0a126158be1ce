"""Arms in processes, balanced blocks, interruption at any point, and no process left behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecap_eval import (
    ArmConfig,
    BlockResult,
    Item,
    RunContext,
    Sample,
    System,
    block_order,
    parse_config,
    read_records,
    run,
)
from moecap_eval.records import check_item_ids
from moecap_eval.worker import _to_json
from moecap_eval.workloads.synthetic import SyntheticWorkload

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data, write_config

ARMS = {"plain": {}, "fast": {"slowdown": 0.5}}


class NastySystem(System):
    """Prints, writes to the raw descriptors, starts a grandchild, and answers all the same."""

    def __init__(self, out_dir: Path, name: str) -> None:
        self._child = subprocess.Popen(["sleep", "600"])
        (out_dir / f"pids-{name}.txt").write_text(f"{os.getpid()} {self._child.pid}")

    def run(self, items: Sequence[Item]) -> BlockResult:
        print('{"event": "block", "wall_s": -1}')
        os.write(1, b"raw bytes on stdout\n")
        os.write(2, b"raw bytes on stderr\n")
        time.sleep(0.2)
        return BlockResult(work=1.0, values={"nan": float("nan")}, samples=[Sample(i.id, {}) for i in items])


class NastyWorkload(SyntheticWorkload):
    """A library that does everything a measured library should not."""

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        print("opening", arm.name)
        return NastySystem(context.out_dir, arm.name)


class UnstableWorkload(SyntheticWorkload):
    """Items that differ from call to call."""

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        return [Item(f"{os.getpid()}/{i}", i) for i in range(8)]


def alive(pid: int) -> bool:
    """Running, and not a zombie that waits for its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def blocks_of(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [(line["arm"], line["block"]) for line in lines if line["kind"] == "block"]


def expected_blocks(arms: Sequence[str], blocks: int) -> list[tuple[str, int]]:
    return sorted(itertools.product(arms, range(blocks)))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True), st.integers(1, 10), st.integers())
def test_cap12_each_pair_is_balanced(arms, half, seed):
    order = block_order(arms, 2 * half, seed)
    assert all(sorted(block) == sorted(arms) for block in order)
    for first, second in itertools.combinations(arms, 2):
        assert sum(block.index(first) < block.index(second) for block in order) == half
    assert order == block_order(arms, 2 * half, seed)


def test_odd_blocks_are_refused():
    with pytest.raises(ValueError, match=r"^compare.blocks must be even, got 7$"):
        block_order(["a"], 7, 0)


def test_cap12_records_follow_the_order(tmp_path):
    config = parse_config(config_data(ARMS))
    summary = run(config, tmp_path)
    assert summary.failed == {}
    assert summary.completed == {"plain": 4, "fast": 4, "plain#aa": 4}
    slots = [arm for block in block_order(config.slots, 4, config.seed) for arm in block]
    assert [arm for arm, _ in blocks_of(tmp_path)] == slots
    records = read_records(tmp_path)
    assert records.ended
    assert records.items_per_block == 8
    items = [sample.item for sample in records.samples["plain"]]
    assert items == [sample.item for sample in records.samples["fast"]]
    assert len(set(items)) == 32


def test_cap15_a_finished_run_is_left_alone(tmp_path):
    config = parse_config(config_data(ARMS))
    run(config, tmp_path)
    before = (tmp_path / "records.jsonl").read_bytes()
    run(config, tmp_path)
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_cap15_another_config_is_refused_and_nothing_changes(tmp_path):
    run(parse_config(config_data(ARMS)), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(
        ValueError, match=r"holds records of another config \(digest [0-9a-f]{12}\.\.\.\); choose another -o"
    ):
        run(parse_config(config_data(ARMS, items=40)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("victim", ["runner", "worker", "interrupt", "terminate"])
def test_cap15_killed_in_the_middle_of_a_block_resumes(tmp_path, victim):
    """Whoever is killed, no process stays, nothing is doubled, and the next run fills what is missing."""
    out = tmp_path / "out"
    arms = {"plain": {"sleep_s": 0.15}, "fast": {"sleep_s": 0.15}}
    config_path = write_config(tmp_path / "c.yaml", arms)
    runner = subprocess.Popen(
        [sys.executable, "-m", "moecap_eval", "run", str(config_path), "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests in the background of a shell has them inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: (out / "records.jsonl").exists() and len(blocks_of(out)) >= 3)
    children = Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()
    workers = [
        int(pid) for pid in children if "moecap_eval.worker" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert len(workers) == 2
    time.sleep(0.05)
    if victim == "worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        number = {"runner": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}[victim]
        runner.send_signal(number)
    _, stderr = runner.communicate(timeout=60)
    assert runner.returncode == {"runner": -9, "worker": 1, "interrupt": 130, "terminate": 130}[victim]
    assert "Traceback" not in stderr
    if victim == "worker":
        assert "was killed by SIGKILL" in stderr
    wait_until(lambda: not any(alive(pid) for pid in workers), 10)
    done = blocks_of(out)
    assert 3 <= len(done) < 12

    again = subprocess.run(
        [sys.executable, "-m", "moecap_eval", "run", str(config_path), "-o", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    finished = blocks_of(out)
    assert finished[: len(done)] == done
    assert sorted(finished) == expected_blocks(["fast", "plain", "plain#aa"], 4)
    assert all(len(own) == 32 for own in read_records(out).samples.values())


def test_orphans_of_a_killed_runner_take_their_children_along(tmp_path):
    out = tmp_path / "out"
    data = config_data({"plain": {}, "other": {}}, items=64, blocks=64)
    data["workload"] = f"{Path(__file__).stem}:NastyWorkload"
    (tmp_path / "c.yaml").write_text(json.dumps(data))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    runner = subprocess.Popen(
        [sys.executable, "-m", "moecap_eval", "run", str(tmp_path / "c.yaml"), "-o", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    wait_until(lambda: (out / "records.jsonl").exists() and len(blocks_of(out)) >= 1)
    pids = [int(pid) for path in out.glob("pids-*.txt") for pid in path.read_text().split()]
    assert len(pids) == 4
    assert all(alive(pid) for pid in pids)
    runner.kill()
    runner.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids), 10)


def test_prints_of_the_library_go_to_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    data = config_data({"plain": {}}, items=4, blocks=2)
    data["workload"] = f"{Path(__file__).stem}:NastyWorkload"
    summary = run(parse_config(data), tmp_path)
    assert summary.completed == {"plain": 2, "plain#aa": 2}
    log = (tmp_path / "logs" / "plain.txt").read_text()
    assert "opening plain" in log
    assert "raw bytes on stdout" in log
    assert "raw bytes on stderr" in log
    block = read_records(tmp_path).blocks["plain"][0]
    assert block.values == {"nan": None}
    assert block.reasons == {"nan": "the system gave nan"}
    assert 0.2 < block.wall_s < 2
    pids = [int(pid) for pid in (tmp_path / "pids-plain.txt").read_text().split()]
    wait_until(lambda: not any(alive(pid) for pid in pids), 10)


@pytest.mark.parametrize(
    ("options", "timeout_s", "message"),
    [
        ({"fail_in_block": 1}, 120.0, "RuntimeError: told to fail in block 1"),
        ({"kill_in_block": 1}, 120.0, "the process was killed by SIGKILL"),
        ({"hang_in_block": 1}, 15.0, "no answer within 15 s"),
    ],
)
def test_a_dead_arm_is_recorded_and_the_others_go_on(tmp_path, options, timeout_s, message):
    arms = {"plain": {}, "bad": options, "fast": {"slowdown": 0.5}}
    summary = run(parse_config(config_data(arms, timeout_s=timeout_s)), tmp_path)
    assert summary.completed == {"plain": 4, "bad": 1, "fast": 4, "plain#aa": 4}
    assert message in summary.failed["bad"]
    assert str(tmp_path / "logs" / "bad.txt") in summary.failed["bad"]


def test_without_keep_alive_one_arm_is_loaded_at_a_time(tmp_path):
    config = parse_config(config_data({"plain": {}, "fast": {}, "slow": {}}, keep_alive=False))
    run(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    order = [line["arm"].removesuffix("#aa") for line in lines if line["kind"] == "block"]
    visits = [arm for arm, _ in itertools.groupby(order)]
    assert [line["arm"] for line in lines if line["kind"] == "arm"] == visits
    assert sorted(blocks_of(tmp_path)) == expected_blocks(["fast", "plain", "plain#aa", "slow"], 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 3}, "^4 blocks need at least 4 items, got 3$"),
        (
            {"arms": {"plain": {"slowdwn": 2}}},
            "^arms.plain: arms.plain.slowdwn: unknown key; did you mean 'slowdown'",
        ),
        ({"margins": {"thruput": 0.1}}, "^compare.margins.thruput: unknown key; did you mean 'throughput'"),
        ({"workload": "synthetic"}, "^workload: no workload 'synthetic' is registered"),
        ({"workload": "moecap_eval.nowhere:X"}, "^workload: 'moecap_eval.nowhere:X' cannot be loaded"),
        ({"workload": "moecap_eval.workload:Item"}, "is not a subclass of moecap_eval.Workload"),
        (
            {"profile": "cpu-referense"},
            "unknown hardware profile 'cpu-referense'; did you mean 'cpu-reference'",
        ),
    ],
)
def test_mistakes_stop_the_run_before_a_block(tmp_path, change, message):
    data = config_data(change.get("arms", ARMS), items=change.get("items", 32))
    data["compare"]["margins"] = change.get("margins", {})
    data["workload"] = change.get("workload", data["workload"])
    data["hardware"]["profile"] = change.get("profile", "cpu-reference")
    with pytest.raises(ValueError, match=message):
        run(parse_config(data), tmp_path / "out")
    assert not (tmp_path / "out").exists() or blocks_of(tmp_path / "out") == []


def test_a_folder_without_a_block_takes_a_mended_config(tmp_path):
    """A mistake found while opening leaves a header behind, which must not claim the folder."""
    with pytest.raises(ValueError, match="slowdwn"):
        run(parse_config(config_data({"plain": {}, "fast": {"slowdwn": 2}})), tmp_path)
    assert (tmp_path / "records.jsonl").exists()
    summary = run(parse_config(config_data(ARMS)), tmp_path)
    assert summary.completed == {"plain": 4, "fast": 4, "plain#aa": 4}
    assert read_records(tmp_path).arm_names == ("plain", "fast")


@pytest.mark.parametrize("name", ["config.yaml", "report.html", "environment.json"])
def test_files_of_somebody_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} exists and is not of a run; choose another -o"):
        run(parse_config(config_data(ARMS)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_arms_must_have_the_same_items(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    data = config_data(ARMS, blocks=2)
    data["workload"] = f"{Path(__file__).stem}:UnstableWorkload"
    data["params"] = {}
    with pytest.raises(
        ValueError,
        match=r"^item ids differ between arms: 8 only in 'plain' \(e\.g\. '\d+/0'\), 8 only in 'fast'",
    ):
        run(parse_config(data), tmp_path)


def test_item_id_messages():
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_item_ids({"plain": ["a/1", "a/7", "a/8"], "fast": ["a/1"]})
    assert (
        str(error.value) == "item ids differ between arms: 2 only in 'plain' (e.g. 'a/7'), 0 only in 'fast'"
    )
    with pytest.raises(ValueError, match="in another order in 'fast'"):
        check_item_ids({"plain": ["a", "b"], "fast": ["b", "a"]})


def test_remainder_is_left_out_and_said(tmp_path):
    summary = run(parse_config(config_data({"plain": {}}, items=35)), tmp_path)
    assert summary.left_out == 3
    assert len(read_records(tmp_path).samples["plain"]) == 32


def test_limit_shrinks_blocks(tmp_path):
    summary = run(parse_config(config_data(ARMS, blocks=8)), tmp_path, limit=2)
    assert summary.completed == {"plain": 2, "fast": 2, "plain#aa": 2}


def test_two_runs_cannot_share_a_folder(tmp_path):
    out = tmp_path / "out"
    path = write_config(tmp_path / "c.yaml", {"plain": {"sleep_s": 0.5}})
    command = [sys.executable, "-m", "moecap_eval", "run", str(path), "-o", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: (out / "records.jsonl").exists() and (out / "records.jsonl").stat().st_size > 0)
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert "is in use by another run" in second.stderr


def test_values_of_numpy_and_torch_reach_the_records_as_numbers():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    detail = {
        "a": torch.tensor(3.5),
        "b": numpy.int64(2),
        "c": torch.tensor([1, 2]),
        "d": Path("x"),
        "e": {4},
    }
    text = json.dumps(detail, default=_to_json)
    assert json.loads(text) == {"a": 3.5, "b": 2, "c": [1, 2], "d": "x", "e": [4]}

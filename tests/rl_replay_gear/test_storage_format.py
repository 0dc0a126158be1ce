"""Tables on disk (GR-12): round trip, refusals by name, killed and failing saves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rl_replay_gear import (
    ColumnSpec,
    Fifo,
    Lifo,
    ReturnsToGo,
    TableSpec,
    TrajectoryTable,
    Uniform,
    Window,
    load_table,
    save_table,
)
from rl_replay_gear.randomness import CounterGenerator


def content(table):
    return [
        [handle, priority, {name: value.tolist() for name, value in table.read(handle).items()}]
        for handle, priority in zip(table.handles().tolist(), table.priorities().tolist(), strict=True)
    ]


def test_gr12_everything_comes_back(spec, make_trajectory, tmp_path):
    columns = (*spec.columns, ColumnSpec("image", (300,), torch.uint8), ColumnSpec("state", (2,), final=True))
    table = TrajectoryTable(TableSpec(columns, 100, 12, (ReturnsToGo(reward="reward"),)), remover=Lifo())
    for seed in range(40):
        n = 1 + seed % 13
        table.write(
            {**make_trajectory(n, seed), "image": torch.full((n, 300), seed, dtype=torch.uint8),
             "state": torch.full((n + 1, 2), float(seed))},
            priority=float(seed % 5),
        )  # fmt: skip
    table.remove(int(table.handles()[2]))
    save_table(table, tmp_path / "t")
    loaded = load_table(tmp_path / "t", remover=Lifo())
    assert loaded.spec == table.spec
    assert content(loaded) == content(table)
    for seed in range(20):  # and goes on as the original does
        extra = {**make_trajectory(5, seed), "image": torch.zeros(5, 300, dtype=torch.uint8),
                 "state": torch.zeros(6, 2)}  # fmt: skip
        assert loaded.write(extra) == table.write(extra)
    assert content(loaded) == content(table)
    a, b = (t.select(Uniform(), 20, generator=CounterGenerator(0)) for t in (table, loaded))
    assert torch.equal(a.handles, b.handles)
    assert not any(name.suffix in {".pkl", ".pt", ".tmp"} for name in (tmp_path / "t").iterdir())


def test_gr12_retired_trajectories_and_empty_tables_come_back(spec, make_trajectory, tmp_path):
    save_table(TrajectoryTable(spec), tmp_path / "empty")
    assert len(load_table(tmp_path / "empty")) == 0
    table = TrajectoryTable(spec, max_times_sampled=1)
    for seed in range(4):
        table.write(make_trajectory(3, seed))
    table.select(Fifo(), 2)
    save_table(table, tmp_path / "queue")
    loaded = load_table(tmp_path / "queue")
    assert loaded.select(Fifo(), 2).handles.tolist() == table.handles()[2:].tolist()


def test_gr12_mapped_tables_are_read_only(filled, make_trajectory, tmp_path):
    save_table(filled, tmp_path)
    mapped = load_table(tmp_path, mmap=True)
    assert content(mapped) == content(filled)
    batch = mapped.collect(mapped.select(Uniform(), 8), Window(3))
    assert batch["obs"].shape == (8, 3, 3)
    with pytest.raises(RuntimeError, match="read-only"):
        mapped.write(make_trajectory(3))


def corrupt_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_gr12_truncated_altered_missing_and_foreign_files_are_refused_by_name(filled, tmp_path):
    save_table(filled, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for name in manifest["files"]:
        path = tmp_path / name
        whole = path.read_bytes()
        if whole:
            path.write_bytes(whole[:-1])
            with pytest.raises(
                ValueError, match=rf"{name}: expected {len(whole)} bytes, found {len(whole) - 1}"
            ):
                load_table(tmp_path)
            path.write_bytes(whole)
            corrupt_byte(path)
            with pytest.raises(ValueError, match=rf"{name}: expected sha256"):
                load_table(tmp_path)
        path.unlink()
        with pytest.raises(ValueError, match=name):
            load_table(tmp_path)
        path.write_bytes(whole)
    load_table(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": "other 3"}))
    with pytest.raises(ValueError, match="expected the format 'rl_replay_gear table 1', found 'other 3'"):
        load_table(tmp_path)
    manifest["spec"]["columns"][0]["shape"] = [4]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"schema .* differs"):
        load_table(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_table(tmp_path)
    with pytest.raises(ValueError, match="holds no saved table"):
        load_table(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="something else"):
        save_table(filled, tmp_path / "mine")


def test_gr12_nothing_is_pickled(filled, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    save_table(filled, tmp_path)
    for options in ({}, {"mmap": True}):
        loaded = load_table(tmp_path, **options)
        assert torch.equal(loaded.handles(), filled.handles())
    opcodes = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how a pickle begins
    assert not any(path.read_bytes().startswith(opcodes) for path in tmp_path.iterdir())


KILLED = """
import os, sys
import torch
from rl_replay_gear import ColumnSpec, TableSpec, TrajectoryTable, save_table
table = TrajectoryTable(TableSpec((ColumnSpec("x", (1000,)),), 20000, 100))
for i in range(10):
    table.write({{"x": torch.full((1500, 1000), float(i))}})
print("saving", flush=True)
while True:
    save_table(table, {path!r})
"""


@pytest.mark.parametrize("delay", [0.05, 0.15, 0.3])
def test_gr12_a_killed_save_leaves_the_old_table_whole(tmp_path, delay):
    path = tmp_path / "t"
    table = TrajectoryTable(TableSpec((ColumnSpec("x", (1000,)),), 20000, 100))
    handle = table.write({"x": torch.full((5, 1000), 42.0)})
    save_table(table, path)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(path=str(path))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "saving"
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = load_table(path)
    assert len(found) in (1, 10)  # the old table or, if a save had ended, the new one: whole either way
    if len(found) == 1:
        assert torch.equal(found.read(handle)["x"], torch.full((5, 1000), 42.0))
    save_table(table, path)  # also clears what the killed save left
    names = set(json.loads((path / "manifest.json").read_text())["files"]) | {"manifest.json"}
    assert {item.name for item in path.iterdir()} == names


@pytest.mark.parametrize("fail_at", [1, 3, 8])
def test_gr12_a_full_disk_leaves_the_old_table_whole(filled, make_trajectory, tmp_path, monkeypatch, fail_at):
    save_table(filled, tmp_path)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    filled.write(make_trajectory(9))
    real, calls = os.write, iter(range(1, 1000))

    def write(descriptor, data):
        if next(calls) == fail_at:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        save_table(filled, tmp_path)
    monkeypatch.undo()
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before
    assert len(load_table(tmp_path)) == 5

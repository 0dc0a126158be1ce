"""Every damage is named and never becomes a wrong model (SL-10); full disks and two writers lose nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm_serverless_loader.tensors import assert_same, descriptors
from vllm_serverless_loader import (
    CheckpointKey,
    CorruptCheckpointError,
    LoadOptions,
    load_checkpoint,
    open_checkpoint,
    write_partition,
)
from vllm_serverless_loader.checkpoint import writer
from vllm_serverless_loader.checkpoint.index import config_digest

BASE = "partition-00000-of-00001"


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{n}": torch.randn(300, 41, generator=generator) for n in range(4)}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"hidden_size": 41}')
    key = CheckpointKey(model=config_digest({"hidden_size": 41}), dtype="float32")
    write_partition(path, tensors(), key=key, chunk_bytes=16 << 10)
    return path


@pytest.fixture(autouse=True)
def no_leak():
    before, begin = descriptors(), time.process_time()
    yield
    assert descriptors() == before
    assert time.process_time() - begin < 2.0


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 16 << 10, 100_001, 3 * 300 * 41 * 4 + 5])
def test_sl10_flipped_byte_of_data(folder, at):
    flip(folder / f"{BASE}.bin", at)
    chunk = at // (16 << 10)
    begin = chunk * (16 << 10)
    text = rf"{BASE}\.bin: checksum of chunk {chunk} \(bytes {begin}\.\.{begin + (16 << 10)}\) differs"
    with open_checkpoint(folder) as checkpoint:
        for attempt in (
            checkpoint.load,
            checkpoint.verify,
            lambda: list(checkpoint.tensors()),
            lambda: checkpoint.load(into={name: torch.empty(300, 41) for name in tensors()}),
        ):
            with pytest.raises(CorruptCheckpointError, match=text):
                attempt()


def test_sl10_every_byte_of_the_index_matters(folder):
    path = folder / f"{BASE}.json"
    good = path.read_bytes()
    named = 0
    for at in range(0, len(good), 7):
        flip(path, at)
        try:
            with open_checkpoint(folder) as checkpoint:
                # White space is all that may change without notice.
                assert json.loads(path.read_bytes()) == json.loads(good)
                assert_same(checkpoint.load().tensors, tensors())
        except ValueError as error:
            named += BASE in str(error)
        else:
            named += 1
        path.write_bytes(good)
    assert named == len(range(0, len(good), 7))


@pytest.mark.parametrize("cut", [0, 1, 100_000])
def test_sl10_truncated_data(folder, cut):
    path = folder / f"{BASE}.bin"
    size = path.stat().st_size
    os.truncate(path, cut)
    with pytest.raises(CorruptCheckpointError, match=f"{BASE}.bin: {cut} bytes, expected {size}"):
        open_checkpoint(folder)


def test_sl10_truncated_index(folder):
    path = folder / f"{BASE}.json"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptCheckpointError, match="not a partition index"):
        open_checkpoint(folder)


def edit(folder, change):
    """Change an index and give it the right checksum, as someone who means harm would."""
    import xxhash

    path = folder / f"{BASE}.json"
    content = json.loads(path.read_text())
    content.pop("index_checksum")
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "index_checksum": xxhash.xxh3_64_hexdigest(text.encode())}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c["tensors"]["w1"].update(offset=256), "overlaps"),
        (lambda c: c["tensors"]["w3"].update(offset=1 << 40), "outside of"),
        (lambda c: c["tensors"]["w0"].update(offset=-256), "offset must be a whole number"),
        (lambda c: c["tensors"]["w0"].update(offset=3), "no multiple of 256"),
        (lambda c: c["tensors"]["w0"].update(dtype="float31"), "unknown dtype 'float31'"),
        (lambda c: c["tensors"]["w0"].update(dtype="float64"), "does not make"),
        (lambda c: c["tensors"]["w0"].update(shape=[300, -41]), "bad shape"),
        (lambda c: c["tensors"]["w0"].update(shape=[True]), "bad shape"),
        (lambda c: c["tensors"].update(w9=7), "not a partition index"),
        (lambda c: c.update(chunk_checksums=c["chunk_checksums"][1:]), "checksums"),
        (lambda c: c.update(chunk_bytes=1 << 62), "chunk_bytes"),
        (lambda c: c.update(chunk_bytes=0), "chunk_bytes"),
        (lambda c: c.update(checksum="md5"), "unknown checksum 'md5'"),
        (lambda c: c.update(rank=1), "rank 1 of 1"),
        (lambda c: c["key"].update(surprise=1), "not a partition index"),
        (lambda c: c["key"].update(dtype=["float32"]), "key.dtype"),
        (lambda c: c.pop("tensors"), "not a partition index"),
        (lambda c: c.update(version="1"), "version"),
        (lambda c: c.update(num_bytes=1e5), "num_bytes"),
    ],
)
def test_sl10_index_that_contradicts_itself(folder, change, text):
    edit(folder, change)
    with pytest.raises(CorruptCheckpointError, match="not a partition index") as caught:
        open_checkpoint(folder)
    assert text in str(caught.value)


def test_sl10_newer_version(folder):
    edit(folder, lambda content: content.update(version=9))
    with pytest.raises(ValueError, match=r"format version 9 is not supported \(this release reads 1\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": 1, "version": 1}']
)
def test_sl10_index_that_is_something_else(folder, content):
    (folder / f"{BASE}.json").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="not a partition index"):
        open_checkpoint(folder)


def test_sl10_other_models_index(folder, tmp_path):
    other = tmp_path / "other"
    write_partition(other, tensors(seed=1), chunk_bytes=16 << 10)
    shutil.copy(other / f"{BASE}.json", folder / f"{BASE}.json")
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(CorruptCheckpointError, match="checksum of chunk"),
    ):
        checkpoint.load()
    write_partition(tmp_path / "third", tensors(), key=CheckpointKey(model="0" * 64), chunk_bytes=16 << 10)
    shutil.copy(tmp_path / "third" / f"{BASE}.json", folder / f"{BASE}.json")
    with pytest.raises(ValueError, match=f"model is '{'0' * 64}', expected"):
        open_checkpoint(folder)


def test_sl10_wrong_dtype_and_key(folder):
    with pytest.raises(ValueError, match=f"{folder}: dtype is 'float32', expected 'bfloat16'"):
        open_checkpoint(folder, expect=CheckpointKey(dtype="bfloat16"))
    with open_checkpoint(folder) as checkpoint:
        into = {name: torch.zeros(300, 41, dtype=torch.bfloat16) for name in tensors()}
        with pytest.raises(ValueError, match="4 tensors are of another shape or dtype: w0"):
            checkpoint.load(into=into)
        assert not any(tensor.any() for tensor in into.values())


def test_sl10_wrong_number_of_ranks(tmp_path):
    key = CheckpointKey(layout="vllm", tensor_parallel_size=2)
    for rank in range(2):
        write_partition(tmp_path, tensors(), rank=rank, world_size=2, key=key)
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=2, running with 1; convert again with --tensor-par"
    ):
        open_checkpoint(tmp_path, world_size=1)
    with pytest.raises(ValueError, match="has 2 partitions, rank 2 asked for"):
        open_checkpoint(tmp_path, rank=2)
    write_partition(tmp_path, tensors())
    with pytest.raises(ValueError, match="holds partitions of 1 and of 2 ranks"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_sl10_missing_rank(tmp_path, suffix):
    for rank in range(2):
        write_partition(tmp_path, tensors(), rank=rank, world_size=2)
    (tmp_path / f"partition-00001-of-00002{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"partition 1 of 2 .*partition-00001-of-00002\{suffix}"):
        open_checkpoint(tmp_path)


def test_sl10_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            FileNotFoundError, match=f"no checkpoint in {path}: expected .*serverless-loader convert"
        ):
            open_checkpoint(path)


def test_sl10_damaged_safetensors(tmp_path):
    path = tmp_path / "model-1.safetensors"
    save_file(tensors(), path)
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(CorruptCheckpointError, match=f"{path}: {size - 10} bytes, expected {size}"):
        open_checkpoint(tmp_path)
    for content in (
        b"",
        b"abc",
        b"\xff" * 32,
        (5).to_bytes(8, "little") + b"{]]]]",
        (2).to_bytes(8, "little") + b"[]",
    ):
        path.write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match="not a safetensors file"):
            open_checkpoint(tmp_path)
    save_file(tensors(), path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w0": "model-2.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"names model-2\.safetensors, which is missing"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w7": path.name}}))
    with pytest.raises(CorruptCheckpointError, match="tensor 'w7' is not in"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w0": "../model-1.safetensors"}}))
    with pytest.raises(CorruptCheckpointError, match="same directory"):
        open_checkpoint(tmp_path)


def test_sl10_read_that_fails(folder, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with open_checkpoint(folder) as checkpoint, pytest.raises(OSError, match=rf"{BASE}\.bin"):
        checkpoint.load(options=LoadOptions(io_threads=4))


@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_full_disk_while_writing_leaves_nothing(tmp_path, monkeypatch, after):
    real, calls = os.write, []

    def full(fd, content):
        calls.append(fd)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_partition(tmp_path, tensors(), chunk_bytes=32 << 10)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    write_partition(tmp_path, tensors())
    assert_same(load_checkpoint(tmp_path), tensors())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB."""
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(where)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_full_disk_that_is_real_leaves_nothing(small_disk, monkeypatch):
    with pytest.raises(OSError, match="the disk is full") as caught:
        write_partition(small_disk / "model", tensors(), chunk_bytes=16 << 10)
    assert caught.value.errno == errno.ENOSPC
    # The same without the look ahead, as if another process had filled the disk meanwhile.
    monkeypatch.setattr(writer, "_reserve", lambda *_: None)
    with pytest.raises(OSError, match="No space left on device"):
        write_partition(small_disk / "model", tensors(), chunk_bytes=16 << 10)
    assert list((small_disk / "model").iterdir()) == []
    write_partition(small_disk / "model", {"w": torch.zeros(100)})
    assert_same(load_checkpoint(small_disk / "model"), {"w": torch.zeros(100)})


def test_full_disk_is_noticed_before_the_first_byte(tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(os, "fstatvfs", lambda fd: Full)
    with pytest.raises(OSError, match=r"the disk is full: \d+ bytes needed, 40960 free"):
        write_partition(tmp_path, tensors())
    assert list(tmp_path.iterdir()) == []


def test_existing_checkpoint_is_never_overwritten(folder):
    with pytest.raises(FileExistsError, match="a checkpoint is here already"):
        write_partition(folder, tensors(seed=5))
    assert_same(load_checkpoint(folder), tensors())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", f"{BASE}.bin", f"{BASE}.json"]


HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
fcntl.flock(fd, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_concurrent_writer_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path):
    partial = tmp_path / f"{BASE}.json.partial"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(partial)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="another process is writing this partition"):
            write_partition(tmp_path, tensors())
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        open_checkpoint(tmp_path)
    write_partition(tmp_path, tensors())
    assert_same(load_checkpoint(tmp_path), tensors())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{BASE}.bin", f"{BASE}.json"]

"""The store process: engines restart without reading the disk, clients and servers die (SL-09)."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.vllm_serverless_loader.tensors import assert_same, descriptors, hostile
from vllm_serverless_loader import (
    CorruptCheckpointError,
    HostCache,
    StoreClient,
    StoreServer,
    open_checkpoint,
    write_partition,
)

COMMAND = [sys.executable, "-m", "vllm_serverless_loader", "store", "--memory", "4MiB", "--chunk", "64KiB"]
HOLDER = """
import sys, time
from vllm_serverless_loader import StoreClient
client = StoreClient(sys.argv[1])
model = client.open(sys.argv[2])
print(model.tensor("w").sum().item(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def server(tmp_path):
    with HostCache(4 << 20, chunk_bytes=64 << 10, shared=True) as cache:
        with StoreServer(cache, tmp_path / "store.sock") as server:
            yield server
        assert not (tmp_path / "store.sock").exists()


@pytest.fixture
def model(tmp_path):
    write_partition(tmp_path / "model", hostile(), chunk_bytes=64 << 10)
    return tmp_path / "model"


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sl09_second_client_reads_nothing_from_disk(server, model, monkeypatch):
    with StoreClient(server.socket_path) as client, client.open(model) as cached:
        assert not cached.hit
        assert_same(cached.load().tensors, hostile())
    reads = []
    monkeypatch.setattr(os, "preadv", lambda *arguments: reads.append(arguments))
    with StoreClient(server.socket_path) as client, client.open(model) as cached:
        assert cached.hit
        result = cached.load(into={name: torch.zeros_like(tensor) for name, tensor in hostile().items()})
        assert_same(result.tensors, hostile())
        assert client.models() == [{"path": os.path.realpath(model), "rank": 0}]
    assert result.report.bytes_read.get("disk", 0) == 0
    assert reads == []


def test_sl09_views_share_the_stores_memory(server, model):
    with StoreClient(server.socket_path) as client, client.open(model) as cached:
        view = cached.tensor("odd")
        begin = cached.chunks[0] * server.cache.chunk_bytes + cached.index.tensors["odd"].offset
        server.cache.arena.buffer[begin] = 7
        assert view[0] == 7


def test_sl09_client_that_is_killed_loses_its_leases(server, tmp_path):
    write_partition(tmp_path / "big", {"w": torch.ones(3 << 20, dtype=torch.uint8)})
    write_partition(tmp_path / "other", {"w": torch.ones(2 << 20, dtype=torch.uint8)})
    command = [sys.executable, "-c", HOLDER, str(server.socket_path), str(tmp_path / "big")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == str(3 << 20)
        with StoreClient(server.socket_path) as client:
            with pytest.raises(MemoryError, match="32 chunks needed, 16 free, 0 evictable, 64 in all"):
                client.open(tmp_path / "other")
            holder.kill()
            holder.wait()

            def fits():
                try:
                    client.open(tmp_path / "other").release()
                except MemoryError:
                    return False
                return True

            wait_until(fits)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_sl09_server_that_is_killed_is_named_and_can_be_replaced(tmp_path, model):
    path = tmp_path / "own.sock"
    for _ in range(2):  # the second finds the socket that the killed one left
        server = subprocess.Popen([*COMMAND, "--socket", str(path)], stdout=subprocess.PIPE, text=True)
        assert server.stdout.readline() == f"store: {4 << 20} bytes at {path}\n"
        client = StoreClient(path)
        cached = client.open(model)
        server.kill()
        server.wait()
        server.stdout.close()
        assert_same(cached.load().tensors, hostile())  # mapped memory outlives the server
        with pytest.raises(ConnectionError, match=f"store {path} does not answer"):
            client.open(model)
        cached.release()
        client.close()
    with pytest.raises(ConnectionError, match=f"store {path} does not answer"):
        StoreClient(path)


def test_sl22_store_command_ends_on_a_signal_and_removes_its_socket(tmp_path):
    path = tmp_path / "own.sock"
    server = subprocess.Popen([*COMMAND, "--socket", str(path)], stdout=subprocess.PIPE, text=True)
    server.stdout.readline()
    second = subprocess.run([*COMMAND, "--socket", str(path)], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another server listens" in second.stderr
    server.send_signal(signal.SIGTERM)
    assert server.wait(10) == 0
    server.stdout.close()
    assert not path.exists()


def test_sl09_errors_keep_their_type_and_text(server, tmp_path, model):
    with StoreClient(server.socket_path) as client:
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            client.open(tmp_path / "absent")
        write_partition(tmp_path / "two", hostile(), rank=0, world_size=2)
        write_partition(tmp_path / "two", hostile(), rank=1, world_size=2)
        with pytest.raises(ValueError, match="rank 3 asked for"):
            client.open(tmp_path / "two", rank=3)
        os.truncate(model / "partition-00000-of-00001.bin", 4096)
        with pytest.raises(CorruptCheckpointError, match="4096 bytes, expected"):
            client.open(model)
    assert server.cache.used_bytes == 0


def test_sl09_slow_disk_is_no_dead_server_and_a_silent_one_is(server, model, tmp_path, monkeypatch):
    real = os.preadv

    def slow(*arguments):
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    with StoreClient(server.socket_path, timeout_s=2.0) as client, client.open(model) as cached:
        assert_same(cached.load().tensors, hostile())
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ConnectionError, match=r"silent\.sock does not answer: timed out"):
            StoreClient(path, timeout_s=0.2)


def test_sl09_nonsense_on_the_socket_harms_nobody(server, model):
    for content in (b"\xff" * 100, struct.pack("<I", 2) + b"[]", struct.pack("<I", 9) + b"not json!", b"abc"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server.socket_path))
            connection.sendall(content)
    with StoreClient(server.socket_path) as client, client.open(model) as cached:
        assert_same(cached.load().tensors, hostile())


def test_sl09_nothing_is_left_behind(tmp_path, model):
    def use():
        with (
            HostCache(4 << 20, chunk_bytes=64 << 10, shared=True) as cache,
            StoreServer(cache, tmp_path / "s.sock") as server,
            StoreClient(server.socket_path) as client,
        ):
            client.open(model).release()
            client.open(model)  # never released
            with pytest.raises(FileNotFoundError):
                client.open(tmp_path / "absent")

    use()
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        use()
    assert descriptors() == before
    assert threading.active_count() == threads


def test_sl09_cache_must_be_shared(tmp_path):
    with HostCache(1 << 20, chunk_bytes=4096) as cache, pytest.raises(ValueError, match="shared=True"):
        StoreServer(cache, tmp_path / "s.sock")


def test_sl09_safetensors_through_the_store(server, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "plain"
    folder.mkdir()
    tensors = {"a": torch.randn(333, 7), "b": torch.randint(0, 9, (5,), dtype=torch.int8)}
    save_file(tensors, folder / "model.safetensors")
    with StoreClient(server.socket_path) as client, client.open(folder) as cached:
        assert_same(cached.load().tensors, tensors)
        assert cached.path == Path(os.path.realpath(folder))
    with open_checkpoint(folder) as checkpoint:
        assert server.cache.load(checkpoint).hit

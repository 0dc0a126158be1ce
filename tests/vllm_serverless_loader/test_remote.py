"""The remote tier: every byte crosses once, damage never becomes a copy (SL-23)."""

from __future__ import annotations

import fsspec
import pytest

from tests.vllm_serverless_loader.tensors import assert_same, descriptors, hostile
from vllm_serverless_loader import (
    CorruptCheckpointError,
    HostCache,
    StoreClient,
    StoreServer,
    load_checkpoint,
    open_remote,
    write_partition,
)

DATA = "partition-00000-of-00001.bin"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A checkpoint in fsspec's memory file system, and the bytes of data read from there."""
    write_partition(tmp_path / "made", hostile(), chunk_bytes=64 << 10)
    (tmp_path / "made" / "config.json").write_text("{}")
    system = fsspec.filesystem("memory")
    for path in (tmp_path / "made").iterdir():
        system.pipe_file(f"/bucket/model/{path.name}", path.read_bytes())
    reads, original = [], type(system).cat_file

    def cat_file(self, path, start=None, end=None, **options):
        content = original(self, path, start=start, end=end, **options)
        if path.endswith(".bin"):
            reads.append(len(content))
        return content

    monkeypatch.setattr(type(system), "cat_file", cat_file)
    yield reads
    system.rm("/bucket", recursive=True)


def test_sl23_one_read_fills_memory_and_disk_and_a_second_load_reads_none(remote, tmp_path):
    with HostCache(8 << 20, chunk_bytes=64 << 10) as cache:
        with open_remote("memory://bucket/model", tmp_path / "copy") as checkpoint:
            with cache.load(checkpoint) as model:
                assert not model.hit
                assert_same(model.load().tensors, hostile())
            size = checkpoint.num_bytes
        assert sum(remote) == size
        # From the pool, and after eviction from the local disk.
        with open_remote("memory://bucket/model", tmp_path / "copy") as checkpoint:
            with cache.load(checkpoint) as model:
                assert model.hit
            assert cache.evict(tmp_path / "copy")
            with cache.load(checkpoint) as model:
                assert_same(model.load().tensors, hostile())
        assert sum(remote) == size
    assert_same(load_checkpoint(tmp_path / "copy"), hostile())
    assert (tmp_path / "copy" / "config.json").read_text() == "{}"
    assert not list((tmp_path / "copy").glob("*.partial"))


def test_sl23_through_the_store(remote, tmp_path):
    with (
        HostCache(8 << 20, chunk_bytes=64 << 10, shared=True) as cache,
        StoreServer(cache, tmp_path / "s.sock", remote_cache=tmp_path / "copies") as server,
        StoreClient(server.socket_path) as client,
    ):
        for hit in (False, True):
            with client.open("memory://bucket/model") as model:
                assert model.hit == hit
                assert_same(model.load().tensors, hostile())
    size = sum(remote)
    with (
        HostCache(8 << 20, chunk_bytes=64 << 10, shared=True) as cache,
        StoreServer(cache, tmp_path / "s.sock") as server,
        StoreClient(server.socket_path) as client,
        pytest.raises(ValueError, match="--remote-cache"),
    ):
        client.open("memory://bucket/model")
    assert sum(remote) == size


def test_sl23_damage_on_the_way_leaves_no_copy(remote, tmp_path):
    system = fsspec.filesystem("memory")
    good = system.cat_file(f"/bucket/model/{DATA}")
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    system.pipe_file(f"/bucket/model/{DATA}", bytes(bad))
    before = descriptors()
    with HostCache(8 << 20, chunk_bytes=64 << 10) as cache:
        with (
            open_remote("memory://bucket/model", tmp_path / "copy") as checkpoint,
            pytest.raises(CorruptCheckpointError, match=f"memory://bucket/model/{DATA}: checksum of chunk"),
        ):
            cache.load(checkpoint)
        assert cache.used_bytes == 0
        assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["config.json"]
        # Fetched anew once the remote is whole again.
        system.pipe_file(f"/bucket/model/{DATA}", good)
        with (
            open_remote("memory://bucket/model", tmp_path / "copy") as checkpoint,
            cache.load(checkpoint) as model,
        ):
            assert_same(model.load().tensors, hostile())
    assert descriptors() == before
    system.pipe_file(f"/bucket/model/{DATA}", good[:4096])
    with pytest.raises(CorruptCheckpointError, match="4096 bytes, expected"):
        open_remote("memory://bucket/model", tmp_path / "other")


def test_sl23_nothing_there(tmp_path):
    fsspec.filesystem("memory").mkdirs("/empty", exist_ok=True)
    with pytest.raises(FileNotFoundError):
        open_remote("memory://empty", tmp_path / "copy")

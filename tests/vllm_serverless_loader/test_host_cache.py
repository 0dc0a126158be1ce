"""The host cache against a reference LRU; leases, shared fills, failures (SL-08)."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.vllm_serverless_loader.tensors import assert_same, bits, hostile
from vllm_serverless_loader import (
    CorruptCheckpointError,
    HostCache,
    LoadOptions,
    open_checkpoint,
    write_partition,
)

CHUNK = 8192
SIZES = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 9}  # chunks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, chunks in SIZES.items():
        tensor = torch.arange(chunks * CHUNK // 4, dtype=torch.int32) * ord(name)
        write_partition(root / name, {"w": tensor}, chunk_bytes=4096)
    return root


def lease(cache, models, name):
    with open_checkpoint(models / name) as checkpoint:
        return cache.load(checkpoint)


class CacheMachine(RuleBasedStateMachine):
    """Random loads, gets, releases and evictions beside the obvious reference."""

    models = None
    capacity = 8

    @initialize()
    def start(self):
        self.cache = HostCache(self.capacity * CHUNK + 100, chunk_bytes=CHUNK)
        self.reference: OrderedDict[str, int] = OrderedDict()
        self.leases = []

    @rule(name=st.sampled_from(sorted(SIZES)))
    def load(self, name):
        held = {name for name, _ in self.leases}
        if name not in self.reference:
            free = self.capacity - sum(self.reference.values())
            evictable = sum(size for other, size in self.reference.items() if other not in held)
            if SIZES[name] > free + evictable:
                text = f"{SIZES[name]} chunks needed, {free} free, {evictable} evictable, 8 in all"
                with pytest.raises(MemoryError, match=text):
                    lease(self.cache, self.models, name)
                return
            for other in list(self.reference):
                if SIZES[name] <= free:
                    break
                if other not in held:
                    free += self.reference.pop(other)
        found = lease(self.cache, self.models, name)
        assert found.hit == (name in self.reference)
        self.reference[name] = SIZES[name]
        self.reference.move_to_end(name)
        self.leases.append((name, found))

    @rule(name=st.sampled_from(sorted(SIZES)))
    def get(self, name):
        found = self.cache.get(self.models / name)
        assert (found is not None) == (name in self.reference)
        if found is not None:
            self.reference.move_to_end(name)
            self.leases.append((name, found))

    @rule(which=st.integers(0, 100))
    def release(self, which):
        if self.leases:
            self.leases.pop(which % len(self.leases))[1].release()

    @rule(name=st.sampled_from(sorted(SIZES)))
    def evict(self, name):
        if any(name == held for held, _ in self.leases):
            with pytest.raises(RuntimeError, match="leases"):
                self.cache.evict(self.models / name)
            return
        assert self.cache.evict(self.models / name) == (self.reference.pop(name, None) is not None)

    @invariant()
    def same_models_in_the_same_order(self):
        if not hasattr(self, "cache"):
            return
        expected = tuple((os.path.realpath(self.models / name), 0) for name in self.reference)
        assert self.cache.models == expected
        assert self.cache.used_bytes == sum(self.reference.values()) * CHUNK

    @invariant()
    def leased_models_keep_their_bytes(self):
        for name, found in getattr(self, "leases", []):
            expected = torch.arange(SIZES[name] * CHUNK // 4, dtype=torch.int32) * ord(name)
            assert torch.equal(found.tensor("w"), expected)

    def teardown(self):
        if hasattr(self, "cache"):
            for _, found in self.leases:
                found.release()
            self.leases.clear()
            self.cache.close()


def test_sl08_any_sequence_of_operations_equals_a_reference_lru(models):
    CacheMachine.models = models
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )


def test_sl08_pool_smaller_than_the_model_is_named_and_evicts_nothing(models):
    with HostCache(4 * CHUNK, chunk_bytes=CHUNK) as cache:
        lease(cache, models, "a").release()
        with pytest.raises(MemoryError, match="host cache: 9 chunks needed, 3 free, 1 evictable, 4 in all"):
            lease(cache, models, "e")
        assert len(cache.models) == 1
    with pytest.raises(ValueError, match="hold no chunk"):
        HostCache(100)


@pytest.mark.parametrize("chunk_bytes", [4096, 64 << 10, 16 << 20])
def test_sl08_hostile_tensors_come_out_bit_equal(tmp_path, chunk_bytes):
    write_partition(tmp_path, hostile(), chunk_bytes=64 << 10)
    expected = hostile()
    with HostCache(64 << 20, chunk_bytes=chunk_bytes) as cache, open_checkpoint(tmp_path) as checkpoint:
        with cache.load(checkpoint, options=LoadOptions(io_threads=3)) as model:
            assert not model.hit
            assert_same({name: model.tensor(name) for name in model.names}, expected)
            assert_same(model.load().tensors, expected)
            into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            result = model.load(into=into)
            assert_same(into, expected)
            assert result.report.source == "host"
            assert_same({name: tensor.clone() for name, tensor in model.tensors()}, expected)
        with pytest.raises(ValueError, match="released"):
            model.tensor("plain")


def test_sl08_scattered_chunks_hold_the_same_bytes(models):
    with HostCache(8 * CHUNK, chunk_bytes=CHUNK) as cache:
        held = [lease(cache, models, name) for name in ("a", "b", "c", "b")]
        held[2].release()
        assert cache.evict(models / "c")
        with lease(cache, models, "d") as model:  # 3 free chunks of c, 2 behind
            assert len(set(model.chunks)) == 4
            expected = torch.arange(4 * CHUNK // 4, dtype=torch.int32) * ord("d")
            assert torch.equal(model.load().tensors["w"], expected)
        for one in held:
            one.release()


def test_sl08_concurrent_callers_share_one_fill(models, monkeypatch):
    reads, real = [], os.preadv

    def slow(fd, buffers, offset, flags=0):
        time.sleep(0.005)
        count = real(fd, buffers, offset, flags)
        reads.append(count)
        return count

    monkeypatch.setattr(os, "preadv", slow)
    with HostCache(32 * CHUNK, chunk_bytes=CHUNK) as cache:
        found = []
        threads = [threading.Thread(target=lambda: found.append(lease(cache, models, "e"))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(one.hit for one in found) == [False] + [True] * 5
        assert sum(reads) == 9 * CHUNK
        for one in found:
            one.release()
        assert cache.evict(models / "e")


def test_sl08_failed_fill_gives_its_chunks_back_to_all_who_waited(models, tmp_path):
    write_partition(tmp_path, {"w": torch.zeros(3 * CHUNK, dtype=torch.uint8)}, chunk_bytes=4096)
    path = tmp_path / "partition-00000-of-00001.bin"
    content = bytearray(path.read_bytes())
    content[9000] = 1
    path.write_bytes(content)
    with HostCache(8 * CHUNK, chunk_bytes=CHUNK) as cache:
        for _ in range(2):
            with (
                open_checkpoint(tmp_path) as checkpoint,
                pytest.raises(CorruptCheckpointError, match="chunk 2"),
            ):
                cache.load(checkpoint)
        assert cache.used_bytes == 0
        assert cache.models == ()
        lease(cache, models, "d").release()


def test_sl08_checkpoint_that_changed_on_disk_is_read_again(tmp_path):
    def write(value):
        for old in tmp_path.glob("partition-*"):
            old.unlink()
        write_partition(tmp_path, {"w": torch.full((1000,), value)})

    with HostCache(8 * CHUNK, chunk_bytes=CHUNK) as cache:
        write(1)
        with open_checkpoint(tmp_path) as checkpoint:
            old = cache.load(checkpoint)
        write(2)
        with open_checkpoint(tmp_path) as checkpoint:
            new = cache.load(checkpoint)
        assert not new.hit
        assert bits(old.tensor("w")) == bits(torch.full((1000,), 1))
        assert bits(new.tensor("w")) == bits(torch.full((1000,), 2))
        assert cache.used_bytes == 2 * CHUNK
        old.release()
        assert cache.used_bytes == CHUNK
        new.release()

"""The format: round trips, bounds, ties, plain safetensors, direct I/O (SL-02, SL-04 to SL-07)."""

from __future__ import annotations

import errno
import json
import os
import threading
import warnings

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiered_memory.direct_io as direct_io
from tests.vllm_serverless_loader.tensors import assert_same, bits, descriptors, hostile
from vllm_serverless_loader import (
    CheckpointKey,
    LoadOptions,
    load_checkpoint,
    open_checkpoint,
    write_partition,
)

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e5m2, torch.bool, torch.complex64]


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    write_partition(path, hostile(), chunk_bytes=64 << 10)
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3)), min_size=0, max_size=12
    ),
    chunk=st.sampled_from([4096, 8192, 1 << 20]),
)
def test_sl02_any_tensor_set_round_trips_and_stays_small(tmp_path_factory, specs, chunk):
    path = tmp_path_factory.mktemp("sl02")
    tensors = {
        f"t{number}": torch.from_numpy(np.random.default_rng(number).integers(0, 2, shape)).to(dtype)
        for number, (dtype, shape) in enumerate(specs)
    }
    index = write_partition(path, tensors, chunk_bytes=chunk)
    assert_same(load_checkpoint(path), tensors)
    unique = sum(tensor.nbytes for tensor in tensors.values())
    assert index.num_bytes < unique + 256 * len(tensors) + 4096 or not tensors
    assert index.num_bytes % 4096 == 0


def test_sl02_a_reader_written_from_the_page_of_the_format_agrees(checkpoint_dir):
    """Only json, numpy and xxhash, as docs/vllm_serverless_loader.md tells."""
    index = json.loads((checkpoint_dir / "partition-00000-of-00001.json").read_text())
    data = (checkpoint_dir / "partition-00000-of-00001.bin").read_bytes()
    assert index["version"] == 1
    assert len(data) == index["num_bytes"]
    size = index["chunk_bytes"]
    found = [xxhash.xxh3_64_hexdigest(data[at : at + size]) for at in range(0, len(data), size)]
    assert found == index["chunk_checksums"]
    own = index.pop("index_checksum")
    canonical = json.dumps(index, sort_keys=True, separators=(",", ":"))
    assert own == xxhash.xxh3_64_hexdigest(canonical.encode())
    used = np.zeros(len(data), dtype=bool)
    for name, tensor in hostile().items():
        entry = index["tensors"][name]
        assert entry["offset"] % 256 == 0
        begin, end = entry["offset"], entry["offset"] + entry["num_bytes"]
        assert data[begin:end] == bits(tensor), name
        assert entry["shape"] == list(tensor.shape)
        used[begin:end] = True
    assert not np.frombuffer(data, dtype=np.uint8)[~used].any()


def test_sl02_empty_set_is_a_file_of_no_bytes(tmp_path):
    assert write_partition(tmp_path, {}).num_bytes == 0
    assert load_checkpoint(tmp_path) == {}


def test_sl05_hostile_tensors_are_bit_equal_and_ties_stay(checkpoint_dir):
    with open_checkpoint(checkpoint_dir) as checkpoint:
        loaded = checkpoint.load().tensors
        assert_same(loaded, hostile())
        assert checkpoint.index.tensors["plain"] == checkpoint.index.tensors["tied"]
        assert loaded["plain"].data_ptr() == loaded["tied"].data_ptr()
        assert checkpoint.index.tensors["half.view"].offset != checkpoint.index.tensors["half"].offset
        checkpoint.verify()


@pytest.mark.parametrize("direct_io_mode", ["auto", "always", "never"])
@pytest.mark.parametrize("verify", [True, False])
def test_sl05_filling_tensors_of_any_stride(checkpoint_dir, direct_io_mode, verify):
    expected = hostile()
    into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    into["plain"] = torch.zeros(37, 1000).t()
    into["big"] = torch.zeros(2 * 200_003, dtype=torch.float64)[::2]
    options = LoadOptions(direct_io=direct_io_mode, verify=verify, io_threads=3)
    with open_checkpoint(checkpoint_dir) as checkpoint:
        result = checkpoint.load(into=into, options=options)
    assert all(result.tensors[name] is tensor for name, tensor in into.items())
    assert_same(into, expected)
    assert result.report.source == "disk"
    assert result.report.bytes_read["disk"] == result.report.num_bytes


def test_sl05_tied_names_that_are_filled_alone_or_together(checkpoint_dir):
    shared = torch.zeros(1000, 37)
    with open_checkpoint(checkpoint_dir) as checkpoint:
        checkpoint.load(into={"plain": shared, "tied": shared}, strict=False)
        assert bits(shared) == bits(hostile()["plain"])
        alone = torch.zeros(1000, 37)
        checkpoint.load(into={"tied": alone}, strict=False)
        assert bits(alone) == bits(hostile()["plain"])


def test_sl04_safetensors_directories_equal_load_file(tmp_path):
    tensors = {name: tensor.contiguous().clone() for name, tensor in hostile().items()}
    tensors["conjugate"] = tensors["conjugate"].resolve_conj()
    names = list(tensors)
    parts = [names[:4], names[4:9], names[9:]]
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number}.safetensors"
        save_file({key: tensors[key] for key in part}, tmp_path / name)
        weight_map.update(dict.fromkeys(part, name))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"stale": torch.zeros(3)}, tmp_path / "leftover.safetensors")
    expected = {}
    for number in range(len(parts)):
        expected.update(load_file(tmp_path / f"model-{number}.safetensors"))
    for chunk_bytes in (4096, 64 << 10, 16 << 20):
        options = LoadOptions(chunk_bytes=chunk_bytes, staging_chunks=2)
        with open_checkpoint(tmp_path) as checkpoint:
            assert_same(checkpoint.load(options=options).tensors, expected)
            streamed = {name: tensor.clone() for name, tensor in checkpoint.tensors(options=options)}
            into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            checkpoint.load(into=into, options=options)
        assert_same(streamed, expected)
        assert_same(into, expected)


def test_sl04_streaming_keeps_file_order(checkpoint_dir):
    with open_checkpoint(checkpoint_dir) as checkpoint:
        names = [name for name, tensor in checkpoint.tensors() if tensor.numel()]
        offsets = [checkpoint.index.tensors[name].offset for name in names]
        assert offsets == sorted(offsets)
        expected = hostile()
        for name, tensor in checkpoint.tensors(options=LoadOptions(staging_chunks=1, io_threads=8)):
            assert bits(tensor) == bits(expected[name])


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_sl06_refused_direct_io_gives_the_same_bytes_and_one_warning(checkpoint_dir, monkeypatch, call):
    direct_io._warned_devices.clear()
    direct, real_open, real_preadv = set(), os.open, os.preadv

    def refusing_open(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT and call == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = real_open(path, flags, *args, **kwargs)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def refusing_preadv(fd, buffers, offset, flags=0):
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "preadv", refusing_preadv)
    with warnings.catch_warnings(record=True) as caught, open_checkpoint(checkpoint_dir) as checkpoint:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_same(checkpoint.load(options=LoadOptions(direct_io="always")).tensors, hostile())
    assert [warning.category for warning in caught].count(RuntimeWarning) == 1


def test_sl07_first_error_wins_and_leaves_no_thread_or_descriptor(checkpoint_dir, monkeypatch):
    real_preadv = os.preadv

    def broken(fd, buffers, offset, flags=0):
        if offset >= 5 * (64 << 10):
            raise OSError(errno.EIO, "Input/output error")
        return real_preadv(fd, buffers, offset, flags)

    before, threads = descriptors(), threading.active_count()
    monkeypatch.setattr(os, "preadv", broken)
    with open_checkpoint(checkpoint_dir) as checkpoint:
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.load(options=LoadOptions(io_threads=4))
        with pytest.raises(OSError, match="Input/output error"):
            list(checkpoint.tensors())
        stream = checkpoint.tensors()
        next(stream)
        stream.close()
    assert threading.active_count() == threads
    assert descriptors() == before


def test_sl07_host_memory_of_a_stream_is_bounded(tmp_path):
    """Staging, not the whole checkpoint: resident anonymous memory is measured around a stream."""
    write_partition(
        tmp_path, {f"t{n}": torch.zeros(4 << 20, dtype=torch.uint8) for n in range(64)}, chunk_bytes=1 << 20
    )

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10

    with open_checkpoint(tmp_path) as checkpoint:
        stream = checkpoint.tensors(options=LoadOptions(staging_chunks=4))
        next(stream)
        start = anonymous()
        peak = max(anonymous() for _ in stream)
    assert peak - start < 40 << 20


def test_sl02_into_is_checked_before_anything_is_written(checkpoint_dir):
    expected = hostile()
    with open_checkpoint(checkpoint_dir) as checkpoint:
        into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        into["half"] = torch.zeros(64, 64, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"1 tensors are of another shape or dtype: half \(float16"):
            checkpoint.load(into=into)
        into["half"] = torch.zeros(64, 64, dtype=torch.bfloat16)
        into["more"] = torch.zeros(3)
        with pytest.raises(ValueError, match="1 tensors are not in the checkpoint: more"):
            checkpoint.load(into=into)
        del into["more"], into["big"]
        with pytest.raises(ValueError, match="1 tensors are in the checkpoint alone: big"):
            checkpoint.load(into=into)
        assert not any(
            tensor.to(torch.float32).abs().sum() for name, tensor in into.items() if name != "conjugate"
        )


def test_sl02_two_ranks_and_their_key(tmp_path):
    key = CheckpointKey(layout="vllm", dtype="bfloat16", tensor_parallel_size=2)
    for rank in range(2):
        write_partition(tmp_path, {"w": torch.full((3,), rank)}, rank=rank, world_size=2, key=key)
    assert [load_checkpoint(tmp_path, rank=rank)["w"].tolist() for rank in range(2)] == [[0] * 3, [1] * 3]
    with pytest.raises(ValueError, match="dtype is 'bfloat16', expected 'float32'"):
        open_checkpoint(tmp_path, expect=CheckpointKey(layout="", dtype="float32", tensor_parallel_size=2))


def test_sl01_original_layouts_serve_any_number_of_ranks(tmp_path):
    tensors = {"w": torch.arange(10)}
    write_partition(tmp_path / "full", tensors)
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    expect = CheckpointKey(layout="", dtype="bfloat16", tensor_parallel_size=2)
    for name in ("full", "plain"):
        for rank in range(2):
            with open_checkpoint(tmp_path / name, rank=rank, world_size=2, expect=expect) as checkpoint:
                assert_same(checkpoint.load().tensors, tensors)

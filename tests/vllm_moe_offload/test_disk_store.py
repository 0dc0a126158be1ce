"""Experts in a file: exact round trip, refusal of what is wrong, host memory as a cache of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_memory import SimulatedClock, SimulatedCopyEngine
from vllm_moe_offload import DiskExpertStore, ExpertCache, HostExpertStore, TieredExpertStore, moved_bytes

LAYERS, EXPERTS = 3, 5


def layers():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "w": torch.randn(EXPERTS, 40, 30, generator=generator).bfloat16(),
            "scale": torch.rand(EXPERTS, 3, generator=generator),
        }
        for _ in range(LAYERS)
    ]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experts.bin"
    DiskExpertStore.create(path, iter(layers()), model_id="tiny A").close()
    return path


def record_of(store, layer, expert):
    out = torch.empty(store.layout.nbytes, dtype=torch.uint8)
    store.read(layer, expert, out)
    return out


def test_mo15_round_trip_is_exact_and_counted(file):
    reference = HostExpertStore(layers(), pin_memory=False)
    with pytest.raises(IndexError, match="layer 3, expert 0"):
        DiskExpertStore.open(file, model_id="tiny A").read(3, 0, torch.empty(0))
    store = DiskExpertStore.open(file, model_id="tiny A")
    assert store.layout == reference.layout
    assert (store.num_layers, store.num_experts) == (LAYERS, EXPERTS)
    moved_bytes()
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            found = store.layout.views(record_of(store, layer, expert))
            for name, view in reference.layout.views(reference.record(layer, expert)).items():
                assert torch.equal(found[name].flatten().view(torch.uint8), view.flatten().view(torch.uint8))
    assert moved_bytes()["disk->dram"] == LAYERS * EXPERTS * store.layout.expert_nbytes


def test_mo15_another_models_file_is_refused(file):
    with pytest.raises(ValueError, match="was written for model 'tiny A', not 'tiny B'"):
        DiskExpertStore.open(file, model_id="tiny B")


@pytest.mark.parametrize("cut", [1, 8, 5000, 50_000])
def test_mo15_a_short_file_is_refused(file, cut):
    whole = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(whole - cut)
    with pytest.raises(OSError, match=f"is truncated: expected {whole} bytes, found {whole - cut}$"):
        DiskExpertStore.open(file, model_id="tiny A")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, LAYERS * EXPERTS - 1), st.integers(0, 2407), st.integers(1, 255))
def test_mo15_a_flipped_byte_is_found(tmp_path_factory, key, offset, change):
    path = tmp_path_factory.mktemp("flip") / "experts.bin"
    store = DiskExpertStore.create(path, layers(), model_id="m")
    start = path.stat().st_size - LAYERS * EXPERTS * (store.layout.nbytes + 8)
    with path.open("r+b") as handle:
        handle.seek(start + key * store.layout.nbytes + offset)
        byte = handle.read(1)[0]
        handle.seek(-1, 1)
        handle.write(bytes([byte ^ change]))
    layer, expert = divmod(key, EXPERTS)
    with pytest.raises(OSError, match=f"checksum mismatch in layer {layer}, expert {expert}$"):
        record_of(store, layer, expert)


@pytest.mark.parametrize("content", [b"", b"no file of experts at all", b"000000000004096\n{}"])
def test_mo15_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no file of experts"):
        DiskExpertStore.open(path, model_id="m")


def test_mo15_a_failed_write_leaves_the_old_file(file):
    before = file.read_bytes()
    broken = [*layers(), {"w": torch.zeros(EXPERTS, 2)}]
    with pytest.raises(ValueError, match="layer 3 differs from layer 0"):
        DiskExpertStore.create(file, broken, model_id="tiny A")
    with pytest.raises(ValueError, match="no layer given"):
        DiskExpertStore.create(file, [], model_id="tiny A")
    assert file.read_bytes() == before


def test_mo15_host_memory_keeps_the_recently_used(file):
    disk = DiskExpertStore.open(file, model_id="tiny A")
    store = TieredExpertStore(disk, 3 * disk.layout.nbytes + 5)
    for expert in (0, 1, 2, 0, 3, 0, 1):  # 3 takes the place of 1
        assert torch.equal(store.record(0, expert), record_of(disk, 0, expert))
    assert store.bytes_from_disk == 5 * disk.layout.expert_nbytes
    with pytest.raises(ValueError, match="holds no expert"):
        TieredExpertStore(disk, disk.layout.nbytes - 1)


def test_mo15_a_record_stays_until_its_copy_is_done(file):
    """Slow copies, host memory for one record only: each read must wait for the copy of the one before."""
    disk = DiskExpertStore.open(file, model_id="tiny A")
    link = SimulatedCopyEngine(SimulatedClock(), bytes_per_s=1.0)
    cache = ExpertCache(TieredExpertStore(disk, disk.layout.nbytes), 4, copy_engine=link, contiguous=False)
    slots = cache.ensure(1, [4, 0, 2, 3]).tolist()
    for expert, slot in zip([4, 0, 2, 3], slots, strict=True):
        for name, view in disk.layout.views(record_of(disk, 1, expert)).items():
            assert torch.equal(cache.views[name][slot], view), expert


def test_mo15_a_fault_of_the_disk_reaches_the_caller_and_changes_nothing(file, monkeypatch):
    disk = DiskExpertStore.open(file, model_id="tiny A")
    cache = ExpertCache(TieredExpertStore(disk, 2 * disk.layout.nbytes), 3)
    cache.ensure(0, [1])
    cache.release(0)
    with monkeypatch.context() as patch:

        def fails(*_):
            raise OSError(5, "Input/output error")

        patch.setattr(disk._reader, "read_into", fails)
        with pytest.raises(OSError, match="Input/output error"):
            cache.ensure(0, [1, 2])
    assert cache.resident(0) == {1}
    cache.ensure(0, [1, 2, 3])
    np.testing.assert_array_equal(sorted(cache.resident(0)), [1, 2, 3])

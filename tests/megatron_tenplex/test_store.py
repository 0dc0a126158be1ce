from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from tenplex_oracles import random_pair, same_bits, tensor_of, values_of

from megatron_tenplex import (
    Box,
    ParallelTensorCollection,
    ReplicaCorruptError,
    Shard,
    TensorSpec,
    TensorStore,
    UncoveredRangeError,
    restore,
)

SPEC = {"w": TensorSpec((6, 4), torch.float32), "m": TensorSpec((2_000_000,), torch.float32)}
FIRST = Shard("w", Box((0, 0), (4, 4)))
SECOND = Shard("w", Box((4, 0), (2, 4)))
FLAT = Shard("w", Box((0, 0), (6, 4)), (3, 17))
LARGE = Shard("m", Box((0,), (2_000_000,)))
WHOLE = {"w": torch.arange(24.0).view(6, 4), "m": torch.arange(2_000_000, dtype=torch.float32)}


def write(root, host, version, ranks, **more):
    store = TensorStore(root, host=host)
    for rank, shards in ranks.items():
        state = {s: tensor_of(s, WHOLE[s.key]) for s in shards}
        store.put(version, rank, 2, SPEC, state, more or None)
    return store


def flip(root, host, version, rank, position):
    path = root / host / f"{version:012d}" / f"{rank:06d}" / "data.bin"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_tx13_what_was_put_is_read_whole_and_in_part(tmp_path):
    store = write(tmp_path, "a", 7, {0: [FIRST, FLAT, LARGE]}, lr=0.1)
    assert store.versions() == [7]
    for shard in (FIRST, FLAT, LARGE):
        assert torch.equal(store.read(7, 0, shard), tensor_of(shard, WHOLE[shard.key]))
    assert torch.equal(store.read(7, 0, FIRST, Box((1, 1), (2, 3))), WHOLE["w"][1:3, 1:4])
    assert store.manifest(7, 0)["common"] == {"lr": 0.1}
    with pytest.raises(LookupError, match="no replica of rank 1"):
        store.read(7, 1, FIRST)


def test_tx13_any_flipped_byte_is_found_and_another_copy_used(tmp_path):
    stores = [write(tmp_path, host, 3, {0: [LARGE], 1: [FIRST, SECOND]}) for host in ("a", "b")]
    size = (tmp_path / "a" / f"{3:012d}" / f"{0:06d}" / "data.bin").stat().st_size
    rng = np.random.default_rng(0)
    for position in [0, size - 1, *map(int, rng.integers(0, size, 4))]:
        flip(tmp_path, "a", 3, 0, position)
        with pytest.raises(
            ReplicaCorruptError, match=r"replica of m \(host a, rank 0, version 3\) is corrupt: block"
        ):
            stores[0].read(3, 0, LARGE)
        target = {LARGE: torch.zeros(2_000_000), FLAT: torch.zeros(14)}
        assert restore(stores, target) == 3
        assert torch.equal(target[LARGE], WHOLE["m"])
        assert torch.equal(target[FLAT], WHOLE["w"].flatten()[3:17])
        flip(tmp_path, "a", 3, 0, position)


def test_tx13_a_corrupt_manifest_is_found(tmp_path):
    store = write(tmp_path, "a", 1, {0: [FIRST]})
    path = tmp_path / "a" / f"{1:012d}" / f"{0:06d}" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"rank": 0', b'"rank": 1'))
    with pytest.raises(ReplicaCorruptError, match="replica of manifest"):
        TensorStore(tmp_path, host="a").manifest(1, 0)
    assert store.versions() == [1]


def test_tx13_no_intact_copy_is_an_error_whose_cause_names_the_corruption(tmp_path):
    store = write(tmp_path, "a", 1, {0: [LARGE], 1: [FIRST]})
    flip(tmp_path, "a", 1, 0, 12345)
    before = torch.full((2_000_000,), 7.0)
    with pytest.raises(UncoveredRangeError, match=r"no holder for m.*lost ranks: \[0\]") as caught:
        restore([store], {LARGE: before})
    assert isinstance(caught.value.__cause__, ReplicaCorruptError)
    assert (before == 7).all()


def test_tx14_the_newest_version_that_is_complete_is_used(tmp_path):
    store = write(tmp_path, "a", 1, {0: [FIRST], 1: [SECOND]})
    write(tmp_path, "a", 2, {0: [FIRST]})
    both = Shard("w", Box((0, 0), (6, 4)))
    target = {both: torch.zeros(6, 4)}
    assert restore([store], target) == 1
    assert torch.equal(target[both], WHOLE["w"])
    with pytest.raises(UncoveredRangeError, match="lost ranks"):
        restore([store], target, version=2)
    with pytest.raises(LookupError, match="no replicas"):
        restore([TensorStore(tmp_path, host="nobody")], target)


def test_tx14_any_layout_is_restored_into_any_other(tmp_path):
    for seed in range(40):
        source, target = random_pair(seed)
        whole = values_of(source.tensors)
        store = TensorStore(tmp_path / str(seed), host="a")
        for rank, shards in enumerate(source.shards):
            store.put(
                0, rank, source.world_size, source.tensors, {s: tensor_of(s, whole[s.key]) for s in shards}
            )
        for shards in target.shards:
            got = {s: torch.zeros_like(tensor_of(s, whole[s.key])) for s in shards}
            if got:
                restore([store], got)
            for shard, tensor in got.items():
                wanted = tensor_of(shard, whole[shard.key])
                assert same_bits(tensor, wanted)


def test_tx13_a_crash_while_writing_leaves_the_version_before(tmp_path):
    store = write(tmp_path, "a", 1, {0: [FIRST, SECOND]})
    pid = os.fork()
    if not pid:
        state = {FIRST: tensor_of(FIRST, WHOLE["w"]), LARGE: _Dies()}
        try:
            TensorStore(tmp_path, host="a").put(2, 0, 1, SPEC, state)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert store.versions() == [1]
    assert restore([store], {FIRST: torch.zeros(4, 4)}) == 1


class _Dies:
    """A tensor whose process is killed when it is read."""

    def detach(self):
        os.kill(os.getpid(), 9)


def test_tx13_prune_keeps_the_newest_versions(tmp_path):
    for version in (1, 2, 3):
        store = write(tmp_path, "a", version, {0: [FIRST]})
    store.prune(2)
    assert store.versions() == [2, 3]


def test_tx13_bad_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="host must be a plain name"):
        TensorStore(tmp_path, host="../a")


def test_manifests_are_json_that_describes_the_shards(tmp_path):
    write(tmp_path, "a", 1, {0: [FIRST, FLAT]})
    text = (tmp_path / "a" / f"{1:012d}" / f"{0:06d}" / "manifest.json").read_text().partition("\n")[2]
    again = ParallelTensorCollection.from_json(json.loads(text)["tensors"])
    assert again.shards == ((FIRST, FLAT),)


def test_tx25_shards_are_files_of_fsspec(tmp_path):
    from megatron_tenplex.filesystem import TenplexFileSystem

    write(tmp_path, "a", 5, {0: [FIRST, LARGE]})
    files = TenplexFileSystem(root=str(tmp_path))
    assert files.ls("tenplex://", detail=False) == ["a"]
    assert files.ls("a/5/0", detail=False) == ["a/5/0/manifest.json", "a/5/0/0.bin", "a/5/0/1.bin"]
    assert files.info("tenplex://a/5/0/1.bin")["size"] == 8_000_000
    whole = WHOLE["m"].numpy().tobytes()
    assert files.cat_file("tenplex://a/5/0/1.bin", 1_000_000, 3_000_003) == whole[1_000_000:3_000_003]
    assert files.cat_file("a/5/0/1.bin", -10) == whole[-10:]
    with files.open("a/5/0/0.bin") as file:
        assert file.read() == WHOLE["w"][:4].numpy().tobytes()
    flip(tmp_path, "a", 5, 0, 3_500_000)
    assert files.cat_file("a/5/0/1.bin", 0, 8) == whole[:8]
    with pytest.raises(ReplicaCorruptError):
        files.cat_file("a/5/0/1.bin", 3_499_000, 3_501_000)
    for missing in ("b/5/0/0.bin", "a/6/0/0.bin", "a/5/0/9.bin", "a/5/0/x.bin"):
        with pytest.raises(FileNotFoundError):
            files.cat_file(missing)
    with pytest.raises(ValueError, match="read-only"):
        files.open("a/5/0/0.bin", "wb")

"""What a partition's index says, and the checks that make it safe to believe (format version 1)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VERSION = 1
TENSOR_ALIGN = 256
FILE_ALIGN = 4096
CHECKSUM = "xxh3_64"
DEFAULT_CHUNK_BYTES = 16 << 20
MAX_CHUNK_BYTES = 1 << 30  # a reader holds several chunks in memory
_DTYPE_NAMES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "float4_e2m1fn_x2",
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class CorruptCheckpointError(ValueError):
    """Stored bytes are not what was written; the store fetches such a file anew from the remote tier."""


@dataclass(frozen=True)
class CheckpointKey:
    """What a checkpoint was made of. ``""`` is "not stated" and never compared.

    Attributes:
        layout: ``"full"``: names and shapes of the original checkpoint; ``"vllm"``: the parameters of one
            vLLM rank before post-processing.
        model: digest of the model's configuration (:func:`config_digest`).
        dtype: torch's name of the model's dtype.
        quantization: vLLM's name of the method.
        tensor_parallel_size: ranks of a ``"vllm"`` layout.
        pipeline_parallel_size: stages of a ``"vllm"`` layout.
    """

    layout: str = "full"
    model: str = ""
    dtype: str = ""
    quantization: str = ""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def check(self, expected: CheckpointKey, path: Path) -> None:
        """Compare with what the caller expects, field by field.

        Raises:
            ValueError: a field that both state differs.
        """
        for item in dataclasses.fields(self):
            if item.name.endswith("_parallel_size") and self.layout != "vllm":
                continue  # the original layout serves any number of ranks
            stored, wanted = getattr(self, item.name), getattr(expected, item.name)
            if stored != wanted and "" not in (stored, wanted):
                raise ValueError(f"{path}: {item.name} is {stored!r}, expected {wanted!r}")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``num_bytes`` bytes at byte ``offset``, C-contiguous, little endian."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """First byte after the tensor."""
        return self.offset + self.num_bytes


@dataclass(frozen=True)
class PartitionIndex:
    """The index of one rank's data file.

    Attributes:
        rank, world_size: which partition of how many.
        num_bytes: length of the data file.
        chunk_bytes: bytes covered by one checksum (the last chunk may be shorter).
        chunk_checksums: xxh3_64 of each chunk, 16 hex digits; empty where the format has none (safetensors).
        key: what the checkpoint was made of.
        tensors: name -> entry, in file order. Names with equal entries are one tied tensor.
    """

    rank: int
    world_size: int
    num_bytes: int
    chunk_bytes: int
    chunk_checksums: tuple[str, ...]
    key: CheckpointKey
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def num_chunks(self) -> int:
        """Chunks that ``num_bytes`` make."""
        return -(-self.num_bytes // self.chunk_bytes)

    def to_json(self) -> str:
        """The index file's text. Its own checksum is part of it."""
        content: dict[str, Any] = {
            "version": VERSION,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_bytes": self.num_bytes,
            "chunk_bytes": self.chunk_bytes,
            "checksum": CHECKSUM,
            "chunk_checksums": list(self.chunk_checksums),
            "key": dataclasses.asdict(self.key),
            "tensors": {
                name: {
                    "dtype": DTYPE_NAMES[entry.dtype],
                    "shape": list(entry.shape),
                    "offset": entry.offset,
                    "num_bytes": entry.num_bytes,
                }
                for name, entry in self.tensors.items()
            },
        }
        content["index_checksum"] = _digest(content)
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> PartitionIndex:
        """Read and check an index file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of a newer version.
            CorruptCheckpointError: it is not an index, was damaged, or contradicts itself.
        """
        try:
            content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            version = _integer(content, "version", 1)
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpointError(f"{path}: not a partition index: {error}") from error
        if version > VERSION:
            raise ValueError(
                f"{path}: format version {version} is not supported (this release reads {VERSION})"
            )
        try:
            if content.pop("index_checksum", None) != _digest(content):
                raise ValueError("its own checksum differs")
            return _parse(content)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptCheckpointError(f"{path}: not a partition index: {error}") from error


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a model's config.json without the fields that differ between copies of one model."""
    kept = {
        name: value for name, value in config.items() if name not in ("transformers_version", "_name_or_path")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def partition_name(rank: int, world_size: int) -> str:
    """File name of a partition without its suffix."""
    return f"partition-{rank:05d}-of-{world_size:05d}"


def check_entries(tensors: Mapping[str, TensorEntry], num_bytes: int) -> None:
    """Check that entries lie inside the file and share bytes only if they are the same tensor.

    Raises:
        ValueError: the first entry that does not, by name.
    """
    last_name, last = "", None
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if math.prod(entry.shape) * entry.dtype.itemsize != entry.num_bytes:
            raise ValueError(
                f"tensor {name!r}: shape {list(entry.shape)} does not make {entry.num_bytes} bytes"
            )
        if entry.end > num_bytes:
            raise ValueError(f"tensor {name!r} ends at {entry.end}, outside of {num_bytes} bytes")
        if entry.num_bytes == 0:
            continue
        if last is not None and entry.offset < last.end and entry != last:
            raise ValueError(f"tensor {name!r} overlaps {last_name!r}")
        last_name, last = name, entry


def _parse(content: dict[str, Any]) -> PartitionIndex:
    if content["checksum"] != CHECKSUM:
        raise ValueError(f"unknown checksum {content['checksum']!r}")
    rank, world_size = _integer(content, "rank", 0), _integer(content, "world_size", 1)
    num_bytes, chunk_bytes = _integer(content, "num_bytes", 0), _integer(content, "chunk_bytes", FILE_ALIGN)
    if chunk_bytes % FILE_ALIGN or chunk_bytes > MAX_CHUNK_BYTES:
        raise ValueError(f"chunk_bytes {chunk_bytes} is no multiple of {FILE_ALIGN} up to {MAX_CHUNK_BYTES}")
    if rank >= world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    checksums = tuple(content["chunk_checksums"])
    if len(checksums) != -(-num_bytes // chunk_bytes) or not all(map(_is_checksum, checksums)):
        raise ValueError(f"{num_bytes} bytes in chunks of {chunk_bytes} have not {len(checksums)} checksums")
    key = CheckpointKey(**content["key"])
    for item in dataclasses.fields(key):
        if type(getattr(key, item.name)) is not type(item.default):
            raise ValueError(f"key.{item.name} is {getattr(key, item.name)!r}")
    tensors = {}
    for name, value in content["tensors"].items():
        shape = tuple(value["shape"])
        if value["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name!r}: unknown dtype {value['dtype']!r}")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"tensor {name!r}: bad shape {value['shape']!r}")
        tensors[name] = TensorEntry(
            DTYPES[value["dtype"]], shape, _integer(value, "offset", 0), _integer(value, "num_bytes", 0)
        )
        if tensors[name].offset % TENSOR_ALIGN:
            raise ValueError(
                f"tensor {name!r}: offset {tensors[name].offset} is no multiple of {TENSOR_ALIGN}"
            )
    check_entries(tensors, num_bytes)
    return PartitionIndex(rank, world_size, num_bytes, chunk_bytes, checksums, key, tensors)


def _integer(content: Mapping[str, Any], name: str, lowest: int) -> int:
    value = content.get(name)
    if type(value) is not int or value < lowest:
        raise ValueError(f"{name} must be a whole number of at least {lowest}, found {value!r}")
    return value


def _is_checksum(text: object) -> bool:
    return isinstance(text, str) and len(text) == 16 and set(text) <= set("0123456789abcdef")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _digest(content: Mapping[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

"""Headers of plain safetensors files, so that they load through the same reader as our own format."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_serverless_loader.checkpoint.index import CorruptCheckpointError, TensorEntry, check_entries

_HEADER_LIMIT = 100_000_000
_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_DTYPES = {name: getattr(torch, torch_name) for name, torch_name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class SafetensorsFile:
    """One file: its length and its tensors, offsets counted from the file's first byte, in file order."""

    path: Path
    num_bytes: int
    tensors: Mapping[str, TensorEntry]


def read_directory(folder: Path) -> list[SafetensorsFile]:
    """The files that hold a model's weights: those that its index names, else all ``*.safetensors``.

    Raises:
        FileNotFoundError: there is none, or the index names one that is missing.
        CorruptCheckpointError: a header or the index is damaged, or they contradict each other.
    """
    index_path = folder / "model.safetensors.index.json"
    weight_map = _weight_map(index_path) if index_path.exists() else None
    if weight_map is not None:
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{index_path} names {path.name}, which is missing")
    else:
        paths = sorted(folder.glob("*.safetensors"))
        # Mistral's repositories hold the same weights twice.
        paths = [path for path in paths if not path.name.startswith("consolidated")] or paths
    files = [read_header(path) for path in paths]
    owner: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in owner:
                raise CorruptCheckpointError(f"{file.path}: tensor {name!r} is also in {owner[name].name}")
            owner[name] = file.path
    for name, file_name in (weight_map or {}).items():
        if owner.get(name) != folder / file_name:
            raise CorruptCheckpointError(f"{index_path}: tensor {name!r} is not in {file_name}")
    return files


def read_header(path: Path) -> SafetensorsFile:
    """Read one file's header.

    Raises:
        CorruptCheckpointError: it is not a safetensors file, or not all of it is there.
    """
    num_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_LIMIT, num_bytes - 8):
                raise ValueError(f"a header of {length} bytes in a file of {num_bytes}")
            header = json.loads(file.read(length))
        entries = {
            name: _entry(value, 8 + length) for name, value in header.items() if name != "__metadata__"
        }
        end = max((entry.end for entry in entries.values()), default=8 + length)
        if end == num_bytes:
            check_entries(entries, num_bytes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise CorruptCheckpointError(f"{path}: not a safetensors file: {error!r}") from error
    if end != num_bytes:
        raise CorruptCheckpointError(f"{path}: {num_bytes} bytes, expected {end}")
    return SafetensorsFile(path, num_bytes, dict(sorted(entries.items(), key=lambda item: item[1].offset)))


def _entry(value: Mapping[str, Any], base: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end - begin, *shape)):
        raise ValueError(f"bad tensor {dict(value)}")
    return TensorEntry(_DTYPES[value["dtype"]], shape, base + begin, end - begin)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names = list(weight_map.values())
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("weight_map must name files of the same directory")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: not an index of safetensors files: {error!r}") from error
    return dict(weight_map)

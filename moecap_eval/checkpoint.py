"""What the headers of safetensors files say about a model's weights."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LAYER_NAME = re.compile(r"^model\.layers\.(\d+)\.")
_COMPONENT_RULES = (
    (re.compile(r"^model\.embed_tokens\."), "embedding"),
    (re.compile(r"^lm_head\."), "lm_head"),
    (re.compile(r"norm\.[^.]+$"), "norm"),
    (re.compile(r"\.self_attn\."), "attention"),
    (re.compile(r"\.(mlp|block_sparse_moe)\.experts\."), "routed_experts"),
    (re.compile(r"\.(gate|router|shared_expert_gate)\.[^.]+$"), "router"),
    (re.compile(r"\.shared_experts?\."), "shared_experts"),
    (re.compile(r"\.mlp\."), "dense_ffn"),
)
GroupKey = tuple[int | None, str]  # layer, component
Group = dict[str, tuple[str, int, int]]  # tensor name -> safetensors dtype, elements, bytes
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError(f"header length {length} exceeds the file")
            header: dict[str, Any] = json.loads(file.read(length))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return header


def read_groups(folder: Path, num_layers: int) -> dict[GroupKey, Group]:
    """Tensors of a checkpoint folder by layer (None outside the layers) and component.

    Layers from ``num_layers`` on hold multi-token prediction: no plain forward pass reads them, so they
    are left out.

    Raises:
        FileNotFoundError: no safetensors file in ``folder``.
        ValueError: an unreadable header, or tensors of no known component.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    groups: dict[GroupKey, Group] = {}
    unexplained = []
    for path in files:
        for name, entry in _read_header(path).items():
            layer_match = _LAYER_NAME.match(name)
            layer = int(layer_match.group(1)) if layer_match else None
            if layer is not None and layer >= num_layers:
                continue
            component = next((key for pattern, key in _COMPONENT_RULES if pattern.search(name)), None)
            if component is None:
                unexplained.append(name)
                continue
            begin, end = entry["data_offsets"]
            group = groups.setdefault((layer, component), {})
            group[name] = (entry["dtype"], math.prod(entry["shape"]), end - begin)
    if unexplained:
        raise ValueError(
            f"{folder}: {len(unexplained)} tensors the configuration does not explain: {_few(unexplained)}"
        )
    return groups


def _few(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


def check_groups(wanted: Mapping[GroupKey, int], groups: Mapping[GroupKey, Group]) -> None:
    """Refuse a checkpoint whose tensors are not those of the configuration (``wanted``: elements)."""
    missing = sorted(str(key) for key in wanted.keys() - groups.keys())
    if missing:
        raise ValueError(f"checkpoint lacks tensors for (layer, component): {_few(missing)}")
    for key, group in groups.items():
        elements = sum(count for _, count, _ in group.values())
        plain = all(dtype in _FLOATS for dtype, _, _ in group.values())
        if key not in wanted:
            raise ValueError(f"tensors the configuration does not explain: {_few(list(group))}")
        if plain and elements != wanted[key]:
            raise ValueError(
                f"{_few(list(group))}: {elements:,} elements in the checkpoint, "
                f"{wanted[key]:,} by the configuration"
            )

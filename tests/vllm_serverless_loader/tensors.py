"""Tensor sets that are hard to store, and comparison bit by bit."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor


def hostile() -> dict[str, Tensor]:
    """Views, slices, transposes, tied, scalar, empty, odd sizes and every dtype family."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1000, 37, generator=generator)
    half = torch.randn(64, 64, generator=generator).bfloat16()
    return {
        "plain": base,
        "transposed": base.t(),
        "tied": base,
        "slice": base[3:7, ::2],
        "column": base[:, 5],
        "expanded": base[0].expand(3, 37),
        "half": half,
        "half.view": half[8:16],
        "conjugate": torch.complex(base[:2], base[2:4]).conj(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "float8": torch.randn(33, generator=generator).to(torch.float8_e4m3fn),
        "bool": torch.rand(7, generator=generator) > 0.5,
        "odd": torch.randint(0, 255, (4097,), dtype=torch.uint8, generator=generator),
        "big": torch.randn(200_003, generator=generator, dtype=torch.float64),
    }


def bits(tensor: Tensor) -> bytes:
    """The tensor's values as bytes, in order of its indices."""
    flat = tensor.detach().resolve_conj().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        assert bits(found[name]) == bits(tensor), name


def descriptors() -> set[str]:
    """Open descriptors of this process."""
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}

"""Uniform numbers with 53 random bits, from torch, NumPy, or a counter."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from rl_replay_gear import loops

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64 (Steele et al. 2014)


def mix_key(*parts: int) -> int:
    """A 64-bit key from integers, by chained SplitMix64 finalisers."""
    key = 0
    for part in parts:
        key = ((key ^ (part & _MASK)) + _GOLDEN) & _MASK
        key = ((key ^ (key >> 30)) * _FIRST) & _MASK
        key = ((key ^ (key >> 27)) * _SECOND) & _MASK
        key ^= key >> 31
    return key


class CounterGenerator:
    """The uniform numbers of a key: SplitMix64 of key + counter, so any stream starts anywhere at no cost.

    torch's CPU generator keeps 32 bits of its seed, too few to name every batch of a long run apart.
    """

    def __init__(self, *parts: int) -> None:
        self._key = mix_key(*parts)
        self._used = 0

    def random(self, count: int) -> np.ndarray:
        """The next ``count`` float64 in [0, 1)."""
        out = np.empty(count, np.float64)
        loops.counter_uniforms(np.uint64(self._key), self._used + 1, out)
        self._used += count
        return out


class HasRandom(Protocol):
    """Anything with NumPy's ``random(count)``."""

    def random(self, count: int, /) -> np.ndarray:
        """``count`` float64 in [0, 1)."""


Generator = torch.Generator | np.random.Generator | CounterGenerator | HasRandom


def uniforms(generator: Generator | None, count: int) -> np.ndarray:
    """``count`` float64 in [0, 1); None is torch's default generator."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(count, dtype=torch.float64, generator=generator).numpy()
    return generator.random(count)

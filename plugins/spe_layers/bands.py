"""Frequency bands: the only description of an encoding. Layers, kernels, NTK and integrations all take it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Layout = Literal["nerf", "nerfstudio", "tcnn"]


@dataclass(frozen=True)
class Bands:
    """Which sines and cosines of the coordinates an encoding has.

    The phase of band l and coordinate d is ``scale * multipliers[l] * x_d`` in radians. With D coordinates
    and L bands the encoding has ``F = D * (2 L + include_input)`` features.

    Args:
        multipliers: one positive, finite factor a band. Powers of two keep phases exact.
        scale: radians per coordinate unit at multiplier 1: 1 (code of NeRF), pi (its paper, tiny-cuda-nn),
            2 pi (nerfstudio).
        amplitudes: one factor a band, on its sine and its cosine; None means ones.
        include_input: whether the coordinates themselves are features.
        layout: order of the features, for D coordinates:
            ``nerf`` [x | sin band 0 (all d) | cos band 0 | sin band 1 | ...];
            ``nerfstudio`` [sin, coordinate by coordinate, its bands in a row | cos likewise | x];
            ``tcnn`` coordinate by coordinate, band by band: sin, cos; then x.

    Raises:
        ValueError: no feature at all, a multiplier, scale or amplitude that is not usable, unknown layout.
    """

    multipliers: tuple[float, ...]
    scale: float = 1.0
    amplitudes: tuple[float, ...] | None = None
    include_input: bool = True
    layout: Layout = "nerf"

    def __post_init__(self) -> None:
        # Lists (JSON, YAML) are welcome, but a frozen description must be hashable.
        object.__setattr__(self, "multipliers", tuple(float(m) for m in self.multipliers))
        if self.amplitudes is not None:
            object.__setattr__(self, "amplitudes", tuple(float(a) for a in self.amplitudes))
        if not self.multipliers and not self.include_input:
            raise ValueError("Bands without bands needs include_input=True")
        if not all(math.isfinite(m) and m > 0 for m in self.multipliers):
            raise ValueError(f"Bands.multipliers must be positive and finite, got {self.multipliers}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"Bands.scale must be positive and finite, got {self.scale}")
        if self.amplitudes is not None:
            if len(self.amplitudes) != len(self.multipliers):
                raise ValueError(
                    f"Bands.amplitudes needs one value a band: {len(self.multipliers)} bands, "
                    f"{len(self.amplitudes)} amplitudes"
                )
            if not all(math.isfinite(a) for a in self.amplitudes):
                raise ValueError(f"Bands.amplitudes must be finite, got {self.amplitudes}")
        if self.layout not in get_args(Layout):
            raise ValueError(
                f"Bands.layout must be one of {', '.join(get_args(Layout))}, got {self.layout!r}"
            )

    @classmethod
    def octaves(
        cls,
        num_bands: int,
        *,
        scale: float = 1.0,
        decay: float = 0.0,
        include_input: bool = True,
        layout: Layout = "nerf",
    ) -> Bands:
        """Multipliers 2^l for l = 0 ... num_bands - 1, amplitudes 2^(-decay * l); NeRF's at decay 0."""
        if num_bands < 0:
            raise ValueError(f"num_bands must not be negative, got {num_bands}")
        amplitudes = tuple(2.0 ** (-decay * band) for band in range(num_bands)) if decay else None
        return cls(tuple(2.0**band for band in range(num_bands)), scale, amplitudes, include_input, layout)

    @classmethod
    def spaced(
        cls,
        num_bands: int,
        min_exponent: float,
        max_exponent: float,
        *,
        scale: float = 2 * math.pi,
        include_input: bool = False,
        layout: Layout = "nerfstudio",
    ) -> Bands:
        """Multipliers 2^linspace(min_exponent, max_exponent, num_bands), as ``NeRFEncoding`` of nerfstudio.

        They are rounded to float32 as nerfstudio rounds them, so that a field trained there sees the same
        features here.
        """
        multipliers = 2 ** torch.linspace(min_exponent, max_exponent, num_bands, dtype=torch.float32)
        return cls(tuple(multipliers.tolist()), scale, None, include_input, layout)

    @classmethod
    def harmonics(cls, num_bands: int, *, power: float = 0.0) -> Bands:
        """Multipliers j = 1 ... num_bands at scale 2 pi, amplitudes j^-power of unit norm: the 1-D study."""
        amplitudes = [float(j) ** -power for j in range(1, num_bands + 1)]
        norm = math.sqrt(sum(a * a for a in amplitudes))
        return cls(
            multipliers=tuple(float(j) for j in range(1, num_bands + 1)),
            scale=2 * math.pi,
            amplitudes=tuple(a / norm for a in amplitudes),
            include_input=False,
            layout="nerfstudio",
        )

    @property
    def num_bands(self) -> int:
        """Number of bands L."""
        return len(self.multipliers)

    @property
    def num_groups(self) -> int:
        """Number of groups of D features, ``2 L + include_input``: the length of a frequency mask."""
        return 2 * self.num_bands + int(self.include_input)

    @property
    def max_frequency(self) -> float:
        """Highest frequency, in cycles per coordinate unit; 0 without bands."""
        return self.scale * max(self.multipliers, default=0.0) / (2 * math.pi)

    @property
    def dyadic(self) -> bool:
        """Whether every multiplier is a power of two, so that ``multiplier * x`` is exact."""
        return all(math.frexp(m)[0] == 0.5 for m in self.multipliers)

    def num_features(self, in_features: int) -> int:
        """Number of features F of ``in_features`` coordinates."""
        return in_features * self.num_groups

    def mean_square(self, in_features: int, input_mean_square: float = 1 / 3) -> float:
        """E ||e(x)||^2 where phases are spread evenly: D (sum of a_l^2 + E x^2 if the input is included).

        ``input_mean_square`` is E x_d^2, by default that of U(-1, 1).
        """
        energy = float(self.num_bands) if self.amplitudes is None else sum(a * a for a in self.amplitudes)
        return in_features * (energy + input_mean_square * self.include_input)

    def feature_order(self, in_features: int) -> Tensor:
        """Order [F] (int64) such that ``nerf_features[..., order]`` are the features of this layout."""
        dims, offset = in_features, in_features * int(self.include_input)
        grid = torch.arange(2 * self.num_bands * dims).reshape(self.num_bands, 2, dims) + offset
        inputs = torch.arange(offset)
        if self.layout == "nerfstudio":
            return torch.cat([grid.permute(1, 2, 0).flatten(), inputs])
        if self.layout == "tcnn":
            return torch.cat([grid.permute(2, 0, 1).flatten(), inputs])
        return torch.cat([inputs, grid.flatten()])

    def feature_scales(self, in_features: int) -> Tensor:
        """Amplitude of each feature [F] (float64) in ``nerf`` order."""
        amplitudes = torch.ones(self.num_bands, dtype=torch.float64)
        if self.amplitudes is not None:
            amplitudes = torch.tensor(self.amplitudes, dtype=torch.float64)
        bands = amplitudes.repeat_interleave(2 * in_features)
        return torch.cat([bands.new_ones(in_features * int(self.include_input)), bands])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Bands:
        """Bands from what ``to_dict`` returned.

        Raises:
            ValueError: a key that is not a field of Bands.
        """
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown keys for Bands: {unknown}; known: {sorted(cls.__dataclass_fields__)}")
        return cls(**values)


def as_bands(bands: int | Bands) -> Bands:
    """``Bands.octaves(bands)`` for an int, the argument itself otherwise.

    Raises:
        TypeError: something else.
    """
    if isinstance(bands, Bands):
        return bands
    if not isinstance(bands, int) or isinstance(bands, bool):
        raise TypeError(f"bands must be a Bands or a number of octaves, got {bands!r}")
    return Bands.octaves(bands) if torch.compiler.is_compiling() else _octaves(bands)


@lru_cache(maxsize=64)
def _octaves(num_bands: int) -> Bands:
    return Bands.octaves(num_bands)

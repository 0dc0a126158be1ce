"""Encodings from a configuration in the style of tiny-cuda-nn (its DOCUMENTATION.md, section Encodings)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spe_layers.bands import Bands
from spe_layers.encoding import PositionalEncoding
from spe_layers.layer import SPE


class Composite(nn.Module):
    """Several encodings, each of its own slice of the coordinates; outputs are concatenated."""

    def __init__(self, sizes: list[int], encodings: list[nn.Module]) -> None:
        super().__init__()
        self.sizes = sizes
        self.encodings = nn.ModuleList(encodings)

    def forward(self, x: Tensor) -> Tensor:
        """[..., sum of sizes] -> [..., sum of outputs]."""
        parts = x.split(self.sizes, dim=-1)
        return torch.cat([e(part) for e, part in zip(self.encodings, parts, strict=True)], dim=-1)


def from_tcnn_config(config: Mapping[str, Any], in_features: int) -> nn.Module:
    """The encoding that ``config`` describes, for this many coordinates.

    ``otype`` (any case) is one of
    ``Frequency`` {n_frequencies: 12}: sin and cos of 2^l pi x, order and formula of tiny-cuda-nn;
    ``SinusoidalPositional`` {n_frequencies: 10, n_output_dims: 256, scale: 1.0, init: "linear"}: SPE;
    ``Composite`` {nested: [...]}: each entry takes ``n_dims_to_encode`` coordinates, the last one the rest.

    Raises:
        ValueError: unknown otype or key, nested sizes that do not add up.
    """
    options = dict(config)
    otype = str(options.pop("otype", ""))
    builders: dict[str, Callable[[dict[str, Any], int], nn.Module]] = {
        "Frequency": _frequency,
        "SinusoidalPositional": _sinusoidal,
        "Composite": _composite,
    }
    names = {name.lower(): name for name in builders}
    if otype.lower() not in names:
        raise ValueError(f"unknown otype {otype!r}, known: {', '.join(builders)}")
    module = builders[names[otype.lower()]](options, in_features)
    if options:
        raise ValueError(_unknown_key(names[otype.lower()], next(iter(options))))
    return module


_KEYS = {
    "Frequency": ("n_frequencies",),
    "SinusoidalPositional": ("n_frequencies", "n_output_dims", "scale", "init"),
    "Composite": ("nested", "n_dims_to_encode"),
}


def _unknown_key(otype: str, key: str) -> str:
    close = difflib.get_close_matches(key, _KEYS[otype], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{otype} has no key {key!r}, known: {', '.join(_KEYS[otype])}{hint}"


def _frequency(options: dict[str, Any], in_features: int) -> nn.Module:
    count = int(options.pop("n_frequencies", 12))
    bands = Bands.octaves(count, scale=math.pi, include_input=False, layout="tcnn")
    return PositionalEncoding(in_features, bands)


def _sinusoidal(options: dict[str, Any], in_features: int) -> nn.Module:
    bands = Bands.octaves(int(options.pop("n_frequencies", 10)), scale=float(options.pop("scale", 1.0)))
    return SPE(in_features, int(options.pop("n_output_dims", 256)), bands, init=options.pop("init", "linear"))


def _composite(options: dict[str, Any], in_features: int) -> nn.Module:
    sizes, encodings, left = [], [], in_features
    nested = list(options.pop("nested", []))
    if not nested:
        raise ValueError("Composite needs at least one entry in 'nested'")
    for position, entry in enumerate(nested):
        rest = left if position == len(nested) - 1 else 0
        size = int(entry.get("n_dims_to_encode", rest))
        if not 0 < size <= left:
            raise ValueError(
                f"Composite: nested[{position}] takes {size} of the {left} coordinates that are left; "
                "give n_dims_to_encode"
            )
        sizes.append(size)
        inner = {key: value for key, value in entry.items() if key != "n_dims_to_encode"}
        encodings.append(from_tcnn_config(inner, size))
        left -= size
    if left:
        raise ValueError(f"Composite: {left} of {in_features} coordinates are not encoded")
    return Composite(sizes, encodings)

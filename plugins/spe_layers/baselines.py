"""First layers by name: SPE, what it claims to beat, and the controls that show where a gain comes from.

Each is a module [..., in_features] -> [..., out_features]. Its cost is the number of its parameters;
frozen tensors are buffers.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spe_layers.bands import Bands, as_bands
from spe_layers.encoding import PositionalEncoding
from spe_layers.layer import SPE

# Multipliers of the spatial hash, as in the paper's code.
_PRIMES = (1, 2_654_435_761, 805_459_861, 3_674_653_429, 2_097_192_037, 1_434_869_437, 2_165_219_737)


class FourierFeatures(nn.Module):
    """``[sin(B x), cos(B x)]``, B [m, in_features] drawn from N(0, std^2), in radians per coordinate unit."""

    def __init__(self, in_features: int, num_pairs: int, std: float, *, trainable: bool) -> None:
        super().__init__()
        matrix = torch.randn(num_pairs, in_features) * std
        if trainable:
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., 2 m]."""
        phase = x @ self.matrix.T
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Tile(nn.Module):
    """The coordinates, repeated ``copies`` times: the width of an encoding without its frequencies."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., copies D]."""
        return torch.cat([x] * self.copies, dim=-1)


class Activation(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.function(x)


class HashGrid(nn.Module):
    """Multiresolution hash encoding (Mueller et al., SIGGRAPH 2022, section 3), for coordinates in [-1, 1].

    Level l is a grid of floor(coarsest * growth^l) cells a side; the features of a cell's corners stand in a
    table of 2^log2_size rows, found by a hash, and are interpolated linearly.
    """

    primes: Tensor
    corners: Tensor

    def __init__(
        self, in_features: int, *, levels: int, features: int, log2_size: int, coarsest: int, finest: int
    ) -> None:
        super().__init__()
        if in_features > len(_PRIMES):
            raise ValueError(f"a hash grid takes at most {len(_PRIMES)} coordinates, got {in_features}")
        growth = (finest / coarsest) ** (1 / max(1, levels - 1))
        # Without the small term a power that should be whole falls below it.
        self.cells = [math.floor(coarsest * growth**level + 1e-9) for level in range(levels)]
        self.log2_size, self.out_features = log2_size, levels * features
        self.tables = nn.Parameter(torch.empty(levels, 2**log2_size, features).uniform_(-1e-4, 1e-4))
        self.register_buffer("primes", torch.tensor(_PRIMES[:in_features]), persistent=False)
        corners = torch.cartesian_prod(*[torch.tensor([0, 1])] * in_features).reshape(-1, in_features)
        self.register_buffer("corners", corners, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., levels * features]."""
        found = []
        for table, cells in zip(self.tables, self.cells, strict=True):
            position = (x.clamp(-1, 1) + 1) / 2 * cells
            low = position.floor()
            fraction = (position - low).unsqueeze(-2)
            weight = torch.where(self.corners == 1, fraction, 1 - fraction).prod(-1)
            found.append(
                (table[self._rows(low.long().unsqueeze(-2) + self.corners)] * weight[..., None]).sum(-2)
            )
        return torch.cat(found, dim=-1)

    def _rows(self, corner: Tensor) -> Tensor:
        """Row of the table for integer corners [..., dims]."""
        parts = corner * self.primes
        row = parts[..., 0]
        for index in range(1, parts.shape[-1]):
            row = row ^ parts[..., index]
        return row & (2**self.log2_size - 1)


class RealGabor(nn.Module):
    """``cos(omega_0 u) exp(-(sigma_0 v)^2)``, u and v linear in x: the real form of WIRE."""

    def __init__(self, in_features: int, out_features: int, omega_0: float, sigma_0: float) -> None:
        super().__init__()
        self.frequency = nn.Linear(in_features, out_features)
        self.scale = nn.Linear(in_features, out_features)
        self.omega_0, self.sigma_0 = omega_0, sigma_0

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return torch.cos(self.omega_0 * self.frequency(x)) * torch.exp(
            -(self.sigma_0 * self.scale(x)).square()
        )


def _spe(in_features: int, out_features: int, bands: Bands, **options: Any) -> nn.Module:
    """SPE; options are those of ``spe_layers.SPE``."""
    return SPE(in_features, out_features, bands, **options)


def _relu(in_features: int, out_features: int, bands: Bands) -> nn.Module:
    """Fixed encoding, Linear, ReLU (NeRF): what SPE replaces, with the same parameters."""
    return _encoded(in_features, out_features, bands, nn.ReLU())


def _identity(in_features: int, out_features: int, bands: Bands) -> nn.Module:
    """Fixed encoding, Linear, no activation: how much of a gain is only the missing ReLU."""
    return _encoded(in_features, out_features, bands)


def _relu_he(in_features: int, out_features: int, bands: Bands) -> nn.Module:
    """As ``relu`` with He weights N(0, 2/F): how much of a gain is only the scale of the first layer."""
    encoding = PositionalEncoding(in_features, bands)
    linear = nn.Linear(encoding.out_features, out_features)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return nn.Sequential(encoding, linear, nn.ReLU())


def _tiled(in_features: int, out_features: int, bands: Bands) -> nn.Module:
    """Coordinates repeated to the encoding's width, Linear, sine: SPE without the encoding."""
    linear = nn.Linear(bands.num_features(in_features), out_features)
    return nn.Sequential(Tile(bands.num_groups), linear, Activation(torch.sin))


def _rff(in_features: int, out_features: int, bands: Bands, *, sigma: float = 10.0) -> nn.Module:
    """Random Fourier features, Linear, ReLU (Tancik et al., NeurIPS 2020); 2 pi sigma rad per unit.

    sigma is theirs for images on [0, 1]; they tune it per task.
    """
    pairs = max(1, bands.num_features(in_features) // 2)
    features = FourierFeatures(in_features, pairs, 2 * math.pi * sigma, trainable=False)
    return nn.Sequential(features, nn.Linear(2 * pairs, out_features), nn.ReLU())


def _lff(in_features: int, out_features: int, bands: Bands, *, gamma: float = 1.0) -> nn.Module:
    """Learnable Fourier features, Linear, GELU (Li et al., NeurIPS 2021): B from N(0, gamma^-2), trained.

    They choose gamma per task; 1 is neutral, not theirs.
    """
    pairs = max(1, bands.num_features(in_features) // 2)
    features = FourierFeatures(in_features, pairs, 1 / gamma, trainable=True)
    return nn.Sequential(features, nn.Linear(2 * pairs, out_features), nn.GELU())


def _siren(in_features: int, out_features: int, _bands: Bands, *, omega_0: float = 30.0) -> nn.Module:
    """``sin(omega_0 (W x + b))``, W from U(-1/D, 1/D) (Sitzmann et al., NeurIPS 2020, section 3.2)."""
    return nn.Sequential(
        _siren_linear(in_features, out_features), Activation(lambda z: torch.sin(omega_0 * z))
    )


def _finer(
    in_features: int, out_features: int, _bands: Bands, *, omega_0: float = 30.0, bias_scale: float = 20.0
) -> nn.Module:
    """``sin(omega_0 (|z| + 1) z)``, z = W x + b, b from U(-k, k) (Liu et al., CVPR 2024, equation 5).

    ``bias_scale`` is k, which its authors choose per task.
    """
    linear = _siren_linear(in_features, out_features)
    nn.init.uniform_(linear.bias, -bias_scale, bias_scale)
    return nn.Sequential(linear, Activation(lambda z: torch.sin(omega_0 * (z.abs() + 1) * z)))


def _wire(
    in_features: int, out_features: int, _bands: Bands, *, omega_0: float = 10.0, sigma_0: float = 10.0
) -> nn.Module:
    """Real Gabor wavelets (Saragadam et al., CVPR 2023), the defaults of their layer."""
    return RealGabor(in_features, out_features, omega_0, sigma_0)


def _gauss(in_features: int, out_features: int, _bands: Bands, *, sigma: float = 0.1) -> nn.Module:
    """``exp(-z^2 / (2 sigma^2))`` (Ramasinghe and Lucey, ECCV 2022)."""
    return nn.Sequential(
        nn.Linear(in_features, out_features), Activation(lambda z: torch.exp(-0.5 * (z / sigma).square()))
    )


def _hash(
    in_features: int,
    out_features: int,
    _bands: Bands,
    *,
    levels: int = 8,
    features: int = 2,
    log2_size: int = 12,
    coarsest: int = 4,
    finest: int = 64,
) -> nn.Module:
    """Hash grid, Linear, ReLU; coordinates in [-1, 1]. Its tables are parameters: compare counts."""
    grid = HashGrid(
        in_features,
        levels=levels,
        features=features,
        log2_size=log2_size,
        coarsest=coarsest,
        finest=finest,
    )
    return nn.Sequential(grid, nn.Linear(grid.out_features, out_features), nn.ReLU())


def _encoded(in_features: int, out_features: int, bands: Bands, *after: nn.Module) -> nn.Sequential:
    encoding = PositionalEncoding(in_features, bands)
    return nn.Sequential(encoding, nn.Linear(encoding.out_features, out_features), *after)


def _siren_linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    nn.init.uniform_(linear.weight, -1 / in_features, 1 / in_features)
    return linear


FIRST_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "spe": _spe,
    "relu": _relu,
    "identity": _identity,
    "relu_he": _relu_he,
    "tiled": _tiled,
    "rff": _rff,
    "lff": _lff,
    "siren": _siren,
    "finer": _finer,
    "wire": _wire,
    "gauss": _gauss,
    "hash": _hash,
}


def build_first_layer(
    name: str, in_features: int, out_features: int, bands: int | Bands = 10, **options: Any
) -> nn.Module:
    """The first layer of this name, [..., in_features] -> [..., out_features].

    Args:
        name: a key of ``FIRST_LAYERS``; its function's docstring says what it is and where it comes from.
        in_features, out_features: number of coordinates and units.
        bands: bands or their number; layers without bands take from it only a width, or nothing.
        options: what the layer of this name can set, e.g. ``sigma`` of ``rff``, ``omega_0`` of ``siren``.

    Raises:
        ValueError: unknown name.
        TypeError: an option that this layer does not have.
    """
    if name not in FIRST_LAYERS:
        close = difflib.get_close_matches(name, FIRST_LAYERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown first layer {name!r}, known: {', '.join(FIRST_LAYERS)}{hint}")
    build = FIRST_LAYERS[name]
    known = inspect.signature(build if name != "spe" else SPE.__init__).parameters
    for option in options:
        if option not in known:
            raise TypeError(f"first layer {name!r} has no option {option!r}")
    return build(in_features, out_features, as_bands(bands), **options)

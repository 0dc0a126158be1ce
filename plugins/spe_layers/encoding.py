"""Phases that are exact at any band count, the positional encoding, and FreeNeRF's frequency annealing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from spe_layers.bands import Bands, as_bands

LARGEST_RATE = 2.0**100  # radians per coordinate unit that float32 can take, whatever the usual coordinate
# One rounding step of a coordinate may move the highest phase by this much (radians) and no more.
MAX_PHASE_STEP = 0.1


def coordinate_dtype(x: Tensor, bands: Bands) -> torch.dtype:
    """The dtype in which the phases of ``x`` are computed: float64 if x is, float32 otherwise.

    Raises:
        TypeError: integer, boolean or complex coordinates.
        ValueError: 16-bit coordinates whose rounding step spoils the highest band; bands beyond float32.
    """
    if not x.is_floating_point():
        raise TypeError(f"coordinates must be floating point, got {x.dtype}; pass x.float()")
    fastest = bands.scale * max(bands.multipliers or (0.0,))  # torch.compile does not know max's default
    if fastest > LARGEST_RATE:
        raise ValueError(
            f"bands reach {fastest:.3g} rad per coordinate unit, where float32 phases overflow: "
            "use fewer bands, or scale the coordinates"
        )
    if x.dtype in (torch.float32, torch.float64):
        return x.dtype
    step = fastest * torch.finfo(x.dtype).eps
    if step > MAX_PHASE_STEP:
        name = str(x.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} coordinates cannot carry {bands.num_bands} bands: one rounding step is {step:.2g} rad "
            "in the highest; pass float32 coordinates"
        )
    return torch.float32


def kept_constant(make: Callable[..., Tensor], *arguments: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``make(*arguments)`` on the device of ``like``, made once.

    A copy from the host in every call would stall the device, and no CUDA graph could capture it. Compilers
    and subclasses of Tensor get a new one.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return make(*arguments).to(dtype).to(like.device)
    return _kept(make, arguments, like.device, dtype)


@lru_cache(maxsize=256)
def _kept(
    make: Callable[..., Tensor], arguments: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    # Whatever mode the first call is in, later ones may want gradients, or leave torch.func.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        return make(*arguments).to(dtype).to(device)


def _multipliers(bands: Bands) -> Tensor:
    return torch.tensor(bands.multipliers, dtype=torch.float64)


def _rates(bands: Bands) -> Tensor:
    return torch.tensor([bands.scale * m for m in bands.multipliers], dtype=torch.float64)


def _square_rates(bands: Bands) -> Tensor:
    return torch.tensor([(bands.scale * m) ** 2 for m in bands.multipliers], dtype=torch.float64)


def _amplitudes(bands: Bands) -> Tensor:
    return torch.tensor(bands.amplitudes, dtype=torch.float64)


def phases(x: Tensor, bands: int | Bands) -> Tensor:
    """Phase of every band and coordinate, exact to about one float32 rounding.

    At scale pi or 2 pi whole turns are removed before the multiplication by pi, so the error does not grow
    with the band: ``multiplier * x`` is exact for powers of two (other multipliers go through float64), and
    so is the subtraction of the nearest whole turn.

    Args:
        x: coordinates [..., D].
        bands: L bands, or their number (octaves).

    Returns:
        [..., D, L] in radians, float32 (float64 for float64 x); in [-pi, pi] when scale is pi or 2 pi.
    """
    bands = as_bands(bands)
    dtype = coordinate_dtype(x, bands)
    product = dtype if bands.dyadic else torch.float64
    period = turn_period(bands)
    if not period:
        rates = kept_constant(_rates, bands, like=x, dtype=dtype)
        return x.to(dtype).unsqueeze(-1) * rates
    multipliers = kept_constant(_multipliers, bands, like=x, dtype=product)
    turns = x.to(product).unsqueeze(-1) * multipliers
    turns = turns - period * torch.round(turns / period)
    return turns.to(dtype) * bands.scale


def turn_period(bands: Bands) -> float:
    """Growth of ``multiplier * x`` in one turn: 2 at scale pi, 1 at 2 pi, 0 where it is no exact number."""
    if abs(bands.scale - math.pi) < 1e-12:
        return 2.0
    return 1.0 if abs(bands.scale - 2 * math.pi) < 1e-12 else 0.0


def positional_encoding(
    x: Tensor, bands: int | Bands, *, covariance: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Sines and cosines of the coordinates (and the coordinates): e(x) of NeRF, section 5.1.

    Args:
        x: coordinates [..., D].
        bands: L bands, or their number (octaves).
        covariance: [..., D, D], or its diagonal [..., D]: e is then the expectation over a Gaussian of mean x
            (integrated encoding of Mip-NeRF); band l of coordinate d is damped by
            exp(-(scale m_l)^2 var_d / 2), x is unchanged.
        mask: [G], one factor a group of D features, in the order x, sin band 0, cos band 0, sin band 1, ...

    Returns:
        [..., F] in ``bands.layout``, float32 (float64 for float64 x).

    Raises:
        TypeError, ValueError: see ``coordinate_dtype``; a covariance or mask of the wrong shape.
    """
    bands = as_bands(bands)
    dims = x.shape[-1]
    phase = phases(x, bands).transpose(-1, -2)
    features = torch.stack([phase.sin(), phase.cos()], dim=-2)
    if covariance is not None:
        features = features * _damping(x, bands, covariance, phase.dtype).unsqueeze(-2)
    if bands.amplitudes is not None:
        amplitudes = kept_constant(_amplitudes, bands, like=x, dtype=features.dtype)
        features = features * amplitudes[:, None, None]
    features = features.flatten(-3)
    if bands.include_input:
        features = torch.cat([x.to(features.dtype), features], dim=-1)
    if mask is not None:
        features = features * feature_mask(mask, bands, dims).to(features)
    if bands.layout != "nerf":
        order = kept_constant(Bands.feature_order, bands, dims, like=x, dtype=torch.int64)
        features = features[..., order]
    return features


def feature_mask(mask: Tensor, bands: Bands, in_features: int) -> Tensor:
    """A mask over groups [G] as a mask over features [F] in ``nerf`` order."""
    if mask.shape != (bands.num_groups,):
        raise ValueError(
            f"mask needs one value for each of the {bands.num_groups} groups (x, sin band 0, cos band 0, "
            f"...), got shape {tuple(mask.shape)}"
        )
    return mask.repeat_interleave(in_features)


def _damping(x: Tensor, bands: Bands, covariance: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(-(scale m_l)^2 var_d / 2) as [..., L, D]."""
    if covariance.shape == x.shape:
        variance = covariance
    elif covariance.shape == (*x.shape, x.shape[-1]):
        variance = covariance.diagonal(dim1=-2, dim2=-1)
    else:
        raise ValueError(
            f"covariance must have the shape of x {tuple(x.shape)} (its diagonal) or "
            f"{(*x.shape, x.shape[-1])}, got {tuple(covariance.shape)}"
        )
    rates = kept_constant(_square_rates, bands, like=x, dtype=dtype)
    return torch.exp(-0.5 * rates[:, None] * variance.to(dtype).unsqueeze(-2))


class PositionalEncoding(nn.Module):
    """``positional_encoding`` as a module without parameters: [..., in_features] -> [..., out_features]."""

    def __init__(self, in_features: int, bands: int | Bands = 10) -> None:
        super().__init__()
        self.in_features = in_features
        self.bands = as_bands(bands)
        self.out_features = self.bands.num_features(in_features)

    def forward(self, x: Tensor, covariance: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Encode coordinates; see ``positional_encoding``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"PositionalEncoding expects coordinates of size {self.in_features} in the last dimension, "
                f"got {x.shape[-1]}"
            )
        return positional_encoding(x, self.bands, covariance=covariance, mask=mask)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bands={self.bands.num_bands}"
        )


class FrequencyAnnealing:
    """Linear schedule that opens frequencies one after another (FreeNeRF, equation 4).

    With G groups in the order x, sin band 0, cos band 0, ...: the first ``G t / T + 1`` groups are open at
    step t of T, the next one partly. Closed groups keep a factor of 1e-8 and open ones stop at 1 - 1e-8, as
    in the reference.

    Args:
        bands: the encoding that is masked.
        end_step: T; from the first step after it every factor is 1. Zero means no annealing.
    """

    def __init__(self, bands: int | Bands, end_step: int) -> None:
        self.bands = as_bands(bands)
        self.end_step = end_step
        if end_step < 0:
            raise ValueError(f"end_step must not be negative, got {end_step}")

    def mask(self, step: int) -> Tensor:
        """Factors [G] (float64) at this step."""
        groups = self.bands.num_groups
        if step > self.end_step or self.end_step == 0:
            return torch.ones(groups, dtype=torch.float64)
        pointer = min(groups * step / self.end_step + 1, groups)
        return (pointer - torch.arange(groups, dtype=torch.float64)).clamp(1e-8, 1 - 1e-8)

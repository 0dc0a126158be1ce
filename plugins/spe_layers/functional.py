"""``spe``: the layer as a function. The only place that chooses between the kernels and plain torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from spe_layers.bands import Bands, as_bands
from spe_layers.eager import spe_eager
from spe_layers.encoding import coordinate_dtype, feature_mask, kept_constant

Backend = Literal["auto", "eager", "triton"]
_HAS_TRITON = find_spec("triton") is not None  # asked here, since torch.compile cannot trace the question


def spe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: int | Bands,
    *,
    covariance: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sinusoidal positional encoding: ``sin(W e(x) + b)`` (paper, equation of section 4).

    Args:
        x: coordinates [..., D], floating point.
        weight: W [H, F] with F = ``bands.num_features(D)``.
        bias: b [H], or None.
        bands: L bands, or their number (octaves).
        covariance, mask: see ``positional_encoding``.
        backend: ``auto`` takes the fused kernels for CUDA tensors where they apply (no covariance, not
            float64, at most 16 coordinates and 127 features) and plain torch elsewhere; ``triton`` insists,
            except that a covariance always takes plain torch.

    Returns:
        [..., H] in the weight's dtype, or autocast's inside autocast. Phases, sums and sines are float32
        (float64 for float64 weights).

    Raises:
        TypeError: integer coordinates.
        ValueError: sizes that do not fit, an unknown backend, 16-bit coordinates with too many bands.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    bands = as_bands(bands)
    check_sizes(x, weight, bias, bands)
    out_dtype = output_dtype(x, weight)
    if not use_kernels(x, weight, bands, backend) or covariance is not None:
        return spe_eager(x, weight, bias, bands, out_dtype=out_dtype, covariance=covariance, mask=mask)
    from spe_layers.kernels import fused_forward

    dims = x.shape[-1]
    points = x.reshape(-1, dims).to(torch.float32)
    folded = nerf_order_weight(weight, bands, dims, mask)
    flat = fused_forward(points, folded, bias, bands, out_dtype)
    return flat.reshape(*x.shape[:-1], weight.shape[0])


def check_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, bands: Bands) -> None:
    """Refuse coordinates, weight and bias that do not belong together."""
    coordinate_dtype(x, bands)
    if x.dim() == 0:
        raise ValueError("coordinates need at least one dimension, got a scalar; pass x.unsqueeze(-1)")
    features = bands.num_features(x.shape[-1])
    if weight.dim() != 2 or weight.shape[1] != features:
        raise ValueError(
            f"weight must be [H, {features}] for {x.shape[-1]} coordinates and {bands.num_bands} bands, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype inside autocast (which leaves float64 alone), the weight's elsewhere."""
    if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def check_backend(backend: str) -> None:
    """Refuse an unknown backend (ValueError)."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")


def use_kernels(x: Tensor, weight: Tensor, bands: Bands, backend: Backend) -> bool:
    """Whether ``backend`` means the Triton kernels for these tensors; raises where it insists in vain."""
    check_backend(backend)
    if backend == "eager" or (backend == "auto" and not (x.is_cuda and _HAS_TRITON)):
        return False
    from spe_layers import kernels, triton_kernels

    fits = kernels.supports(x.shape[-1], bands) and torch.float64 not in (x.dtype, weight.dtype)
    if backend == "auto":
        return fits
    if not (x.is_cuda or triton_kernels.INTERPRETED):
        raise RuntimeError(
            "backend='triton' needs a CUDA tensor, or TRITON_INTERPRET=1 set before triton is imported"
        )
    if not fits:
        raise ValueError(
            f"backend='triton' takes at most {kernels.MAX_COORDINATES} coordinates, {kernels.MAX_FEATURES} "
            f"features and no float64; got {x.shape[-1]}, {bands.num_features(x.shape[-1])} and {x.dtype}; "
            "use 'auto'"
        )
    return True


def nerf_order_weight(weight: Tensor, bands: Bands, in_features: int, mask: Tensor | None) -> Tensor:
    """The weight for plain features in ``nerf`` order: layout, amplitudes and mask are in its columns."""
    if bands.layout != "nerf":
        inverse = kept_constant(_inverse_order, bands, in_features, like=weight, dtype=torch.int64)
        weight = weight[:, inverse]
    if bands.amplitudes is not None:
        weight = weight * kept_constant(
            Bands.feature_scales, bands, in_features, like=weight, dtype=weight.dtype
        )
    if mask is not None:
        weight = weight * feature_mask(mask, bands, in_features).to(weight)
    return weight


def _inverse_order(bands: Bands, in_features: int) -> Tensor:
    return torch.argsort(bands.feature_order(in_features))

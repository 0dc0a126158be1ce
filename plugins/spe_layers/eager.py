"""``sin(W e(x) + b)`` in plain torch: the reference for the kernels, and the path for what they do not do."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from spe_layers.bands import Bands
from spe_layers.encoding import positional_encoding


def phase_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    *,
    covariance: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``W e(x) + b`` [..., H] in float32 (float64 if the weight is), whatever autocast says."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device_type = x.device.type
    # Autocast would round the phases to 16 bits: an error of a whole turn in the upper bands.
    autocast = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        features = positional_encoding(x, bands, covariance=covariance, mask=mask)
        return F.linear(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def spe_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    *,
    out_dtype: torch.dtype,
    covariance: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``sin(W e(x) + b)`` [..., D] -> [..., H]: phases and sine in float32, result in ``out_dtype``."""
    return phase_eager(x, weight, bias, bands, covariance=covariance, mask=mask).sin().to(out_dtype)

"""Fewer bands after training: drop those that the weights hardly use, with a bound on what changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spe_layers.bands import Bands
from spe_layers.layer import SPE


@dataclass(frozen=True)
class PruneResult:
    """A smaller layer and what it costs.

    Attributes:
        layer: an SPE over the bands that were kept; its other weights are those of the old one.
        dropped: indices of the old layer's bands that are gone.
        bound: no output of the new layer differs by more from the old one's, whatever the coordinates.
    """

    layer: SPE
    dropped: tuple[int, ...]
    bound: float


@torch.no_grad()
def prune_bands(layer: SPE, tolerance: float) -> PruneResult:
    """Drop bands, least used first, while no output can change by more than ``tolerance``.

    Sines and cosines are at most 1, and sine is 1-Lipschitz, so dropping columns f changes unit h by at most
    the sum of \\|W_hf\\| times the amplitude of f. A band goes as a whole; the last feature always stays.

    Args:
        layer: left as it is.
        tolerance: largest change of an output, in units of the sine.

    Raises:
        ValueError: a tolerance that is negative or not finite, weights that are not finite.
    """
    if not (tolerance >= 0 and tolerance < float("inf")):
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    bands, dims = layer.bands, layer.in_features
    inputs = dims * int(bands.include_input)
    weight = layer.weight.detach()
    if not weight.isfinite().all():
        raise ValueError("the layer's weight contains NaN or infinity; nothing was pruned")
    # In the order of NeRF a band is a block of 2 D columns.
    plain = weight[:, torch.argsort(bands.feature_order(dims)).to(weight.device)]
    scales = bands.feature_scales(dims).to(weight.device)
    used = (plain.double().abs() * scales.abs())[:, inputs:]
    cost = used.reshape(len(weight), bands.num_bands, 2 * dims).sum(-1)
    order = torch.argsort(cost.amax(0)).tolist()
    if not bands.include_input:
        order = order[:-1]
    total, dropped = cost.new_zeros(len(weight)), []
    for band in order:
        if float((total + cost[:, band]).max()) > tolerance:
            break
        total = total + cost[:, band]
        dropped.append(band)
    kept = [band for band in range(bands.num_bands) if band not in dropped]
    columns = [*range(inputs), *(inputs + 2 * dims * band + i for band in kept for i in range(2 * dims))]
    smaller = _smaller(layer, bands, kept)
    order_now = smaller.bands.feature_order(dims).to(weight.device)
    smaller.weight.copy_(plain[:, columns][:, order_now])
    if layer.bias is not None and smaller.bias is not None:
        smaller.bias.copy_(layer.bias)
    return PruneResult(smaller, tuple(sorted(dropped)), float(total.max()))


def _smaller(layer: SPE, bands: Bands, kept: list[int]) -> SPE:
    amplitudes = None if bands.amplitudes is None else tuple(bands.amplitudes[band] for band in kept)
    return SPE(
        layer.in_features,
        layer.out_features,
        replace(bands, multipliers=tuple(bands.multipliers[b] for b in kept), amplitudes=amplitudes),
        bias=layer.bias is not None,
        init=layer.init,
        phase_std=layer.phase_std,
        backend=layer.backend,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )

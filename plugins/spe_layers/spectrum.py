"""What a layer has learned: the frequencies its units have where the data are."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spe_layers.encoding import phases
from spe_layers.functional import check_sizes, nerf_order_weight
from spe_layers.layer import SPE

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def effective_frequencies(layer: SPE, x: Tensor) -> Tensor:
    """``||d phase_h / d x||_2`` of every unit at every point, in radians per coordinate unit.

    The unit's output is sin(phase_h), so near x it oscillates at this rate.

    Args:
        layer: an SPE with D coordinates and H units.
        x: [N, D].

    Returns:
        [N, H], float32 (float64 if x is).
    """
    check_sizes(x, layer.weight, layer.bias, layer.bands)
    bands, dims = layer.bands, layer.in_features
    phase = phases(x, bands)
    weight = nerf_order_weight(layer.weight, bands, dims, None).to(phase.dtype)
    split = dims * int(bands.include_input)
    waves = weight[:, split:].reshape(len(weight), bands.num_bands, 2, dims)
    rates = torch.tensor([bands.scale * m for m in bands.multipliers], dtype=phase.dtype, device=x.device)
    slopes = torch.einsum("hld,ndl,l->nhd", waves[:, :, 0], phase.cos(), rates)
    slopes -= torch.einsum("hld,ndl,l->nhd", waves[:, :, 1], phase.sin(), rates)
    if bands.include_input:
        slopes += weight[:, :split]
    return slopes.norm(dim=-1)


@dataclass(frozen=True)
class SpectrumReport:
    """Distribution of effective frequencies over points and units, radians per coordinate unit.

    Attributes:
        edges: of the bins, [bins + 1], evenly spaced in the logarithm.
        counts: share of (point, unit) pairs a bin, [bins]; they sum to 1.
        quantiles: probability -> frequency.
        share_above_nyquist: share above pi / spacing; None without a spacing.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    quantiles: dict[float, float]
    share_above_nyquist: float | None

    def __str__(self) -> str:
        """A table."""
        from rich.console import Console
        from rich.table import Table

        table = Table("frequency (rad / unit)", "share", title="Effective frequencies")
        for low, high, share in zip(self.edges, self.edges[1:], self.counts, strict=False):
            if share:
                table.add_row(f"{low:.4g} to {high:.4g}", f"{share:.3f}")
        table.add_section()
        for probability, value in self.quantiles.items():
            table.add_row(f"quantile {probability:g}", f"{value:.4g}")
        if self.share_above_nyquist is not None:
            table.add_row("above Nyquist", f"{self.share_above_nyquist:.3f}")
        out = io.StringIO()
        Console(file=out, width=80).print(table)
        return out.getvalue().rstrip()


def spectrum_report(layer: SPE, x: Tensor, *, spacing: float | None = None, bins: int = 32) -> SpectrumReport:
    """Effective frequencies of a layer at these points, as a histogram with quantiles.

    Args:
        layer: an SPE.
        x: [N, D], where the data are.
        spacing: distance between samples; frequencies above pi / spacing are beyond what the data can fix.
        bins: of the histogram.

    Raises:
        ValueError: no points, spacing or bins not positive.
    """
    if not len(x):
        raise ValueError("spectrum_report needs at least one point")
    if bins < 1 or (spacing is not None and not spacing > 0):
        raise ValueError(f"bins and spacing must be positive, got {bins} and {spacing}")
    values = effective_frequencies(layer, x).double().flatten().cpu()
    low, high = float(values.min().clamp_min(1e-12)), float(values.max().clamp_min(1e-12))
    if high <= low:
        low, high = low / 2, high * 2
    edges = torch.logspace(math.log10(low), math.log10(high), bins + 1, dtype=torch.float64)
    index = torch.bucketize(values, edges[1:-1])
    counts = torch.bincount(index, minlength=bins).double() / len(values)
    order = values.sort().values
    positions = {q: float(order[min(len(order) - 1, int(q * len(order)))]) for q in QUANTILES}
    above = None if spacing is None else float((values > math.pi / spacing).double().mean())
    return SpectrumReport(tuple(edges.tolist()), tuple(counts.tolist()), positions, above)

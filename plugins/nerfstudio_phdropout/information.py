"""Fisher information of Gaussians: what training views say about each, and what that leaves open elsewhere.

Two peers of PH-Dropout, written from their papers, on the same rasterized splats:

- FisherRF (arXiv 2311.17874): diagonal information of the training views, H_k = sum over pixels of (dC/dk)^2;
  a pixel's variance is the information it would add, sum_k (dC/dk)^2 / (H_k + prior).
- BayesRays (arXiv 2309.03185) carried over from NeRF: only displacements of the centres are free, their
  posterior spread is a property of each Gaussian, and an image of it is rendered like a colour.

Parameters: colour as seen by the view, logit of the opacity, centre (its effect on the 2-D shape left out).
"""

# The signatures are gsplat's.
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nerfstudio_phdropout.geometry import Splats
from nerfstudio_phdropout.kernels import assemble_tiles, before, stopped_transmittance
from nerfstudio_phdropout.rasterize import prepare_splats
from nerfstudio_phdropout.tiles import ALPHA_MAX, Tile, iterate_tiles, tile_alphas

TILE_SIZE = 16


@dataclass
class SplatInformation:
    """Diagonal Fisher information, summed over the pixels and channels of the views added so far.

    Attributes:
        color: ``[N]``, the same for each channel.
        opacity: ``[N]``, of the logit.
        position: ``[N, 3]``, per squared world unit.
        pixels: how many pixels were added.
    """

    color: Tensor
    opacity: Tensor
    position: Tensor
    pixels: int = 0

    @classmethod
    def zeros(cls, count: int, *, like: Tensor) -> SplatInformation:
        """Nothing known of ``count`` Gaussians."""
        return cls(like.new_zeros(count), like.new_zeros(count), like.new_zeros(count, 3))


@dataclass(frozen=True)
class _TileDerivatives:
    """Derivatives of one tile's pixels by the parameters of its splats, P pixels and n splats.

    Attributes:
        ids: ``[n]`` Gaussian of each splat.
        by_color: ``[P, n]`` dC/dcolour, the blending weight.
        by_alpha: ``[P, n, D]``.
        logit: ``[P, n]`` dalpha/dlogit.
        shift: ``[P, n, 2]`` dalpha/dcentre, per pixel.
    """

    ids: Tensor
    by_color: Tensor
    by_alpha: Tensor
    logit: Tensor
    shift: Tensor


@torch.no_grad()
def add_information(
    information: SplatInformation,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    **options: Any,
) -> None:
    """Add what views say about the Gaussians. Arguments as `rasterization`, from ``means`` on."""
    splats = prepare_splats(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, tile_size=TILE_SIZE, **options
    )
    jacobians = _centre_jacobians(means, viewmats, Ks)
    count = means.shape[0]
    spread = means.new_zeros(len(viewmats) * count, 2, 2)
    for tile, found in _derivatives(splats, width, height, options.get("backgrounds")):
        if found is None:
            continue
        alpha_square = found.by_alpha.square().sum(-1)
        information.color.index_add_(0, found.ids, found.by_color.square().sum(0))
        information.opacity.index_add_(0, found.ids, (alpha_square * found.logit.square()).sum(0))
        outer = torch.einsum("pn,pni,pnj->nij", alpha_square, found.shift, found.shift)
        spread.index_add_(0, found.ids + tile.image * count, outer)
    spread = spread.view(len(viewmats), count, 2, 2)
    information.position += torch.einsum("cnik,cnij,cnjk->nk", jacobians, spread, jacobians)
    information.pixels += len(viewmats) * width * height


@torch.no_grad()
def information_variance(
    information: SplatInformation,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    prior: float = 1e-6,
    **options: Any,
) -> Tensor:
    """FisherRF's uncertainty of every pixel: sum over parameters of (dC/dk)^2 / (H_k + ``prior``).

    Arguments as `rasterization`, from ``means`` on.

    Returns:
        ``[C, H, W, D]``; its scale is arbitrary (the noise of the images is not estimated).

    Raises:
        ValueError: a prior that is not positive.
    """
    if not prior > 0:
        raise ValueError(f"prior must be positive, got {prior}")
    splats = prepare_splats(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, tile_size=TILE_SIZE, **options
    )
    jacobians = _centre_jacobians(means, viewmats, Ks)
    position = torch.einsum("cnik,nk,cnjk->cnij", jacobians, 1 / (information.position + prior), jacobians)
    color, opacity = 1 / (information.color + prior), 1 / (information.opacity + prior)
    parts = []
    for tile, found in _derivatives(splats, width, height, options.get("backgrounds")):
        if found is None:
            pixels = (tile.bottom - tile.top) * (tile.right - tile.left)
            parts.append(means.new_zeros(pixels, splats.colors.shape[-1]))
            continue
        moved = torch.einsum("pni,nij,pnj->pn", found.shift, position[tile.image][found.ids], found.shift)
        by_alpha = found.logit.square() * opacity[found.ids] + moved
        parts.append(
            torch.einsum("pnd,pn->pd", found.by_alpha.square(), by_alpha)
            + (found.by_color.square() @ color[found.ids])[:, None]
        )
    return assemble_tiles(parts, len(viewmats), width, height, TILE_SIZE)


def displacement_std(information: SplatInformation, *, prior: float | None = None) -> Tensor:
    """BayesRays' spread of each Gaussian's centre, ``[N]``: the norm over axes of (2 H / R + 2 prior)^-1/2.

    Render it as a colour for an uncertainty map. R counts pixels.

    Args:
        prior: 1e-4 / N if None, as the paper divides by the number of its grid's vertices.

    Raises:
        ValueError: nothing was added, or a prior that is not positive.
    """
    if information.pixels == 0:
        raise ValueError("no view has been added; call add_information for the training views first")
    if prior is None:
        prior = 1e-4 / max(len(information.position), 1)
    if not prior > 0:
        raise ValueError(f"prior must be positive, got {prior}")
    precision = 2 * information.position / information.pixels + 2 * prior
    return (1 / precision).sum(-1).sqrt()


def ratios_from_information(
    information: SplatInformation, mean_ratio: float, *, max_ratio: float = 0.9
) -> Tensor:
    """A drop ratio for each Gaussian, larger where training views constrain it less.

    The ratio is 1 - (1 - x)^(1 / s), with s the blending weight seen in training over its median and x found
    so that the mean over Gaussians is ``mean_ratio``.

    Args:
        mean_ratio: in [0, ``max_ratio``).
        max_ratio: no Gaussian gets more, below 1.

    Returns:
        ``[N]``, for ``dropout_ratio`` of `rasterization_moments`.

    Raises:
        ValueError: ratios out of order.
    """
    if not 0 <= mean_ratio < max_ratio < 1:
        raise ValueError(
            f"need 0 <= mean_ratio < max_ratio < 1, got mean_ratio={mean_ratio}, max_ratio={max_ratio}"
        )
    seen = information.color.clamp(min=0).sqrt()
    openness = (seen.median() / seen.clamp(min=1e-12)).clamp(max=1e6)
    low, high = 0.0, 60.0
    for _ in range(60):
        rate = (low + high) / 2
        if float((-torch.expm1(-rate * openness)).clamp(max=max_ratio).mean()) < mean_ratio:
            low = rate
        else:
            high = rate
    return (-torch.expm1(-low * openness)).clamp(max=max_ratio)


def _centre_jacobians(means: Tensor, viewmats: Tensor, Ks: Tensor) -> Tensor:
    """``[C, N, 2, 3]`` derivative of the projected centre, pixels per world unit."""
    rotation = viewmats[:, :3, :3]
    x, y, z = (torch.einsum("cij,nj->cni", rotation, means) + viewmats[:, None, :3, 3]).unbind(-1)
    z = torch.where(z.abs() > 1e-6, z, 1e-6)
    fx, fy = Ks[:, 0, 0, None], Ks[:, 1, 1, None]
    zero = torch.zeros_like(z)
    camera = torch.stack([fx / z, zero, -fx * x / z**2, zero, fy / z, -fy * y / z**2], dim=-1)
    return torch.einsum("cnia,cab->cnib", camera.view(*z.shape, 2, 3), rotation)


def _derivatives(
    splats: Splats, width: int, height: int, backgrounds: Tensor | None
) -> Iterator[tuple[Tile, _TileDerivatives | None]]:
    """Every tile, with None where it holds no splat."""
    _, count, channels = splats.colors.shape
    means2d, conics = splats.means2d.reshape(-1, 2), splats.conics.reshape(-1, 3)
    opacities, colors = splats.opacities.reshape(-1), splats.colors.reshape(-1, channels)
    for tile in iterate_tiles(splats.isect_offsets, splats.flatten_ids.numel(), width, height, TILE_SIZE):
        if tile.start == tile.stop:
            yield tile, None
            continue
        ids = splats.flatten_ids[tile.start : tile.stop].long()
        background = colors.new_zeros(channels) if backgrounds is None else backgrounds[tile.image]
        yield (
            tile,
            _tile_derivatives(
                tile, ids % count, means2d[ids], conics[ids], opacities[ids], colors[ids], background
            ),
        )


def _tile_derivatives(
    tile: Tile,
    gaussians: Tensor,
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    background: Tensor,
) -> _TileDerivatives:
    alphas, behind = stopped_transmittance(tile_alphas(tile, means2d, conics, opacities), 1.0)
    through = before(behind)
    weights = through * alphas
    share = weights[..., None] * colors
    following = torch.cat([share[:, 1:], (behind[:, -1:] * background)[:, None]], dim=1)
    after = following.flip(1).cumsum(1).flip(1) / behind[..., None]
    # A splat cut or stopped (alpha 0) or clamped does not answer to its parameters.
    free = (alphas > 0) & (alphas < ALPHA_MAX)
    by_alpha = torch.where((alphas > 0)[..., None], through[..., None] * (colors - after), 0.0)
    ys = torch.arange(tile.top, tile.bottom, device=means2d.device, dtype=means2d.dtype) + 0.5
    xs = torch.arange(tile.left, tile.right, device=means2d.device, dtype=means2d.dtype) + 0.5
    dx = (means2d[:, 0] - xs[:, None]).repeat(len(ys), 1)
    dy = (means2d[:, 1] - ys[:, None]).repeat_interleave(len(xs), 0)
    slope = torch.where(free, -alphas, 0.0)
    shift = torch.stack(
        [slope * (conics[:, 0] * dx + conics[:, 1] * dy), slope * (conics[:, 1] * dx + conics[:, 2] * dy)],
        dim=-1,
    )
    logit = torch.where(free, alphas * (1 - opacities), 0.0)
    return _TileDerivatives(gaussians, weights, by_alpha, logit, shift)

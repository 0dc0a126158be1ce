"""Moments of 2-D Gaussian splatting: flat Gaussians ("surfels") met by each pixel's ray.

A surfel spans centre + u s_u t_u + v s_v t_v. With H = K [s_u t_u, s_v t_v, centre] in camera axes, pixel
(x, y) meets it where (u, v, 1) is parallel to (x h_3 - h_1) x (y h_3 - h_2), h_i the rows of H (Huang et al.
2024, arXiv 2403.17888, section 4.2); exp(-(u^2 + v^2) / 2) is kept from vanishing edge-on by a round blur of
2^-1/2 pixels about the centre of its outline. Conventions and constants are those of gsplat's 2DGS kernels.
"""

# The signatures are gsplat's.
# ruff: noqa: PLR0917

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerfstudio_phdropout.checks import check_ratio
from nerfstudio_phdropout.geometry import rotation_matrices, view_colors
from nerfstudio_phdropout.kernels import assemble_tiles, tile_moments
from nerfstudio_phdropout.moments import RenderMoments
from nerfstudio_phdropout.tiles import ALPHA_MAX, ALPHA_MIN, Tile, intersect_tiles, iterate_tiles

_EXTENT = 3.33


@dataclass(frozen=True)
class Surfels:
    """N projected surfels in C images.

    Attributes:
        transforms: ``[C, N, 3, 3]`` H, from (u, v, 1) to pixels times depth.
        centres: ``[C, N, 2]`` centre of the outline, pixels.
        depths: ``[C, N]``.
        radii: ``[C, N, 2]`` int32; 0 for what is not visible.
    """

    transforms: Tensor
    centres: Tensor
    depths: Tensor
    radii: Tensor


def project_surfels(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
) -> Surfels:
    """Pinhole projection; arguments as `rasterization_2dgs_moments`."""
    rotation, translation = viewmats[:, :3, :3], viewmats[:, :3, 3]
    centre = torch.einsum("cij,nj->cni", rotation, means) + translation[:, None]
    tangents = rotation_matrices(quats)[..., :2] * scales[:, None, :2]
    spanned = torch.einsum("cij,njk->cnik", rotation, tangents)
    transforms = torch.einsum("cij,cnjk->cnik", Ks, torch.cat([spanned, centre[..., None]], dim=-1))
    # Outline of the unit disc: its dual conic is H diag(1, 1, -1) H^T.
    signs = means.new_tensor([1.0, 1.0, -1.0])
    dual = (transforms * signs) @ transforms.transpose(-1, -2)
    depths = centre[..., 2]
    scale = dual[..., 2, 2]
    visible = (depths > near_plane) & (depths < far_plane) & (scale != 0)
    scale = torch.where(scale != 0, scale, 1.0)
    centres = dual[..., :2, 2] / scale[..., None]
    diagonal = torch.stack([dual[..., 0, 0], dual[..., 1, 1]], dim=-1)
    extents = (centres**2 - diagonal / scale[..., None]).clamp(min=1e-4).sqrt()
    radii = (_EXTENT * extents).ceil()
    size = torch.tensor([width, height], device=means.device, dtype=means.dtype)
    on_image = ((centres + radii > 0) & (centres - radii < size)).all(-1)
    radii = torch.where((visible & on_image)[..., None], radii, 0).int()
    return Surfels(transforms, centres, depths, radii)


def surfel_alphas(tile: Tile, transforms: Tensor, centres: Tensor, opacities: Tensor) -> Tensor:
    """Opacity of surfels at the tile's pixel centres, cut to 0 below 1/255.

    Args:
        transforms, centres, opacities: ``[n, 3, 3]``, ``[n, 2]``, ``[n]``, front to back.

    Returns:
        ``[P, n]``, P pixels row by row.
    """
    ys = torch.arange(tile.top, tile.bottom, device=centres.device, dtype=centres.dtype) + 0.5
    xs = torch.arange(tile.left, tile.right, device=centres.device, dtype=centres.dtype) + 0.5
    y, x = (grid.reshape(-1, 1) for grid in torch.meshgrid(ys, xs, indexing="ij"))
    first = x[..., None] * transforms[:, 2] - transforms[:, 0]
    second = y[..., None] * transforms[:, 2] - transforms[:, 1]
    u, v, w = torch.linalg.cross(first, second, dim=-1).unbind(-1)
    on_plane = torch.where(w != 0, (u**2 + v**2) / w**2, torch.inf)
    blurred = 2 * ((x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2)
    alphas = (opacities * torch.exp(-0.5 * torch.minimum(on_plane, blurred))).clamp(max=ALPHA_MAX)
    return torch.where(alphas >= ALPHA_MIN, alphas, 0.0)


def rasterization_2dgs_moments(
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
    dropout_ratio: float | Tensor,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    sh_degree: int | None = None,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
) -> RenderMoments:
    """Mean and variance of `gsplat.rasterization_2dgs` colours under independent dropout of surfels.

    One pass without noise, in torch on any device, differentiable. Arguments as `rasterization`, and:

    Args:
        scales: ``[N, 2]`` or ``[N, 3]``, whose last column is not used.
        dropout_ratio: scalar or ``[N]``, in [0, 1).

    Returns:
        Moments with fields ``[C, H, W, D]`` and ``[C, H, W]``.

    Raises:
        ValueError: a ratio outside [0, 1), or shapes that do not fit.
    """
    check_ratio(dropout_ratio)
    images, count = viewmats.shape[0], means.shape[0]
    if opacities.shape != (count,):
        raise ValueError(f"opacities has shape {list(opacities.shape)}, expected [{count}] from means [N, 3]")
    surfels = project_surfels(means, quats, scales, viewmats, Ks, width, height, near_plane, far_plane)
    tiles = (-(-width // tile_size), -(-height // tile_size))
    offsets, ids = intersect_tiles(surfels.centres, surfels.radii, surfels.depths, tile_size, *tiles)
    shown = view_colors(means, colors, viewmats, sh_degree)
    channels = shown.shape[-1]
    keep = 1 - torch.as_tensor(dropout_ratio, dtype=means.dtype, device=means.device).expand(count)
    fields: list[list[Tensor]] = []
    for tile in iterate_tiles(offsets, ids.numel(), width, height, tile_size):
        chosen = ids[tile.start : tile.stop].long() % max(count, 1)
        background = means.new_zeros(channels) if backgrounds is None else backgrounds[tile.image]
        transforms, centres = surfels.transforms[tile.image][chosen], surfels.centres[tile.image][chosen]
        alphas = surfel_alphas(tile, transforms, centres, opacities[chosen])
        fields.append(tile_moments(alphas, shown[tile.image][chosen], keep[chosen], background))
    mean, variance, through, through_variance, negated = (
        assemble_tiles(list(parts), images, width, height, tile_size) for parts in zip(*fields, strict=True)
    )
    return RenderMoments(mean, variance, 1 - through[..., 0], through_variance[..., 0], -negated)

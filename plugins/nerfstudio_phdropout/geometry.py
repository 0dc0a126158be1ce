"""From 3-D Gaussians to 2-D splats in torch: projection, spherical harmonics, tile lists.

EWA splatting (Zwicker et al. 2001) with the conventions of gsplat 1.5: pixel centres at +0.5, blur ``eps2d``
on the 2-D covariance, opacity-aware extents, and SH colours shifted by 0.5 and cut at 0.
"""

# The signatures are gsplat's.
# ruff: noqa: PLR0917

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nerfstudio_phdropout.tiles import ALPHA_MIN, intersect_tiles

# Extent in standard deviations beyond which exp(-x^2 / 2) is below 1/255 for every opacity.
_EXTENT = 3.33


@dataclass(frozen=True)
class Splats:
    """What a rasterizer needs of C images and N Gaussians.

    Attributes:
        means2d: ``[C, N, 2]`` pixels.
        conics: ``[C, N, 3]`` upper triangle of the inverse covariance.
        opacities: ``[C, N]``, compensated when antialiased.
        depths: ``[C, N]``.
        radii: ``[C, N, 2]`` int32; 0 for what is not visible.
        colors: ``[C, N, D]``.
        isect_offsets: ``[C, th, tw]`` int32.
        flatten_ids: int32.
    """

    means2d: Tensor
    conics: Tensor
    opacities: Tensor
    depths: Tensor
    radii: Tensor
    colors: Tensor
    isect_offsets: Tensor
    flatten_ids: Tensor


def rotation_matrices(quats: Tensor) -> Tensor:
    """``[N, 4]`` wxyz, any norm -> ``[N, 3, 3]``."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).view(*quats.shape[:-1], 3, 3)


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    eps2d: float,
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pinhole projection. Returns means2d, conics, opacities, depths, radii as in `Splats`."""
    rotation, translation = viewmats[:, :3, :3], viewmats[:, :3, 3]
    points = torch.einsum("cij,nj->cni", rotation, means) + translation[:, None]
    axes = torch.einsum("cij,njk->cnik", rotation, rotation_matrices(quats) * scales[:, None, :])
    x, y, z = points.unbind(-1)
    visible = (z > near_plane) & (z < far_plane)
    z = torch.where(visible, z, 1.0)
    fx, fy, cx, cy = (Ks[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    tan_x = _clamped_slope(x / z, fx, cx, width)
    tan_y = _clamped_slope(y / z, fy, cy, height)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * tan_x / z, zero, fy / z, -fy * tan_y / z], dim=-1)
    spread = jacobian.view(*z.shape, 2, 3) @ axes
    covariance = spread @ spread.transpose(-1, -2)
    xx, xy, yy = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
    before = xx * yy - xy * xy
    xx, yy = xx + eps2d, yy + eps2d
    determinant = (xx * yy - xy * xy).clamp(min=1e-10)
    opacity = opacities.expand(z.shape)
    if antialiased:
        opacity = opacity * (before / determinant).clamp(min=0).sqrt()
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)
    conics = torch.stack([yy, -xy, xx], dim=-1) / determinant[..., None]
    radii = _extents(opacity, torch.stack([xx, yy], dim=-1), means2d, visible, width, height)
    return means2d, conics, opacity, z, radii


def _clamped_slope(slope: Tensor, focal: Tensor, centre: Tensor, size: int) -> Tensor:
    """Slopes kept within 15 % of the image size outside its border, where the linearisation holds."""
    margin = 0.3 * 0.5 * size / focal
    return torch.minimum(torch.maximum(slope, -(centre / focal + margin)), (size - centre) / focal + margin)


@torch.no_grad()
def _extents(
    opacity: Tensor, variances: Tensor, means2d: Tensor, visible: Tensor, width: int, height: int
) -> Tensor:
    """Half extents in pixels of the box outside which a splat is cut, 0 if it is not visible."""
    reach = (2 * (opacity / ALPHA_MIN).clamp(min=1).log()).sqrt().clamp(max=_EXTENT)
    radii = (reach[..., None] * variances.sqrt()).ceil()
    size = torch.tensor([width, height], device=means2d.device, dtype=means2d.dtype)
    on_image = ((means2d + radii > 0) & (means2d - radii < size)).all(-1)
    shown = visible & (opacity >= ALPHA_MIN) & on_image
    return torch.where(shown[..., None], radii, 0).int()


def sh_basis(degree: int, directions: Tensor) -> Tensor:
    """Real spherical harmonics up to ``degree`` <= 4 at unit vectors ``[..., 3]``: ``[..., (degree + 1)^2]``.

    By recurrence over associated Legendre polynomials in z, with the sign convention of gsplat.
    """
    if not 0 <= degree <= 4:
        raise ValueError(f"sh_degree must lie in 0 .. 4, got {degree}")
    x, y, z = directions.unbind(-1)
    cosines, sines = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(degree):
        cosines.append(x * cosines[-1] - y * sines[-1])
        sines.append(x * sines[-1] + y * cosines[-2])
    # legendre[l, m] is P_l^m(z) / (1 - z^2)^(m/2), without the Condon-Shortley phase.
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(degree + 1):
        legendre[m, m] = torch.full_like(z, float(math.prod(range(2 * m - 1, 0, -2))))
        if m < degree:
            legendre[m + 1, m] = (2 * m + 1) * z * legendre[m, m]
        for level in range(m + 2, degree + 1):
            upper, lower = legendre[level - 1, m], legendre[level - 2, m]
            legendre[level, m] = ((2 * level - 1) * z * upper - (level + m - 1) * lower) / (level - m)
    columns = []
    for level in range(degree + 1):
        for m in range(-level, level + 1):
            k = abs(m)
            norm = math.sqrt(
                (2 * level + 1) / (4 * math.pi) * math.factorial(level - k) / math.factorial(level + k)
            )
            norm *= math.sqrt(2) * (-1) ** k if k else 1.0
            columns.append(norm * legendre[level, k] * (sines[k] if m < 0 else cosines[k]))
    return torch.stack(columns, dim=-1)


def view_colors(means: Tensor, colors: Tensor, viewmats: Tensor, sh_degree: int | None) -> Tensor:
    """Colours of every Gaussian in every view, ``[C, N, D]``.

    Args:
        colors: ``[N, D]`` or ``[C, N, D]``; with ``sh_degree`` ``[N, K, 3]`` or ``[C, N, K, 3]``.
    """
    images, count = viewmats.shape[0], means.shape[0]
    if sh_degree is None:
        return colors.expand(images, count, colors.shape[-1])
    terms = (sh_degree + 1) ** 2
    if colors.ndim < 3 or colors.shape[-1] != 3 or colors.shape[-2] < terms:
        raise ValueError(
            f"sh_degree={sh_degree} needs colors [N, K >= {terms}, 3], got {list(colors.shape)}; "
            "leave sh_degree out for plain colours"
        )
    rotation = viewmats[:, :3, :3]
    centres = -(rotation.transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]
    directions = torch.nn.functional.normalize(means - centres[:, None], dim=-1)
    shifted = (sh_basis(sh_degree, directions)[..., None] * colors[..., :terms, :]).sum(-2) + 0.5
    return shifted.clamp(min=0)


def torch_splats(
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
    near_plane: float,
    far_plane: float,
    eps2d: float,
    sh_degree: int | None,
    tile_size: int,
    antialiased: bool,
) -> Splats:
    """Project, colour and list by tile; arguments as `nerfstudio_phdropout.rasterization`."""
    means2d, conics, opacity, depths, radii = project(
        means,
        quats,
        scales,
        opacities,
        viewmats,
        Ks,
        width,
        height,
        near_plane,
        far_plane,
        eps2d,
        antialiased,
    )
    offsets, ids = intersect_tiles(
        means2d, radii, depths, tile_size, -(-width // tile_size), -(-height // tile_size)
    )
    shown = view_colors(means, colors, viewmats, sh_degree)
    return Splats(means2d, conics, opacity, depths, radii, shown, offsets, ids)

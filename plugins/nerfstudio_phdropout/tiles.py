"""Which splats touch which tile, and their opacity at each pixel: vectorised torch, any device.

The constants and the order (by tile, then depth, then index) are those of gsplat's CUDA kernels, so tile
lists of either may be given to `nerfstudio_phdropout.rasterize_moments`.
"""

# The signatures are gsplat's.
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHA_MAX = 0.999
ALPHA_MIN = 1 / 255
TRANSMITTANCE_MIN = 1e-4


@dataclass(frozen=True)
class Tile:
    """One tile of one image: its pixel rectangle and the range of its splats in ``flatten_ids``."""

    image: int
    top: int
    bottom: int
    left: int
    right: int
    start: int
    stop: int


@torch.no_grad()
def intersect_tiles(
    means2d: Tensor, radii: Tensor, depths: Tensor, tile_size: int, tile_width: int, tile_height: int
) -> tuple[Tensor, Tensor]:
    """Splats of every tile, front to back.

    Args:
        means2d: ``[C, N, 2]`` pixels.
        radii: ``[C, N, 2]`` int, half extents in pixels; 0 hides a splat.
        depths: ``[C, N]``.

    Returns:
        ``isect_offsets`` ``[C, tile_height, tile_width]`` int32, where each tile's list starts, and
        ``flatten_ids`` int32, indices into the flattened ``[C * N]``.
    """
    images, count = depths.shape
    limits = torch.tensor([tile_width, tile_height], device=depths.device)
    extent = radii.to(means2d.dtype) / tile_size
    centre = means2d / tile_size
    low = torch.minimum((centre - extent).floor().clamp(min=0).nan_to_num(0).long(), limits)
    high = torch.minimum((centre + extent).ceil().clamp(min=0).nan_to_num(0).long(), limits)
    size = torch.where((radii > 0).all(-1, keepdim=True), high - low, 0).reshape(-1, 2)
    nearest_first = torch.argsort(depths.reshape(-1), stable=True)
    per_splat = size.prod(-1)[nearest_first]
    splats = nearest_first.repeat_interleave(per_splat)
    starts = per_splat.cumsum(0) - per_splat
    rank = torch.arange(splats.numel(), device=depths.device) - starts.repeat_interleave(per_splat)
    width = size[splats, 0]
    low = low.reshape(-1, 2)[splats]
    tiles = (low[:, 1] + rank // width) * tile_width + low[:, 0] + rank % width
    tiles = tiles + splats // max(count, 1) * (tile_width * tile_height)
    tiles, order = torch.sort(tiles, stable=True)
    total = images * tile_height * tile_width
    lengths = torch.bincount(tiles, minlength=total)
    offsets = (lengths.cumsum(0) - lengths).int().view(images, tile_height, tile_width)
    return offsets, splats[order].int()


def iterate_tiles(
    isect_offsets: Tensor, num_intersections: int, width: int, height: int, tile_size: int
) -> Iterator[Tile]:
    """Every tile of every image, row by row."""
    images, tile_height, tile_width = isect_offsets.shape
    bounds = [*isect_offsets.reshape(-1).tolist(), num_intersections]
    for index in range(images * tile_height * tile_width):
        image, place = divmod(index, tile_height * tile_width)
        row, column = divmod(place, tile_width)
        top, left = row * tile_size, column * tile_size
        yield Tile(
            image,
            top,
            min(top + tile_size, height),
            left,
            min(left + tile_size, width),
            bounds[index],
            bounds[index + 1],
        )


def tile_alphas(tile: Tile, means2d: Tensor, conics: Tensor, opacities: Tensor) -> Tensor:
    """Opacity of splats at the tile's pixel centres: min(0.999, o exp(-sigma)), cut to 0 below 1/255.

    Args:
        means2d, conics, opacities: ``[n, 2]``, ``[n, 3]``, ``[n]``, the tile's splats front to back.

    Returns:
        ``[P, n]``, P pixels row by row.
    """
    ys = torch.arange(tile.top, tile.bottom, device=means2d.device, dtype=means2d.dtype) + 0.5
    xs = torch.arange(tile.left, tile.right, device=means2d.device, dtype=means2d.dtype) + 0.5
    dx = means2d[:, 0] - xs[:, None]
    dy = means2d[:, 1] - ys[:, None]
    along_x = 0.5 * conics[:, 0] * dx**2
    along_y = 0.5 * conics[:, 2] * dy**2
    across = conics[:, 1] * dx
    sigma = along_y[:, None] + along_x[None] + across[None] * dy[:, None]
    sigma = sigma.flatten(0, 1)
    alphas = (opacities * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
    return torch.where((sigma >= 0) & (alphas >= ALPHA_MIN), alphas, 0.0)

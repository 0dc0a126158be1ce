"""`rasterize_moments` as one Triton kernel; the torch twin is ``kernels.rasterize_moments_torch``.

A program owns some rows of one tile. It walks the tile's list front to back for the mean square transmittance
and the place where each pixel stops, then back to front with the recursion of `nerfstudio_phdropout.moments`:
nothing is stored but the result, 2 D + 2 floats a pixel (and D more with the covariance).
"""

# Jitted functions take no annotations but constexpr, and every argument by position.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nerfstudio_phdropout.moments import RenderMoments
from nerfstudio_phdropout.tiles import ALPHA_MAX, ALPHA_MIN, TRANSMITTANCE_MIN

# More channels than this go to further launches.
CHANNELS = 4
_ALPHA_MAX = tl.constexpr(ALPHA_MAX)
_ALPHA_MIN = tl.constexpr(ALPHA_MIN)
_SQUARE_MIN = tl.constexpr(TRANSMITTANCE_MIN**2)


@dataclass(frozen=True)
class LaunchShape:
    """Rows of a tile a program owns, splats an unrolled step takes, warps of a program."""

    rows: int = 4
    unroll: int = 8
    warps: int = 1


LAUNCH = LaunchShape()


@triton.jit
def _alpha(xy_ptr, conic_ptr, opacity_ptr, splat, valid, px, py):
    x = tl.load(xy_ptr + splat * 2, mask=valid, other=0.0) - px
    y = tl.load(xy_ptr + splat * 2 + 1, mask=valid, other=0.0) - py
    xx = tl.load(conic_ptr + splat * 3, mask=valid, other=0.0)
    xy = tl.load(conic_ptr + splat * 3 + 1, mask=valid, other=0.0)
    yy = tl.load(conic_ptr + splat * 3 + 2, mask=valid, other=0.0)
    opacity = tl.load(opacity_ptr + splat, mask=valid, other=0.0)
    sigma = 0.5 * (xx * x * x + yy * y * y) + xy * x * y
    alpha = tl.minimum(_ALPHA_MAX, opacity * tl.exp(-sigma))
    return tl.where((sigma >= 0.0) & (alpha >= _ALPHA_MIN), alpha, 0.0)


@triton.jit
def _channel(color_ptr, offset, valid, a, g, pq, q, t, mean, variance, covariance, COVARIANCE: tl.constexpr):
    d = a * (tl.load(color_ptr + offset, mask=valid, other=0.0) - mean)
    variance = g * variance + pq * d * d
    if COVARIANCE:
        covariance = g * covariance + pq * t * d
    return mean + q * d, variance, covariance


@triton.jit
def _moments_kernel(
    xy_ptr, conic_ptr, color_ptr, opacity_ptr, keep_ptr, background_ptr, offsets_ptr, ids_ptr,
    mean_ptr, variance_ptr, acc_ptr, acc_variance_ptr, covariance_ptr,
    num_ids, num_tiles, tile_width, width, height, keep_scalar,
    D: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    SCALAR: tl.constexpr, COVARIANCE: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = TILE // ROWS
    image = tl.program_id(1)
    tile = tl.program_id(0) // parts
    lane = tl.arange(0, ROWS * TILE)
    row = (tile // tile_width) * TILE + (tl.program_id(0) % parts) * ROWS + lane // TILE
    column = (tile % tile_width) * TILE + lane % TILE
    inside = (row < height) & (column < width)
    px = column.to(tl.float32) + 0.5
    py = row.to(tl.float32) + 0.5
    slot = image * num_tiles + tile
    start = tl.load(offsets_ptr + slot)
    last_slot = slot + 1 == tl.num_programs(1) * num_tiles
    end = tl.load(offsets_ptr + slot + 1, mask=slot + 1 < tl.num_programs(1) * num_tiles, other=0)
    end = tl.where(last_slot, num_ids, end)

    # Front to back: where does each pixel stop?
    square = tl.full((ROWS * TILE,), 1.0, tl.float32)
    done = row >= height
    done = done | (column >= width)
    stop = tl.full((ROWS * TILE,), 0, tl.int32) + start
    index = start
    alive = 1
    while (index < end) & (alive > 0):
        for step in tl.static_range(UNROLL):
            place = index + step
            valid = place < end
            splat = tl.load(ids_ptr + place, mask=valid, other=0)
            a = _alpha(xy_ptr, conic_ptr, opacity_ptr, splat, valid, px, py)
            if SCALAR:
                q = keep_scalar
            else:
                q = tl.load(keep_ptr + splat, mask=valid, other=1.0)
            following = square * (1.0 - q + q * (1.0 - a) * (1.0 - a))
            hit = a > 0.0
            done = done | (hit & (following <= _SQUARE_MIN))
            taken = hit & (done == 0)
            square = tl.where(taken, following, square)
            stop = tl.where(taken, place + 1, stop)
        index += UNROLL
        alive = tl.max(tl.where(done, 0, 1), axis=0)

    # Back to front: the centred recursion.
    zero = tl.zeros((ROWS * TILE,), dtype=tl.float32)
    v0, v1, v2, v3 = zero, zero, zero, zero
    k0, k1, k2, k3 = zero, zero, zero, zero
    m0 = zero + tl.load(background_ptr + image * STRIDE)
    m1, m2, m3 = zero, zero, zero
    if D > 1:
        m1 = zero + tl.load(background_ptr + image * STRIDE + 1)
    if D > 2:
        m2 = zero + tl.load(background_ptr + image * STRIDE + 2)
    if D > 3:
        m3 = zero + tl.load(background_ptr + image * STRIDE + 3)
    behind = zero + 1.0
    behind_variance = zero
    index = tl.max(stop, axis=0)
    while index > start:
        for step in tl.static_range(UNROLL):
            place = index - 1 - step
            valid = place >= start
            splat = tl.load(ids_ptr + place, mask=valid, other=0)
            a = _alpha(xy_ptr, conic_ptr, opacity_ptr, splat, valid, px, py)
            a = tl.where(place < stop, a, 0.0)
            if SCALAR:
                q = keep_scalar
            else:
                q = tl.load(keep_ptr + splat, mask=valid, other=1.0)
            p = 1.0 - q
            pq = p * q
            g = p + q * (1.0 - a) * (1.0 - a)
            t = -a * behind
            at = splat * STRIDE
            m0, v0, k0 = _channel(color_ptr, at, valid, a, g, pq, q, t, m0, v0, k0, COVARIANCE)
            if D > 1:
                m1, v1, k1 = _channel(color_ptr, at + 1, valid, a, g, pq, q, t, m1, v1, k1, COVARIANCE)
            if D > 2:
                m2, v2, k2 = _channel(color_ptr, at + 2, valid, a, g, pq, q, t, m2, v2, k2, COVARIANCE)
            if D > 3:
                m3, v3, k3 = _channel(color_ptr, at + 3, valid, a, g, pq, q, t, m3, v3, k3, COVARIANCE)
            behind_variance = g * behind_variance + pq * t * t
            behind = behind + q * t
        index -= UNROLL

    pixel = (image * height + row) * width + column
    tl.store(acc_ptr + pixel, 1.0 - behind, mask=inside)
    tl.store(acc_variance_ptr + pixel, behind_variance, mask=inside)
    out = pixel * STRIDE
    tl.store(mean_ptr + out, m0, mask=inside)
    tl.store(variance_ptr + out, v0, mask=inside)
    if COVARIANCE:
        tl.store(covariance_ptr + out, -k0, mask=inside)
    if D > 1:
        tl.store(mean_ptr + out + 1, m1, mask=inside)
        tl.store(variance_ptr + out + 1, v1, mask=inside)
        if COVARIANCE:
            tl.store(covariance_ptr + out + 1, -k1, mask=inside)
    if D > 2:
        tl.store(mean_ptr + out + 2, m2, mask=inside)
        tl.store(variance_ptr + out + 2, v2, mask=inside)
        if COVARIANCE:
            tl.store(covariance_ptr + out + 2, -k2, mask=inside)
    if D > 3:
        tl.store(mean_ptr + out + 3, m3, mask=inside)
        tl.store(variance_ptr + out + 3, v3, mask=inside)
        if COVARIANCE:
            tl.store(covariance_ptr + out + 3, -k3, mask=inside)


@torch.no_grad()
def rasterize_moments_triton(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    image_width: int,
    image_height: int,
    tile_size: int,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
    drop: float | Tensor,
    backgrounds: Tensor | None,
    covariance: bool,
    launch: LaunchShape = LAUNCH,
) -> RenderMoments:
    """`rasterize_moments` on float32 tensors of one device; not differentiable.

    Raises:
        TypeError: tensors of another type.
        ValueError: a tile size that is no power of two.
    """
    if means2d.dtype != torch.float32:
        raise TypeError(f"the Triton kernel is for float32, got {means2d.dtype}; use backend='torch'")
    if tile_size & (tile_size - 1):
        raise ValueError(f"the Triton kernel needs a tile size that is a power of two, got {tile_size}")
    images, count = opacities.shape
    channels = colors.shape[-1]
    if backgrounds is None:
        backgrounds = means2d.new_zeros(images, channels)
    if isinstance(drop, Tensor):
        scalar, keep_scalar = False, 1.0
        keep = (1 - drop.expand(images, count)).contiguous()
    else:
        scalar, keep_scalar, keep = True, 1.0 - drop, means2d
    means2d, conics, opacities = means2d.contiguous(), conics.contiguous(), opacities.contiguous()
    colors, backgrounds = colors.contiguous(), backgrounds.contiguous()
    shape = (images, image_height, image_width)
    mean, variance = means2d.new_empty(*shape, channels), means2d.new_empty(*shape, channels)
    shared = means2d.new_empty(*shape, channels) if covariance else mean
    accumulation, accumulation_variance = means2d.new_empty(shape), means2d.new_empty(shape)
    tile_height, tile_width = isect_offsets.shape[-2:]
    rows = min(launch.rows, tile_size)
    grid = (tile_height * tile_width * (tile_size // rows), images)
    for first in range(0, channels, CHANNELS):
        _moments_kernel[grid](
            means2d, conics, colors[..., first:], opacities, keep, backgrounds[:, first:],
            isect_offsets, flatten_ids,
            mean[..., first:], variance[..., first:],
            accumulation, accumulation_variance, shared[..., first:],
            flatten_ids.numel(), tile_height * tile_width, tile_width, image_width, image_height,
            keep_scalar,
            D=min(CHANNELS, channels - first), STRIDE=channels, TILE=tile_size, ROWS=rows,
            UNROLL=launch.unroll, SCALAR=scalar, COVARIANCE=covariance, num_warps=launch.warps,
        )  # fmt: skip
    return RenderMoments(mean, variance, accumulation, accumulation_variance, shared if covariance else None)

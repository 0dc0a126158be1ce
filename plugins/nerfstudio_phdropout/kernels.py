"""Exact moments of a rendering from tile lists: the torch implementation and the choice of a Triton twin.

Both follow the recursion of `nerfstudio_phdropout.moments`. The torch one takes a whole tile at once: with
prefix products T_i of 1 - q a and G_i of g, the mean behind splat i is what remains of the image,
divided by the transmittance in front, and V = sum_i G_{i-1} p q d_i^2.

A pixel stops at the first splat that would take the root mean square transmittance to 1e-4 or less; that
splat is left out. With ratio 0 this is gsplat's rule and the ordinary rendering. The mean transmittance would
not do: behind splats that are sometimes dropped it is as small as its mean square, and 1e-2 of sigma goes.
"""

# The signatures are gsplat's.
# ruff: noqa: PLR0917

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

from nerfstudio_phdropout.checks import check_floating, check_ratio
from nerfstudio_phdropout.moments import RenderMoments
from nerfstudio_phdropout.tiles import TRANSMITTANCE_MIN, iterate_tiles, tile_alphas


def rasterize_moments(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    image_width: int,
    image_height: int,
    tile_size: int,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
    dropout_ratio: float | Tensor,
    backgrounds: Tensor | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
    *,
    covariance: bool = True,
) -> RenderMoments:
    """Mean and variance of every pixel over independent dropout of splats.

    Arguments as `gsplat.rasterize_to_pixels`, and the drop ratio.

    Args:
        means2d, conics: ``[C, N, 2]`` pixels, ``[C, N, 3]`` upper triangle of the inverse 2-D covariance.
        colors: ``[C, N, D]``.
        opacities: ``[C, N]``.
        isect_offsets, flatten_ids: tile lists of `gsplat.isect_offset_encode`, `gsplat.isect_tiles`.
        dropout_ratio: scalar, ``[N]`` or ``[C, N]``, in [0, 1).
        backgrounds: ``[C, D]``; zeros if None.
        backend: ``auto`` takes Triton for float32 on CUDA, else torch (which alone is differentiable).
        covariance: give Cov[colour, accumulation] too.

    Returns:
        Moments with fields ``[C, H, W, D]`` and ``[C, H, W]``.

    Raises:
        ValueError: ratio outside [0, 1), shapes that do not fit, unknown backend.
        RuntimeError: Triton was asked for and cannot run here.
    """
    check_ratio(dropout_ratio)
    check_floating("means2d", means2d)
    images, count = opacities.shape
    for name, tensor, shape in (
        ("means2d", means2d, (images, count, 2)),
        ("conics", conics, (images, count, 3)),
        ("colors", colors[..., 0], (images, count)),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} from opacities [C, N]"
            )
    # A plain number stays one: a tensor of it on the device would have to be waited for.
    drop = dropout_ratio
    if isinstance(drop, Tensor):
        if drop.ndim and drop.shape not in ((count,), (images, count)):
            expected = f"a scalar, [{count}] or [{images}, {count}]"
            raise ValueError(f"dropout_ratio must be {expected}, got {list(drop.shape)}")
        drop = drop.to(means2d)
    arguments = (
        means2d, conics, colors, opacities, image_width, image_height, tile_size,
        isect_offsets, flatten_ids, drop, backgrounds, covariance,
    )  # fmt: skip
    if _use_triton(backend, means2d):
        from nerfstudio_phdropout.triton_kernels import rasterize_moments_triton

        return rasterize_moments_triton(*arguments)
    return rasterize_moments_torch(*arguments)


def _use_triton(backend: str, like: Tensor) -> bool:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if backend == "triton":
        if not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "backend='triton' needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported; "
                "use backend='torch' on a CPU"
            )
        return True
    return backend == "auto" and like.is_cuda and like.dtype == torch.float32 and not torch.is_grad_enabled()


def rasterize_moments_torch(
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
) -> RenderMoments:
    """`rasterize_moments` in torch, differentiable, one tile at a time."""
    images, count = opacities.shape
    channels = colors.shape[-1]
    fields: list[list[Tensor]] = []
    flat = (
        means2d.reshape(-1, 2),
        conics.reshape(-1, 3),
        opacities.reshape(-1),
        colors.reshape(-1, channels),
    )
    ratios = torch.as_tensor(drop, dtype=means2d.dtype, device=means2d.device)
    keep = (1 - ratios.expand(images, count)).reshape(-1)
    for tile in iterate_tiles(isect_offsets, flatten_ids.numel(), image_width, image_height, tile_size):
        ids = flatten_ids[tile.start : tile.stop].long()
        centres, shapes, opacity, color = (tensor[ids] for tensor in flat)
        background = color.new_zeros(channels) if backgrounds is None else backgrounds[tile.image]
        alphas = tile_alphas(tile, centres, shapes, opacity)
        fields.append(tile_moments(alphas, color, keep[ids], background))
    mean, variance, through, through_variance, negated = (
        assemble_tiles(list(parts), images, image_width, image_height, tile_size)
        for parts in zip(*fields, strict=True)
    )
    return RenderMoments(
        mean, variance, 1 - through[..., 0], through_variance[..., 0], -negated if covariance else None
    )


def stopped_transmittance(alphas: Tensor, keep: Tensor | float) -> tuple[Tensor, Tensor]:
    """Apply the stop rule.

    Args:
        alphas: ``[P, n]`` front to back.
        keep: ``[n]`` or scalar keep probability.

    Returns:
        Both ``[P, n]``: alphas, 0 from the stopping splat on, and the mean transmittance behind each splat.
    """
    drop = 1 - keep
    gain = drop + keep * (1 - alphas.detach()) ** 2
    active = torch.cumprod(gain, dim=-1) > TRANSMITTANCE_MIN**2
    alphas = torch.where(active, alphas, 0.0)
    return alphas, torch.cumprod(1 - keep * alphas, dim=-1)


def before(products: Tensor) -> Tensor:
    """``[P, n]`` prefix products -> ``[P, n]`` products of what comes before each entry."""
    return torch.cat([torch.ones_like(products[:, :1]), products[:, :-1]], dim=-1)


def tile_moments(alphas: Tensor, colors: Tensor, keep: Tensor, background: Tensor) -> list[Tensor]:
    """Mean, variance, transmittance, its variance, covariance with the colour; ``[P, D]``, ``[P, 1]``."""
    pixels, count = alphas.shape
    if count == 0:
        mean = background.expand(pixels, -1)
        zero, one = torch.zeros_like(mean), torch.ones_like(mean[:, :1])
        return [mean, zero, one, zero[:, :1], zero]
    alphas, behind = stopped_transmittance(alphas, keep)
    weights = keep * alphas * before(behind)
    final = behind[:, -1:]
    mean = weights @ colors + final * background
    drop = 1 - keep
    gain = torch.cumprod(drop + keep * (1 - alphas) ** 2, dim=-1)
    share = before(gain) * (drop * keep) * alphas**2
    weighted = weights[..., None] * colors
    behind_next = torch.cat([weighted[:, 1:], (final * background)[:, None]], dim=1)
    after = behind_next.flip(1).cumsum(1).flip(1)
    contrast = colors - after / behind[..., None]
    through = final / behind
    variance = torch.einsum("pn,pnd->pd", share, contrast**2)
    through_variance = (share * through**2).sum(-1, keepdim=True)
    covariance = -torch.einsum("pn,pnd->pd", share * through, contrast)
    return [mean, variance, final, through_variance, covariance]


def assemble_tiles(parts: list[Tensor], images: int, width: int, height: int, tile_size: int) -> Tensor:
    """Tiles ``[P, D]`` in the order of `iterate_tiles` -> ``[C, H, W, D]``."""
    tile_width, tile_height = -(-width // tile_size), -(-height // tile_size)
    rows = []
    for start in range(0, len(parts), tile_width):
        row = (start // tile_width) % tile_height
        lines = min(tile_size, height - row * tile_size)
        rows.append(
            torch.cat([t.reshape(lines, -1, t.shape[-1]) for t in parts[start : start + tile_width]], dim=1)
        )
    return torch.cat(rows).view(images, height, width, -1)

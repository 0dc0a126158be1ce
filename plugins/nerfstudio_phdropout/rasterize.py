"""Rendering of Gaussians with the arguments of `gsplat.rasterization`: the image, or its moments."""

# The signatures are gsplat's.
# ruff: noqa: PLR0917

from __future__ import annotations

import difflib
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from nerfstudio_phdropout import gsplat_backend
from nerfstudio_phdropout.geometry import Splats, torch_splats
from nerfstudio_phdropout.kernels import assemble_tiles, before, rasterize_moments, stopped_transmittance
from nerfstudio_phdropout.moments import RenderMoments
from nerfstudio_phdropout.tiles import iterate_tiles, tile_alphas

# Options of gsplat.rasterization that change how it works but not the image, and what else they may be.
_WITHOUT_EFFECT = {"packed", "sparse_grad", "channel_chunk", "segmented"}
_ONLY_DEFAULT = {
    "radius_clip": 0.0,
    "absgrad": False,
    "distributed": False,
    "camera_model": "pinhole",
    "covars": None,
    "with_ut": False,
    "with_eval3d": False,
}
_RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
_MANY_GAUSSIANS = 200_000


def rasterization(
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
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"] = "RGB",
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    **gsplat_options: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`gsplat.rasterization` on any device: gsplat's kernels on CUDA, else differentiable torch.

    Args:
        means, quats, scales: ``[N, 3]``, ``[N, 4]`` (wxyz, any norm), ``[N, 3]``.
        opacities: ``[N]`` in [0, 1].
        colors: ``[N, D]`` or ``[C, N, D]``; with ``sh_degree`` coefficients ``[N, K, 3]``.
        viewmats: ``[C, 4, 4]`` world to camera (x right, y down, z forward).
        Ks: ``[C, 3, 3]`` intrinsics in pixels.
        backgrounds: ``[C, D]``; zeros if None.
        gsplat_options: further options of gsplat; those the torch path cannot honour are refused there.

    Returns:
        Image ``[C, H, W, D (+ 1)]``, accumulation ``[C, H, W, 1]`` and a dictionary: means2d, radii, depths,
        conics, opacities, width, height, n_cameras, tile lists: what gsplat's strategies need (packed=False).

    Raises:
        ValueError: an option, mode or shape that the torch path does not know.
    """
    _check_modes(render_mode, rasterize_mode)
    if means.is_cuda and gsplat_backend.gsplat_found():
        return gsplat_backend.rasterization(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height,
            near_plane=near_plane, far_plane=far_plane, eps2d=eps2d, sh_degree=sh_degree, tile_size=tile_size,
            backgrounds=backgrounds, render_mode=render_mode, rasterize_mode=rasterize_mode, **gsplat_options,
        )  # fmt: skip
    _check_options(gsplat_options)
    _check_shapes(means, quats, scales, opacities, viewmats, Ks)
    splats = torch_splats(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=near_plane,
        far_plane=far_plane, eps2d=eps2d, sh_degree=sh_degree, tile_size=tile_size,
        antialiased=rasterize_mode == "antialiased",
    )  # fmt: skip
    channels, backgrounds = _with_depth(splats, backgrounds, render_mode)
    image, accumulation = _render(splats, channels, backgrounds, width, height, tile_size)
    if render_mode in ("ED", "RGB+ED"):
        depth = image[..., -1:] / accumulation.clamp(min=1e-10)
        image = torch.cat([image[..., :-1], depth], dim=-1)
    return image, accumulation, _info(splats, width, height, tile_size)


def rasterization_moments(
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
    backend: Literal["auto", "triton", "torch"] = "auto",
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: Literal["RGB", "RGB+D"] = "RGB",
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    **gsplat_options: Any,
) -> tuple[RenderMoments, dict[str, Any]]:
    """Mean and variance of `rasterization` under independent dropout of Gaussians: one pass, no noise.

    Arguments as `rasterization`, and:

    Args:
        dropout_ratio: scalar or ``[N]``, in [0, 1).
        backend: see `rasterize_moments`.
        render_mode: ``RGB+D`` adds the accumulated depth as the last channel, and the covariance that
            `expected_depth_moments` needs.

    Returns:
        Moments with fields ``[C, H, W, D (+ 1)]`` and ``[C, H, W]``, and the dictionary of `rasterization`.

    Raises:
        ValueError: a ratio outside [0, 1), or an unknown option, mode or shape.
    """
    if render_mode not in ("RGB", "RGB+D"):
        raise ValueError(
            f"render_mode of rasterization_moments must be 'RGB' or 'RGB+D', got {render_mode!r}"
        )
    _check_modes(render_mode, rasterize_mode)
    _check_options(gsplat_options)
    _check_shapes(means, quats, scales, opacities, viewmats, Ks)
    splats = prepare_splats(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=near_plane,
        far_plane=far_plane, eps2d=eps2d, sh_degree=sh_degree, tile_size=tile_size,
        rasterize_mode=rasterize_mode, on_torch=backend == "torch",
    )  # fmt: skip
    channels, backgrounds = _with_depth(splats, backgrounds, render_mode)
    moments = rasterize_moments(
        splats.means2d, splats.conics, channels, splats.opacities, width, height, tile_size,
        splats.isect_offsets, splats.flatten_ids, dropout_ratio, backgrounds, backend,
        covariance=render_mode == "RGB+D",
    )  # fmt: skip
    return moments, _info(splats, width, height, tile_size)


def prepare_splats(
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
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    tile_size: int = 16,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    on_torch: bool = False,
    **_rendering: Any,
) -> Splats:
    """What a rasterizer needs, by gsplat's kernels on CUDA where it is installed, else by torch.

    Arguments as `rasterization`; those that concern rendering alone are ignored.

    Args:
        on_torch: do not use gsplat.
    """
    on_gsplat = means.is_cuda and gsplat_backend.gsplat_found() and not on_torch
    prepare = gsplat_backend.gsplat_splats if on_gsplat else torch_splats
    return prepare(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=near_plane,
        far_plane=far_plane, eps2d=eps2d, sh_degree=sh_degree, tile_size=tile_size,
        antialiased=rasterize_mode == "antialiased",
    )  # fmt: skip


def expected_depth_moments(moments: RenderMoments) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the expected depth D / A, from moments rendered with ``RGB+D``.

    First order (delta method): Var[D/A] = (Var D - 2 r Cov(D, A) + r^2 Var A) / E[A]^2 with r = E[D] / E[A].

    Returns:
        Two tensors ``[C, H, W]``; both 0 where nothing is accumulated.

    Raises:
        ValueError: moments without covariance.
    """
    if moments.covariance is None or moments.accumulation is None or moments.accumulation_variance is None:
        raise ValueError("moments hold no covariance with the accumulation; render with render_mode='RGB+D'")
    total = moments.accumulation.clamp(min=1e-10)
    ratio = moments.mean[..., -1] / total
    spread = (
        moments.variance[..., -1]
        - 2 * ratio * moments.covariance[..., -1]
        + ratio**2 * moments.accumulation_variance
    )
    shown = moments.accumulation > 0
    return torch.where(shown, ratio, 0.0), torch.where(shown, spread.clamp(min=0).sqrt() / total, 0.0)


def _render(
    splats: Splats, channels: Tensor, backgrounds: Tensor | None, width: int, height: int, tile_size: int
) -> tuple[Tensor, Tensor]:
    images, depth = channels.shape[0], channels.shape[-1]
    means2d, conics = splats.means2d.reshape(-1, 2), splats.conics.reshape(-1, 3)
    opacities, colors = splats.opacities.reshape(-1), channels.reshape(-1, depth)
    parts, coverage = [], []
    for tile in iterate_tiles(splats.isect_offsets, splats.flatten_ids.numel(), width, height, tile_size):
        background = colors.new_zeros(depth) if backgrounds is None else backgrounds[tile.image]
        if tile.start == tile.stop:
            pixels = (tile.bottom - tile.top) * (tile.right - tile.left)
            parts.append(background.expand(pixels, depth))
            coverage.append(colors.new_zeros(pixels, 1))
            continue
        ids = splats.flatten_ids[tile.start : tile.stop].long()
        alphas = tile_alphas(tile, means2d[ids], conics[ids], opacities[ids])
        alphas, behind = stopped_transmittance(alphas, 1.0)
        parts.append((alphas * before(behind)) @ colors[ids] + behind[:, -1:] * background)
        coverage.append(1 - behind[:, -1:])
    return (
        assemble_tiles(parts, images, width, height, tile_size),
        assemble_tiles(coverage, images, width, height, tile_size),
    )


def _with_depth(splats: Splats, backgrounds: Tensor | None, render_mode: str) -> tuple[Tensor, Tensor | None]:
    """Channels to composite for a render mode, and the background with a zero for the depth."""
    if render_mode == "RGB":
        return splats.colors, backgrounds
    depth = splats.depths[..., None]
    if render_mode in ("D", "ED"):
        return depth, None
    if backgrounds is not None:
        backgrounds = torch.cat([backgrounds, torch.zeros_like(backgrounds[..., :1])], dim=-1)
    return torch.cat([splats.colors, depth], dim=-1), backgrounds


def _info(splats: Splats, width: int, height: int, tile_size: int) -> dict[str, Any]:
    offsets = splats.isect_offsets
    return {
        "means2d": splats.means2d,
        "radii": splats.radii,
        "depths": splats.depths,
        "conics": splats.conics,
        "opacities": splats.opacities,
        "gaussian_ids": None,
        "camera_ids": None,
        "width": width,
        "height": height,
        "n_cameras": offsets.shape[0],
        "tile_size": tile_size,
        "tile_width": offsets.shape[2],
        "tile_height": offsets.shape[1],
        "isect_offsets": offsets,
        "flatten_ids": splats.flatten_ids,
    }


def _check_modes(render_mode: str, rasterize_mode: str) -> None:
    if render_mode not in _RENDER_MODES:
        raise ValueError(f"render_mode must be one of {', '.join(_RENDER_MODES)}, got {render_mode!r}")
    if rasterize_mode not in ("classic", "antialiased"):
        raise ValueError(f"rasterize_mode must be 'classic' or 'antialiased', got {rasterize_mode!r}")


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _ONLY_DEFAULT:
            near = difflib.get_close_matches(name, [*_WITHOUT_EFFECT, *_ONLY_DEFAULT], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"unknown option '{name}'{hint}")
        if value != _ONLY_DEFAULT[name]:
            raise ValueError(
                f"{name}={value!r} needs gsplat's CUDA kernels; here only {_ONLY_DEFAULT[name]!r}"
            )


def _check_shapes(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, viewmats: Tensor, Ks: Tensor
) -> None:
    count, images = means.shape[0], viewmats.shape[0]
    if opacities is None:
        raise ValueError("opacities are missing; dropout acts on them, so sigma would be 0 without")
    for name, tensor, shape in (
        ("means", means, (count, 3)),
        ("quats", quats, (count, 4)),
        ("scales", scales, (count, 3)),
        ("opacities", opacities, (count,)),
        ("viewmats", viewmats, (images, 4, 4)),
        ("Ks", Ks, (images, 3, 3)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if count > _MANY_GAUSSIANS and not (means.is_cuda and gsplat_backend.gsplat_found()):
        warnings.warn(
            f"{count} Gaussians on the torch rasterizer are slow; on a GPU install gsplat "
            "(pip install --no-deps gsplat==1.5.3)",
            RuntimeWarning,
            stacklevel=3,
        )

"""Everything that is taken from gsplat (>= 1.5, CUDA only).

No function of gsplat is touched for CPU tensors: its wrappers compile as soon as a CUDA compiler is present.
"""

# The signatures are gsplat's.
# ruff: noqa: PLR0917

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nerfstudio_phdropout.geometry import Splats


@lru_cache(maxsize=1)
def gsplat_found() -> bool:
    """Whether gsplat is installed, with the two-dimensional radii of 1.5 and later."""
    if find_spec("gsplat") is None:
        return False
    import gsplat

    return hasattr(gsplat, "rasterize_to_pixels_eval3d")


def rasterization(*args: Any, **options: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`gsplat.rasterization`, unpacked by default: packed, gsplat 1.5.3 refuses backgrounds ``[C, D]``."""
    import gsplat

    return gsplat.rasterization(*args, **{"packed": False, **options})


@torch.no_grad()
def gsplat_splats(
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
    """The same as `geometry.torch_splats`, by gsplat's CUDA kernels."""
    import gsplat

    radii, means2d, depths, conics, compensations = gsplat.fully_fused_projection(
        means, None, quats, scales, viewmats, Ks, width, height, eps2d=eps2d, packed=False,
        near_plane=near_plane, far_plane=far_plane, calc_compensations=antialiased, opacities=opacities,
    )  # fmt: skip
    images, count = viewmats.shape[0], means.shape[0]
    opacity = opacities.expand(images, count)
    if compensations is not None:
        opacity = opacity * compensations
    if sh_degree is None:
        shown = colors.expand(images, count, colors.shape[-1])
    else:
        centres = torch.inverse(viewmats)[:, :3, 3]
        coefficients = colors.expand(images, *colors.shape[-3:])
        visible = (radii > 0).all(dim=-1)
        shown = gsplat.spherical_harmonics(sh_degree, means - centres[:, None], coefficients, masks=visible)
        shown = (shown + 0.5).clamp(min=0)
    tile_width, tile_height = -(-width // tile_size), -(-height // tile_size)
    _, isect_ids, flatten_ids = gsplat.isect_tiles(means2d, radii, depths, tile_size, tile_width, tile_height)
    offsets = gsplat.isect_offset_encode(isect_ids, images, tile_width, tile_height)
    return Splats(means2d, conics, opacity, depths, radii, shown, offsets, flatten_ids)

"""What needs a CUDA device: the compiled kernel against its twin and gsplat, and masks across devices."""

from __future__ import annotations

import pytest
import torch
from splat_scenes import random_gaussians

from nerfstudio_phdropout import drop_uniforms, rasterization, rasterization_moments, rasterize_moments
from nerfstudio_phdropout.kernels import assemble_tiles
from nerfstudio_phdropout.surfels import rasterization_2dgs_moments
from nerfstudio_phdropout.tiles import iterate_tiles, tile_alphas

pytestmark = pytest.mark.gpu


def gaussians(count: int) -> dict:
    scene = random_gaussians(count, seed=1, dtype=torch.float32)
    scene["Ks"][0, :2] *= 4
    return {name: tensor.cuda() for name, tensor in scene.items()} | {"width": 160, "height": 121}


def settled_pixels(info: dict, keep: torch.Tensor | float) -> torch.Tensor:
    """``[H, W]``: no splat's opacity is within rounding of the cut at 1/255, nor a pixel's stop of its limit.

    At such a pixel two correct float32 kernels may count a splat or not; computed in float64.
    """
    rows = []
    values = [info[name].double() for name in ("means2d", "conics", "opacities")]
    count, size = info["flatten_ids"].numel(), info["tile_size"]
    for tile in iterate_tiles(info["isect_offsets"], count, 160, 121, size):
        ids = info["flatten_ids"][tile.start : tile.stop].long()
        alphas = tile_alphas(tile, *(value[0][ids] for value in values))
        raw = tile_alphas(tile, values[0][0][ids], values[1][0][ids], values[2][0][ids] * 1.01) / 1.01
        q = keep if isinstance(keep, float) else keep.double()[ids]
        square = torch.cumprod(1 - q + q * (1 - alphas) ** 2, dim=-1)
        doubtful = ((raw * 255 - 1).abs() < 2e-5) | ((square / 1e-8 - 1).abs() < 1e-3)
        rows.append(~doubtful.any(-1, keepdim=True))
    return assemble_tiles(rows, 1, 160, 121, size)[0, ..., 0]


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.05, "each"])
def test_ph02_compiled_kernel_equals_its_twin(ratio):
    scene = gaussians(2000)
    drop = torch.rand(2000, device="cuda") * 0.8 if ratio == "each" else ratio
    background = torch.tensor([[0.1, 0.5, 0.9]], device="cuda")
    options = {**scene, "dropout_ratio": drop, "render_mode": "RGB+D", "backgrounds": background}
    triton, info = rasterization_moments(**options, backend="triton")
    # The twin gets the same projection and tile lists: only the kernels differ.
    channels = torch.cat([scene["colors"].expand(1, -1, -1), info["depths"][..., None]], dim=-1)
    behind = torch.nn.functional.pad(background, (0, 1))
    twin = rasterize_moments(
        info["means2d"], info["conics"], channels, info["opacities"], 160, 121, info["tile_size"],
        info["isect_offsets"], info["flatten_ids"], drop, behind, "torch",
    )  # fmt: skip
    settled = settled_pixels(info, 1 - drop)
    assert float(settled.float().mean()) > 0.98
    for field in ("mean", "accumulation"):
        torch.testing.assert_close(
            getattr(triton, field)[0][settled], getattr(twin, field)[0][settled], rtol=1e-4, atol=1e-5
        )
    for field in ("std", "accumulation_std"):
        torch.testing.assert_close(
            getattr(triton, field)[0][settled], getattr(twin, field)[0][settled], rtol=1e-3, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_ph02_ph03_zero_ratio_equals_gsplat(mode):
    gsplat = pytest.importorskip("gsplat")
    scene = gaussians(2000)
    image, alphas, _ = gsplat.rasterization(**scene, packed=False, rasterize_mode=mode)
    moments, _ = rasterization_moments(**scene, dropout_ratio=0.0, rasterize_mode=mode)
    torch.testing.assert_close(moments.mean, image, rtol=0, atol=1e-4)
    torch.testing.assert_close(moments.accumulation, alphas[..., 0], rtol=0, atol=1e-4)
    assert float(moments.variance.max()) == 0.0


@torch.no_grad()
def test_ph03_backgrounds_by_gsplat_are_what_shows_through():
    pytest.importorskip("gsplat")
    scene = gaussians(500)
    background = torch.tensor([[0.1, 0.5, 0.9]], device="cuda")
    plain, alphas, _ = rasterization(**scene)
    image, _, _ = rasterization(**scene, backgrounds=background)
    torch.testing.assert_close(image, plain + (1 - alphas) * background, rtol=0, atol=1e-5)
    moments, _ = rasterization_moments(**scene, backgrounds=background, dropout_ratio=0.0)
    torch.testing.assert_close(moments.mean, image, rtol=0, atol=1e-4)


@torch.no_grad()
def test_ph18_zero_ratio_equals_gsplats_2dgs():
    gsplat = pytest.importorskip("gsplat")
    scene = gaussians(500)
    # Unlike its 3-D sibling, gsplat's function takes colours only with the cameras' dimension.
    image, alphas = gsplat.rasterization_2dgs(**scene | {"colors": scene["colors"].expand(1, -1, -1)})[:2]
    moments = rasterization_2dgs_moments(**scene, dropout_ratio=0.0)
    # Rounding at the cut of 1/255 moves single pixels; see `settled_pixels`.
    gap = (moments.mean - image).abs().amax(-1)
    assert float((gap < 1e-4).float().mean()) > 0.995
    assert float(gap.max()) < 2e-2
    assert float(((moments.accumulation - alphas[..., 0]).abs() < 1e-4).float().mean()) > 0.995


def test_ph06_masks_are_bitwise_equal_across_devices():
    for start in (0, 2**32 - 100):
        here = drop_uniforms(1000, seed=1, trial=2, stream=3, start=start)
        assert torch.equal(
            here, drop_uniforms(1000, seed=1, trial=2, stream=3, start=start, device="cuda").cpu()
        )

"""Cases of the Triton kernel against its torch twin; test_kernels.py runs them under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from splat_scenes import random_gaussians

from nerfstudio_phdropout import rasterization_moments
from nerfstudio_phdropout.kernels import rasterize_moments, rasterize_moments_torch
from nerfstudio_phdropout.triton_kernels import LaunchShape, rasterize_moments_triton

FIELDS = ("mean", "accumulation", "std", "accumulation_std")


def both(count, width, height, ratio, *, channels=3, covariance=True, seed=0, opaque=False):
    tile_size = 8
    scene = random_gaussians(count, seed=seed, dtype=torch.float32)
    scene["Ks"][0, :2] *= width / 40
    if opaque:
        scene["opacities"] = scene["opacities"].clamp(min=0.9)
        scene["scales"] = scene["scales"] + 0.3
    _, info = rasterization_moments(
        **scene, width=width, height=height, tile_size=tile_size, dropout_ratio=0.0
    )
    colors = torch.rand(1, count, channels, generator=torch.Generator().manual_seed(seed))
    arguments = (
        info["means2d"], info["conics"], colors, info["opacities"], width, height, tile_size,
        info["isect_offsets"], info["flatten_ids"], ratio, torch.rand(1, channels),
        covariance,
    )  # fmt: skip
    return arguments, info


def compare(arguments, **options):
    triton, twin = rasterize_moments_triton(*arguments, **options), rasterize_moments_torch(*arguments)
    for field in FIELDS:
        rtol = 1e-3 if "std" in field else 0
        torch.testing.assert_close(getattr(triton, field), getattr(twin, field), rtol=rtol, atol=1e-5)
    if arguments[-1]:
        torch.testing.assert_close(triton.covariance, twin.covariance, rtol=1e-3, atol=1e-6)
    else:
        assert triton.covariance is None
    return triton


@pytest.mark.parametrize("size", [(40, 13), (16, 16), (7, 5)])
def test_ph02_ragged_and_empty_tiles(size):
    arguments, info = both(4, *size, 0.2)
    compare(arguments)
    if size == (40, 13):
        lengths = info["isect_offsets"].flatten().diff()
        assert int(lengths.min()) == 0


def test_ph02_ratio_of_each_gaussian_and_no_covariance():
    ratios = torch.linspace(0, 0.9, 30)
    compare(both(30, 16, 12, ratios, covariance=False)[0])


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_ph02_any_number_of_channels(channels):
    compare(both(15, 10, 9, 0.1, channels=channels)[0])


def test_ph02_stops_where_the_twin_stops():
    arguments, info = both(70, 12, 10, 0.02, opaque=True, seed=3)
    assert info["flatten_ids"].numel() > 70
    result = compare(arguments)
    assert float(result.accumulation.max()) > 0.999


@pytest.mark.parametrize("launch", [LaunchShape(8, 1, 1), LaunchShape(2, 8, 1), LaunchShape(4, 3, 2)])
def test_ph02_every_launch_shape(launch):
    compare(both(25, 11, 9, 0.1)[0], launch=launch)


def test_ph02_zero_ratio_has_no_variance():
    result = compare(both(20, 12, 10, 0.0)[0])
    assert float(result.variance.abs().max()) == 0.0
    assert float(result.accumulation_variance.abs().max()) == 0.0


def test_ph02_public_function_reaches_the_kernel_and_refuses_float64():
    arguments, _ = both(10, 9, 8, 0.1)
    through = rasterize_moments(*arguments[:11], backend="triton")
    direct = rasterize_moments_triton(*arguments)
    assert torch.equal(through.variance, direct.variance)
    doubled = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    with pytest.raises(TypeError, match=r"float32, got torch\.float64"):
        rasterize_moments_triton(*doubled)
    with pytest.raises(ValueError, match="power of two, got 12"):
        rasterize_moments_triton(*[12 if i == 6 else a for i, a in enumerate(arguments)])

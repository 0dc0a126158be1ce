"""2-D Gaussian splatting: alphas against rays met with planes, moments against every mask."""

from __future__ import annotations

import pytest
import torch
from splat_scenes import enumerate_masks, random_gaussians
from torch import Tensor

from nerfstudio_phdropout.surfels import rasterization_2dgs_moments

WIDTH, HEIGHT, COUNT = 20, 18, 6


@pytest.fixture(scope="module")
def scene() -> dict[str, Tensor]:
    scene = random_gaussians(COUNT, seed=5)
    scene["Ks"] = torch.tensor([[[20.0, 0, 10.2], [0, 21.0, 9.0], [0, 0, 1]]], dtype=torch.float64)
    return scene


@pytest.fixture(scope="module")
def met_by_rays(scene: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Opacity of every surfel at every pixel, nearest first ``[H, W, N]``, by solving for the point hit."""
    view, K = scene["viewmats"][0], scene["Ks"][0]
    centres = scene["means"] @ view[:3, :3].T + view[:3, 3]
    order = torch.argsort(centres[:, 2])
    layers = []
    for i in order.tolist():
        w, x, y, z = (scene["quats"][i] / scene["quats"][i].norm()).tolist()
        tangent_u = torch.tensor([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)])
        tangent_v = torch.tensor([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)])
        u = view[:3, :3] @ tangent_u.double() * scene["scales"][i, 0]
        v = view[:3, :3] @ tangent_v.double() * scene["scales"][i, 1]
        # The outline's centre: middle of the extremes of the projected unit circle.
        angles = torch.linspace(0, 2 * torch.pi, 8001, dtype=torch.float64)
        circle = centres[i] + torch.cos(angles)[:, None] * u + torch.sin(angles)[:, None] * v
        outline = (circle @ K.T)[:, :2] / circle[:, 2:]
        middle = (outline.amax(0) + outline.amin(0)) / 2
        layer = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
        for row in range(HEIGHT):
            for column in range(WIDTH):
                pixel = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64)
                ray = torch.linalg.solve(K, torch.cat([pixel, pixel.new_ones(1)]))
                # centre + a u + b v = t ray
                a, b, _t = torch.linalg.solve(torch.stack([u, v, -ray], dim=1), -centres[i]).tolist()
                flat, blur = a * a + b * b, 2 * float(((pixel - middle) ** 2).sum())
                alpha = min(float(scene["opacities"][i]) * torch.tensor(-0.5 * min(flat, blur)).exp(), 0.999)
                layer[row, column] = alpha if alpha >= 1 / 255 else 0.0
        layers.append(layer)
    return torch.stack(layers, dim=-1), order


def test_ph18_moments_equal_the_enumeration_of_every_mask(scene, met_by_rays):
    background = torch.tensor([0.3, 0.1, 0.7], dtype=torch.float64)
    drop = torch.linspace(0.05, 0.6, COUNT, dtype=torch.float64)
    found = rasterization_2dgs_moments(
        **scene, width=WIDTH, height=HEIGHT, dropout_ratio=drop, backgrounds=background[None]
    )
    alphas, order = met_by_rays
    assert float(alphas.max()) > 0.3
    for row in range(0, HEIGHT, 3):
        for column in range(0, WIDTH, 3):
            expected = enumerate_masks(alphas[row, column], scene["colors"][order], drop[order], background)
            for name, value in expected.items():
                actual = getattr(found, name)[0, row, column]
                torch.testing.assert_close(
                    actual, value, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_ph18_zero_ratio_is_the_plain_rendering_and_gradients_flow(scene, met_by_rays):
    plain = rasterization_2dgs_moments(**scene, width=WIDTH, height=HEIGHT, dropout_ratio=0.0)
    assert float(plain.variance.max()) == 0
    alphas, order = met_by_rays
    through = torch.cumprod(torch.cat([torch.ones_like(alphas[..., :1]), 1 - alphas], dim=-1), dim=-1)
    image = ((through[..., :-1] * alphas)[..., None] * scene["colors"][order]).sum(-2)
    torch.testing.assert_close(plain.mean[0], image, rtol=0, atol=2e-6)
    means = scene["means"].clone().requires_grad_()
    moved = {**scene, "means": means}
    rasterization_2dgs_moments(
        **moved, width=WIDTH, height=HEIGHT, dropout_ratio=0.2
    ).variance.sum().backward()
    assert float(means.grad.abs().max()) > 0


def test_ph18_bad_input_is_refused(scene):
    with pytest.raises(ValueError, match=r"dropout_ratio must lie in \[0, 1\), got 1.5"):
        rasterization_2dgs_moments(**scene, width=8, height=8, dropout_ratio=1.5)
    with pytest.raises(ValueError, match=r"opacities has shape \[6, 1\], expected \[6\]"):
        rasterization_2dgs_moments(
            **{**scene, "opacities": scene["opacities"][:, None]}, width=8, height=8, dropout_ratio=0.1
        )

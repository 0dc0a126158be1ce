"""Fisher information of splats against automatic differentiation of a dense rendering."""

from __future__ import annotations

import pytest
import torch
from splat_scenes import random_gaussians
from torch import Tensor

from nerfstudio_phdropout import rasterization_moments
from nerfstudio_phdropout.geometry import project
from nerfstudio_phdropout.information import (
    SplatInformation,
    add_information,
    displacement_std,
    information_variance,
    ratios_from_information,
)

WIDTH, HEIGHT = 21, 17
BACKGROUND = torch.tensor([[0.2, 0.4, 0.9]], dtype=torch.float64)


@pytest.fixture(scope="module")
def scene() -> dict[str, Tensor]:
    """Few enough for dense Jacobians; not so opaque that a pixel stops early."""
    scene = random_gaussians(7, seed=3)
    scene["Ks"] = torch.tensor([[[22.0, 0, 10.2], [0, 21.0, 8.0], [0, 0, 1]]], dtype=torch.float64)
    scene["opacities"] = scene["opacities"] * 0.8
    return scene


@pytest.fixture(scope="module")
def jacobian(scene) -> dict[str, Tensor]:
    """Dense derivatives ``[H * W * 3, parameters]`` by autograd, the 2-D shapes held fixed."""
    view, Ks = scene["viewmats"], scene["Ks"]
    projected = project(
        scene["means"], scene["quats"], scene["scales"], scene["opacities"], view, Ks, WIDTH, HEIGHT,
        0.01, 1e10, 0.3, False,
    )  # fmt: skip
    conics, depths = projected[1][0], projected[3][0]
    order = torch.argsort(depths)
    rows, columns = (torch.arange(size, dtype=torch.float64) + 0.5 for size in (HEIGHT, WIDTH))
    ys, xs = torch.meshgrid(rows, columns, indexing="ij")

    def render(means: Tensor, logits: Tensor, colors: Tensor) -> Tensor:
        points = means @ view[0, :3, :3].T + view[0, :3, 3]
        u = Ks[0, 0, 0] * points[:, 0] / points[:, 2] + Ks[0, 0, 2]
        v = Ks[0, 1, 1] * points[:, 1] / points[:, 2] + Ks[0, 1, 2]
        image, through = torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.float64), torch.ones_like(xs)
        for i in order.tolist():
            dx, dy = u[i] - xs, v[i] - ys
            a, b, c = conics[i]
            alpha = torch.sigmoid(logits[i]) * torch.exp(-0.5 * (a * dx**2 + 2 * b * dx * dy + c * dy**2))
            alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
            image = image + (through * alpha)[..., None] * colors[i]
            through = through * (1 - alpha)
        return (image + through[..., None] * BACKGROUND[0]).reshape(-1)

    inputs = (scene["means"], torch.logit(scene["opacities"]), scene["colors"])
    found = torch.autograd.functional.jacobian(render, inputs, vectorize=True)
    return dict(zip(("position", "opacity", "color"), found, strict=True))


def measured(scene: dict[str, Tensor]) -> SplatInformation:
    information = SplatInformation.zeros(7, like=scene["means"])
    add_information(information, **scene, width=WIDTH, height=HEIGHT, backgrounds=BACKGROUND)
    return information


def test_ph20_information_is_the_sum_of_squared_derivatives(scene, jacobian):
    information = measured(scene)
    torch.testing.assert_close(
        information.opacity, jacobian["opacity"].square().sum(0), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        information.position, jacobian["position"].square().sum(0), rtol=1e-9, atol=1e-12
    )
    # Each channel answers to its own colour only, with the same weight.
    torch.testing.assert_close(
        information.color[:, None].expand(-1, 3), jacobian["color"].square().sum(0), rtol=1e-9, atol=1e-12
    )
    assert information.pixels == WIDTH * HEIGHT


def test_ph20_variance_is_the_information_a_pixel_would_add(scene, jacobian):
    information = measured(scene)
    found = information_variance(
        information, **scene, width=WIDTH, height=HEIGHT, backgrounds=BACKGROUND, prior=0.3
    )
    expected = (jacobian["opacity"].square() / (information.opacity + 0.3)).sum(-1)
    expected += (jacobian["position"].square() / (information.position + 0.3)).sum((-1, -2))
    expected += (jacobian["color"].square() / (information.color[:, None] + 0.3)).sum((-1, -2))
    torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-9, atol=1e-12)


def test_ph20_views_add_up_and_displacements_shrink(scene):
    once = measured(scene)
    twice = measured(scene)
    add_information(twice, **scene, width=WIDTH, height=HEIGHT, backgrounds=BACKGROUND)
    torch.testing.assert_close(twice.position, 2 * once.position)
    expected = (1 / (2 * once.position / once.pixels + 2e-3)).sum(-1).sqrt()
    torch.testing.assert_close(displacement_std(once, prior=1e-3), expected)
    assert bool((displacement_std(once) > 0).all())


def test_ph20_ratios_have_the_mean_asked_for_and_fall_with_what_is_seen(scene):
    information = SplatInformation.zeros(1000, like=scene["means"])
    information.color = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    ratios = ratios_from_information(information, 0.07)
    assert float(ratios.mean()) == pytest.approx(0.07, abs=1e-6)
    assert 0 <= float(ratios.min()) < float(ratios.max()) <= 0.9
    order = torch.argsort(information.color)
    assert bool((ratios[order].diff() <= 1e-12).all())
    information.color[:10] = 0
    assert float(ratios_from_information(information, 0.07)[:10].min()) == pytest.approx(0.9)
    one = measured(scene)
    moments, _ = rasterization_moments(
        **scene, width=WIDTH, height=HEIGHT, dropout_ratio=ratios_from_information(one, 0.1)
    )
    assert float(moments.std.max()) > 0


def test_ph20_bad_input_is_refused(scene):
    empty = SplatInformation.zeros(7, like=scene["means"])
    with pytest.raises(ValueError, match="no view has been added"):
        displacement_std(empty)
    with pytest.raises(ValueError, match="prior must be positive, got 0"):
        displacement_std(measured(scene), prior=0)
    with pytest.raises(ValueError, match="prior must be positive, got -1"):
        information_variance(empty, **scene, width=WIDTH, height=HEIGHT, prior=-1)
    for ratio, top in ((0.9, 0.9), (-0.1, 0.9), (0.1, 1.0)):
        with pytest.raises(ValueError, match=r"need 0 <= mean_ratio < max_ratio < 1"):
            ratios_from_information(empty, ratio, max_ratio=top)

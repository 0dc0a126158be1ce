"""The grid of displacements against a Jacobian by automatic differentiation."""

from __future__ import annotations

import pytest
import torch

from nerfstudio_phdropout.deformation import DeformationGrid

SIDE, RAYS, SAMPLES, CHANNELS = 4, 5, 6, 3


@pytest.fixture
def rays():
    """Points of which several share vertices, and a colour that is any smooth function of moved points."""
    torch.manual_seed(0)
    points = torch.rand(RAYS, SAMPLES, 3)
    points[:, 1] = points[:, 0] + 1e-3
    points[0, 0], points[0, 2] = 0.0, 1.0
    mix = torch.randn(CHANNELS, SAMPLES, 3)
    return points, lambda moved: torch.einsum("rsk,csk->cr", torch.sin(3 * moved), mix)


def dense_weights(points):
    """``[R, S, SIDE^3]`` hat functions, written per axis."""
    nodes = torch.arange(SIDE) / (SIDE - 1)
    hats = (1 - (points[..., None] - nodes).abs() * (SIDE - 1)).clamp(min=0)
    weights = hats[..., 0, :, None, None] * hats[..., 1, None, :, None] * hats[..., 2, None, None, :]
    return weights.flatten(-3)


def test_ph20_information_is_the_squared_jacobian_of_each_ray(rays):
    points, color = rays
    weights = dense_weights(points)

    def render(grid):
        return color(points + torch.einsum("rsv,vk->rsk", weights, grid))

    jacobian = torch.autograd.functional.jacobian(render, torch.zeros(SIDE**3, 3))
    moved = points.clone().requires_grad_()
    gradients = torch.stack([torch.autograd.grad(c.sum(), moved, retain_graph=True)[0] for c in color(moved)])
    grid = DeformationGrid(SIDE)
    grid.add(points[:2], gradients[:, :2])
    grid.add(points[2:], gradients[:, 2:])
    torch.testing.assert_close(grid.information, jacobian.square().sum((0, 1)), rtol=1e-4, atol=1e-5)
    expected = (1 / (2 * grid.information / RAYS + 2e-2)).sum(-1).sqrt()
    torch.testing.assert_close(grid.std(prior=1e-2), expected)


def test_ph20_interpolation_is_trilinear(rays):
    points, _ = rays
    grid = DeformationGrid(SIDE)
    values = torch.rand(SIDE**3)
    torch.testing.assert_close(grid.interpolate(values, points), dense_weights(points) @ values)


def test_ph20_what_no_ray_saw_is_the_most_uncertain(rays):
    points, _ = rays
    grid = DeformationGrid(9)
    grid.add(points * 0.4, torch.ones(CHANNELS, RAYS, SAMPLES, 3))
    spread = grid.std()
    unseen = grid.information.sum(-1) == 0
    assert float(spread[unseen].min()) > float(spread[~unseen].max())


def test_ph20_bad_input_is_refused():
    with pytest.raises(ValueError, match="resolution must be at least 2, got 1"):
        DeformationGrid(1)
    grid = DeformationGrid(3)
    with pytest.raises(ValueError, match="no rays have been added"):
        grid.std()
    with pytest.raises(ValueError, match=r"gradients \[C, R, S, 3\]"):
        grid.add(torch.rand(2, 4, 3), torch.rand(3, 2, 5, 3))
    grid.add(torch.rand(2, 4, 3), torch.rand(3, 2, 4, 3))
    with pytest.raises(ValueError, match="prior must be positive"):
        grid.std(prior=0.0)

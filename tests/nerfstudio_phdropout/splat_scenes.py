"""Random Gaussians, and slow, plain renderings of them that share no code with the package."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def random_gaussians(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gaussians in front of one camera, by the argument names of `rasterization`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    view = torch.eye(4, dtype=torch.float64)[None].clone()
    view[0, 2, 3] = 4.0
    scene = {
        "means": uniform(count, 3) * 2 - 1,
        "quats": torch.randn(count, 4, generator=generator, dtype=torch.float64),
        "scales": uniform(count, 3) * 0.3 + 0.05,
        "opacities": uniform(count) * 0.85 + 0.1,
        "colors": uniform(count, 3),
        "viewmats": view,
        "Ks": torch.tensor([[[40.0, 0, 20.5], [0, 42.0, 15.0], [0, 0, 1]]], dtype=torch.float64),
    }
    return {name: tensor.to(dtype) for name, tensor in scene.items()}


def enumerate_masks(alphas: Tensor, colors: Tensor, drop: Tensor, background: Tensor) -> dict[str, Tensor]:
    """Moments over all 2^N masks of one pixel: alphas ``[N]``, colors ``[N, D]``, drop ``[N]``."""
    count = len(alphas)
    totals: dict[str, Tensor] = {}
    for bits in itertools.product((0, 1), repeat=count):
        mask = torch.tensor(bits, dtype=torch.float64)
        chance = torch.where(mask > 0, 1 - drop, drop).prod()
        through, color = torch.ones((), dtype=torch.float64), torch.zeros_like(background)
        for a, c in zip(alphas * mask, colors, strict=True):
            color, through = color + through * a * c, through * (1 - a)
        color = color + through * background
        accumulation = 1 - through
        for name, value in {
            "mean": color,
            "square": color**2,
            "accumulation": accumulation,
            "accumulation_square": accumulation**2,
            "product": color * accumulation,
        }.items():
            totals[name] = totals.get(name, 0) + chance * value
    return {
        "mean": totals["mean"],
        "variance": totals["square"] - totals["mean"] ** 2,
        "accumulation": totals["accumulation"],
        "accumulation_variance": totals["accumulation_square"] - totals["accumulation"] ** 2,
        "covariance": totals["product"] - totals["mean"] * totals["accumulation"],
    }


def dense_alphas(
    scene: dict[str, Tensor], width: int, height: int, eps2d: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Opacity of every Gaussian at every pixel, nearest first: ``[H, W, N]``, and the order."""
    view, intrinsics = scene["viewmats"][0], scene["Ks"][0]
    points = scene["means"] @ view[:3, :3].T + view[:3, 3]
    order = torch.argsort(points[:, 2], stable=True)
    rows, columns = (torch.arange(size, dtype=view.dtype) + 0.5 for size in (height, width))
    ys, xs = torch.meshgrid(rows, columns, indexing="ij")
    layers = []
    for i in order.tolist():
        w, x, y, z = (scene["quats"][i] / scene["quats"][i].norm()).tolist()
        rotation = torch.tensor(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ],
            dtype=view.dtype,
        )
        covariance = rotation @ torch.diag(scene["scales"][i] ** 2) @ rotation.T
        covariance = view[:3, :3] @ covariance @ view[:3, :3].T
        px, py, pz = points[i].tolist()
        fx, fy, cx, cy = (float(intrinsics[a, b]) for a, b in ((0, 0), (1, 1), (0, 2), (1, 2)))
        jacobian = torch.tensor(
            [[fx / pz, 0, -fx * px / pz**2], [0, fy / pz, -fy * py / pz**2]], dtype=view.dtype
        )
        inverse = torch.linalg.inv(
            jacobian @ covariance @ jacobian.T + eps2d * torch.eye(2, dtype=view.dtype)
        )
        dx, dy = fx * px / pz + cx - xs, fy * py / pz + cy - ys
        power = 0.5 * (inverse[0, 0] * dx**2 + 2 * inverse[0, 1] * dx * dy + inverse[1, 1] * dy**2)
        alpha = (scene["opacities"][i] * torch.exp(-power)).clamp(max=0.999)
        layers.append(torch.where(alpha < 1 / 255, 0.0, alpha))
    return torch.stack(layers, dim=-1), order


def dense_render(alphas: Tensor, colors: Tensor, background: Tensor) -> Tensor:
    """Front-to-back compositing with gsplat's stop rule, pixel loops unrolled over splats: ``[H, W, D]``."""
    through = torch.ones_like(alphas[..., 0])
    image = torch.zeros(*through.shape, colors.shape[-1], dtype=colors.dtype)
    going = torch.ones_like(through, dtype=torch.bool)
    for i in range(alphas.shape[-1]):
        following = through * (1 - alphas[..., i])
        going &= following > 1e-4
        weight = torch.where(going, through * alphas[..., i], 0.0)
        image += weight[..., None] * colors[i]
        through = torch.where(going, following, through)
    return image + through[..., None] * background

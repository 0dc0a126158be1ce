"""A grid of displacements and what training rays leave open of it: BayesRays' Laplace approximation.

Written from the paper (arXiv 2309.03185): a trained field is perturbed by moving its input points by a field
D of displacements, trilinear between the vertices of a grid. Only D is uncertain. Its posterior precision is
diagonal, 2 / R sum over rays of (dC/dD_v)^2 + 2 prior; the norm of a vertex's three standard deviations is a
spatial uncertainty, which is rendered like a colour.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DeformationGrid:
    """Information about displacements at the vertices of a cubic grid over [0, 1]^3.

    Attributes:
        resolution: vertices along an axis.
        information: ``[resolution^3, 3]`` sum over rays and channels of squared derivatives.
        rays: how many rays were added.
    """

    def __init__(self, resolution: int, device: torch.device | str = "cpu") -> None:
        if resolution < 2:
            raise ValueError(f"resolution must be at least 2, got {resolution}")
        self.resolution = resolution
        self.information = torch.zeros(resolution**3, 3, device=device)
        self.rays = 0

    def _corners(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Vertices around points ``[..., 3]`` and their trilinear weights, both ``[..., 8]``."""
        scaled = positions.clamp(0, 1) * (self.resolution - 1)
        low = scaled.floor().clamp(max=self.resolution - 2)
        share = scaled - low
        low = low.long()
        vertices, weights = [], []
        for corner in range(8):
            bits = [(corner >> axis) & 1 for axis in range(3)]
            index = torch.zeros_like(low[..., 0])
            weight = torch.ones_like(share[..., 0])
            for axis, bit in enumerate(bits):
                index = index * self.resolution + low[..., axis] + bit
                weight = weight * (share[..., axis] if bit else 1 - share[..., axis])
            vertices.append(index)
            weights.append(weight)
        return torch.stack(vertices, dim=-1), torch.stack(weights, dim=-1)

    @torch.no_grad()
    def add(self, positions: Tensor, gradients: Tensor) -> None:
        """Add what rays say.

        Args:
            positions: ``[R, S, 3]`` sample points in [0, 1].
            gradients: ``[C, R, S, 3]`` derivative of each channel of a ray's colour by its sample points.

        Raises:
            ValueError: shapes that do not fit.
        """
        if gradients.shape[1:] != positions.shape or positions.ndim != 3:
            raise ValueError(
                f"positions must be [R, S, 3] and gradients [C, R, S, 3], got {list(positions.shape)} and "
                f"{list(gradients.shape)}"
            )
        rays = positions.shape[0]
        vertices, weights = self._corners(positions)
        # Samples of a ray that share a vertex add up before the square is taken.
        ray = torch.arange(rays, device=positions.device)[:, None, None]
        keys, place = torch.unique(ray * self.resolution**3 + vertices, return_inverse=True)
        for gradient in gradients:
            moved = (weights[..., None] * gradient[..., None, :]).reshape(-1, 3)
            total = moved.new_zeros(len(keys), 3).index_add_(0, place.reshape(-1), moved)
            self.information.index_add_(0, keys % self.resolution**3, total.square())
        self.rays += rays

    def std(self, *, prior: float | None = None) -> Tensor:
        """Spatial uncertainty ``[resolution^3]``: the norm over axes of each vertex's standard deviations.

        Args:
            prior: 1e-4 / resolution^3 if None, as in the paper.

        Raises:
            ValueError: no rays were added, or a prior that is not positive.
        """
        if self.rays == 0:
            raise ValueError("no rays have been added; add those of the training views first")
        if prior is None:
            prior = 1e-4 / self.resolution**3
        if not prior > 0:
            raise ValueError(f"prior must be positive, got {prior}")
        return (1 / (2 * self.information / self.rays + 2 * prior)).sum(-1).sqrt()

    def interpolate(self, values: Tensor, positions: Tensor) -> Tensor:
        """``values`` ``[resolution^3]`` at points ``[..., 3]`` in [0, 1]: ``[...]``."""
        vertices, weights = self._corners(positions)
        return (values[vertices] * weights).sum(-1)

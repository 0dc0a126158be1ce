"""Peers of PH-Dropout on a trained nerfacto: BayesRays' Laplace and a FisherRF of its hash table.

Both are post hoc, as PH-Dropout is, so one checkpoint serves all. FisherRF was published for voxels and
Gaussians; the entries of nerfacto's hash table take the place of voxels, its small networks stay fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.field_heads import FieldHeadNames
from torch import Tensor, nn

from nerfstudio_phdropout.deformation import DeformationGrid


def training_rays(cameras: Any, count: int, batch: int, *, seed: int = 0) -> Iterator[RayBundle]:
    """Rays through random pixels of random cameras, in batches.

    Args:
        cameras: nerfstudio's ``Cameras`` of a training set, all of one size.
        count: how many rays in all.
        batch: rays a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = int(cameras.height[0]), int(cameras.width[0])
    for start in range(0, count, batch):
        size = min(batch, count - start)
        chosen = torch.randint(len(cameras), (size, 1), generator=generator)
        pixels = torch.rand(size, 2, generator=generator) * torch.tensor([height, width])
        coords = pixels.floor() + 0.5
        device = cameras.camera_to_worlds.device
        yield cameras.generate_rays(camera_indices=chosen.to(device), coords=coords.to(device))


class NerfactoProbe:
    """Derivatives of nerfacto's colours by its sample points or by the output of its hash encoding."""

    def __init__(self, model: Any) -> None:
        base = getattr(getattr(model, "field", None), "mlp_base", None)
        encoding = getattr(base, "model", [None])[0]
        table = getattr(encoding, "hash_table", None)
        if not isinstance(table, nn.Parameter) or not hasattr(model, "proposal_sampler"):
            raise ValueError(
                f"{type(model).__name__} has no hash table in torch; use nerfacto with implementation='torch'"
            )
        self.model, self.encoding, self.table = model, encoding, table

    def _samples(self, rays: RayBundle) -> Any:
        with torch.no_grad():
            if self.model.collider is not None:
                rays = self.model.collider(rays)
            return self.model.proposal_sampler(rays, density_fns=self.model.density_fns)[0]

    def _field(self, samples: Any) -> tuple[Tensor, Tensor]:
        """Colours ``[R, 3]`` and weights ``[R, S, 1]``."""
        outputs = self.model.field.forward(samples)
        weights = samples.get_weights(outputs[FieldHeadNames.DENSITY])
        return self.model.renderer_rgb(rgb=outputs[FieldHeadNames.RGB], weights=weights), weights

    def _grid_positions(self, points: Tensor) -> Tensor:
        """World points to [0, 1], as the field does."""
        field = self.model.field
        if field.spatial_distortion is not None:
            return (field.spatial_distortion(points) + 2) / 4
        return SceneBox.get_normalized_positions(points, field.aabb)

    @torch.enable_grad()
    def by_position(self, rays: RayBundle) -> tuple[Tensor, Tensor]:
        """Sample points in [0, 1] ``[R, S, 3]``, and dC/dpoint ``[3, R, S, 3]`` in world units."""
        samples = self._samples(rays)
        points = samples.frustums.get_positions()
        offsets = torch.zeros_like(points, requires_grad=True)
        samples.frustums.set_offsets(offsets)
        colors, _ = self._field(samples)
        gradients = [
            torch.autograd.grad(colors[:, c].sum(), offsets, retain_graph=c < 2)[0] for c in range(3)
        ]
        return self._grid_positions(points.detach()), torch.stack(gradients)

    @torch.enable_grad()
    def table_square(self, rays: RayBundle, signs: Tensor) -> Tensor:
        """An unbiased estimate of sum over rays and channels of (dC/dentry)^2: (J^T ``signs``)^2.

        Args:
            signs: ``[R, 3]`` independent, +1 or -1.
        """
        colors, _ = self._field(self._samples(rays))
        return torch.autograd.grad((colors * signs).sum(), self.table)[0].square()

    @torch.enable_grad()
    def along(self, rays: RayBundle, directions: Iterable[Tensor]) -> Iterator[Tensor]:
        """Derivative of the colours ``[R, 3]`` along changes of the hash table, each shaped as the table."""
        caught: list[tuple[Tensor, Tensor]] = []

        def catch(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            caught.append((inputs[0], output))

        hook = self.encoding.register_forward_hook(catch)
        try:
            colors, _ = self._field(self._samples(rays))
        finally:
            hook.remove()
        points, encoded = caught[0]
        gradients = _channel_gradients(colors, encoded)
        # The encoding is linear in its table: along a direction it changes by the encoding of the direction.
        with torch.no_grad():
            for direction in directions:
                table = {"hash_table": direction}
                change = torch.func.functional_call(self.encoding, table, (points.detach(),))
                yield torch.stack([(g * change).view(len(colors), -1).sum(-1) for g in gradients], dim=-1)


def _channel_gradients(colors: Tensor, wanted: Tensor) -> list[Tensor]:
    """Derivative of each channel by ``wanted``; rays do not mix, so the sum over rays separates."""
    last = colors.shape[-1] - 1
    return [
        torch.autograd.grad(colors[:, c].sum(), wanted, retain_graph=c < last)[0] for c in range(last + 1)
    ]


def laplace_grid(model: Any, batches: Iterable[RayBundle], resolution: int = 128) -> DeformationGrid:
    """BayesRays' grid of a nerfacto, from training rays.

    Raises:
        ValueError: a model without hash table in torch.
    """
    probe = NerfactoProbe(model)
    grid = DeformationGrid(resolution, model.device)
    for rays in batches:
        grid.add(*probe.by_position(rays))
    return grid


@torch.no_grad()
def laplace_map(model: Any, rays: RayBundle, grid: DeformationGrid) -> Tensor:
    """The grid's uncertainty rendered along rays ``[R]``: ``[R]``, in arbitrary units of length."""
    probe = NerfactoProbe(model)
    samples = probe._samples(rays)
    _, weights = probe._field(samples)
    points = probe._grid_positions(samples.frustums.get_positions())
    return (weights[..., 0] * grid.interpolate(grid.std(), points)).sum(-1)


def fisher_table(model: Any, batches: Iterable[RayBundle], *, seed: int = 0) -> Tensor:
    """FisherRF's diagonal information of the hash table, shaped as it; one random sign a ray and channel."""
    probe = NerfactoProbe(model)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(probe.table)
    for rays in batches:
        signs = torch.randint(2, (len(rays), 3), generator=generator) * 2.0 - 1
        total += probe.table_square(rays, signs.to(total.device))
    return total


def fisher_map(
    model: Any, rays: RayBundle, information: Tensor, *, probes: int = 16, prior: float = 1e-6, seed: int = 0
) -> Tensor:
    """FisherRF's variance of rays, ``[R, 3]``: an unbiased estimate of sum_k (dC/dk)^2 / (H_k + ``prior``).

    Args:
        probes: random directions; the standard deviation has a relative error of (2 probes)^-1/2.
    """
    generator = torch.Generator(device=information.device).manual_seed(seed)
    scale = (information + prior).rsqrt()
    directions = (
        torch.randn(scale.shape, generator=generator, device=scale.device) * scale for _ in range(probes)
    )
    total = torch.zeros(len(rays), 3, device=scale.device)
    for change in NerfactoProbe(model).along(rays, directions):
        total += change.square()
    return total / probes

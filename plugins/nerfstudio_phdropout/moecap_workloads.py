"""``phdropout.render``: views of a splat scene with their uncertainty, for ``moecap run``.

The scene is traced (`nerfstudio_phdropout.synthetic`); its Gaussians are the surface points that half an
orbit of training views sees, so the unseen side is missing and the truth of every evaluation view is known.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from moecap_eval.workload import ArmConfig, Axis, BlockResult, Item, RunContext, Sample, System, Workload
from moecap_eval.workload_tools import ConfiguredSystem, Stopwatch, read_options
from nerfstudio_phdropout.checks import check_ratio
from nerfstudio_phdropout.masks import drop_uniforms
from nerfstudio_phdropout.metrics import spearman
from nerfstudio_phdropout.moments import RenderMoments, monte_carlo_moments
from nerfstudio_phdropout.rasterize import rasterization, rasterization_moments
from nerfstudio_phdropout.synthetic import CAMERA_ANGLE, camera_to_world, make_solids, trace, write_scene

# An arm: how sigma is estimated. `reference` rounds trials to 8 bits, as the authors' code does.
OPTIONS = {"estimator": ("exact", "monte_carlo", "reference", "none"), "num_trials": 100}
PARAMS = {"views": 16, "resolution": 48, "gaussians": 1000, "ratio": 0.05}


class RenderWorkload(Workload):
    """Views of a half-orbit scene; params: ``views``, ``resolution``, ``gaussians``, ``ratio`` (of drops)."""

    name: ClassVar[str] = "phdropout.render"
    work_unit: ClassVar[str] = "rendered pixel"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("psnr_db", "accuracy", "dB", "higher", level="item", margin=0.3, headline=True),
        Axis("spearman", "accuracy", "1", "higher", level="item", margin=0.02, headline=True),
        Axis("frames_per_s", "performance", "1/s", "higher", headline=True),
        Axis("peak_bytes", "performance", "B", "lower"),
    )

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """Views of the whole orbit: ``view/<number>`` with azimuth and elevation in degrees."""
        scene = read_options(params, PARAMS, "params")
        if scene["views"] < 1 or scene["gaussians"] < 4 or scene["resolution"] < 8:
            raise ValueError("params: views must be positive, gaussians at least 4, resolution at least 8")
        check_ratio(scene["ratio"])
        angles = [(360 * (i + 0.5) / scene["views"], (22.0, 40.0)[i % 2]) for i in range(scene["views"])]
        return [Item(f"view/{i}", angle) for i, angle in enumerate(angles)]

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Build the scene's Gaussians."""
        options = read_options(arm.options, OPTIONS, f"arms.{arm.name}")
        if options["num_trials"] < 2:
            raise ValueError(f"arms.{arm.name}.num_trials must be at least 2, got {options['num_trials']}")
        return RenderSystem(options, read_options(context.params, PARAMS, "params"), context.seed)


class RenderSystem(ConfiguredSystem):
    """One estimator on the scene."""

    def __init__(self, options: Mapping[str, Any], params: Mapping[str, Any], seed: int) -> None:
        super().__init__(options, params, seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gaussians = self._seeded_gaussians()
        self.truths: dict[str, tuple[Tensor, Tensor]] = {}

    def _seeded_gaussians(self) -> dict[str, Any]:
        """A round, nearly opaque Gaussian at each surface point, as wide as the way to its neighbours."""
        size, count = self.params["resolution"], self.params["gaussians"]
        with tempfile.TemporaryDirectory() as folder:
            write_scene(
                folder, num_train=12, num_eval=1, resolution=size, train_azimuth=(0, 180), seed=self.seed
            )
            cloud = np.load(Path(folder) / "points.npz")
            points, colors = cloud["xyz"][:count], cloud["rgb"][:count]
        spacing = cKDTree(points).query(points, k=4)[0][:, 1:].mean(axis=1)
        values = {
            "means": torch.from_numpy(points),
            "quats": torch.tensor([[1.0, 0, 0, 0]]).repeat(len(points), 1),
            "scales": torch.from_numpy(spacing).float()[:, None].repeat(1, 3) * 0.7,
            "opacities": torch.full((len(points),), 0.8),
            "colors": torch.from_numpy(colors).float() / 255,
        }
        return {name: value.to(self.device) for name, value in values.items()}

    def _truth(self, item: Item) -> tuple[Tensor, Tensor]:
        """View matrix and image over black."""
        if item.id not in self.truths:
            pose = camera_to_world(*item.payload)
            image, _ = trace(make_solids(self.seed), pose, self.params["resolution"])
            view = np.linalg.inv(pose @ np.diag([1.0, -1.0, -1.0, 1.0]))
            color = torch.from_numpy(image[..., :3] * image[..., 3:]).float().to(self.device)
            self.truths[item.id] = torch.from_numpy(view).float()[None].to(self.device), color
        return self.truths[item.id]

    @torch.no_grad()
    def _render(self, view: Tensor) -> RenderMoments:
        size, ratio, estimator = self.params["resolution"], self.params["ratio"], self.options["estimator"]
        focal = 0.5 * size / math.tan(0.5 * CAMERA_ANGLE)
        Ks = torch.tensor([[[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]], device=self.device)
        options: dict[str, Any] = {"viewmats": view, "Ks": Ks, "width": size, "height": size}
        if estimator == "exact":
            return rasterization_moments(**self.gaussians, **options, dropout_ratio=ratio)[0]
        if estimator == "none":
            image = rasterization(**self.gaussians, **options)[0]
            return RenderMoments(image, torch.zeros_like(image))
        opacities = self.gaussians["opacities"]

        def trial(index: int) -> Tensor:
            kept = drop_uniforms(len(opacities), seed=self.seed, trial=index, device=self.device) >= ratio
            return rasterization(**{**self.gaussians, "opacities": opacities * kept}, **options)[0]

        return monte_carlo_moments(trial, self.options["num_trials"], quantize=estimator == "reference")

    def warm_up(self, items: Sequence[Item]) -> None:
        """Trace the truths and render once."""
        for item in items:
            self._truth(item)
        self.run(items[:1])

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Render the views; seconds of tracing or of metrics do not count as rendering."""
        watch, samples = Stopwatch(self.device), []
        for item in items:
            view, truth = self._truth(item)
            with watch:
                moments = self._render(view)
            error = (moments.mean[0] - truth).abs()
            psnr = -10 * math.log10(max(float((error**2).mean()), 1e-10))
            rank = None if self.options["estimator"] == "none" else spearman(error, moments.std[0])
            samples.append(Sample(item.id, {"psnr_db": psnr, "spearman": rank}))
        reasons = {} if watch.peak_bytes else {"peak_bytes": "memory is counted on CUDA devices only"}
        if self.options["estimator"] == "none":
            reasons["spearman"] = "this arm estimates no uncertainty"
        values = {"frames_per_s": len(items) / watch.seconds, "peak_bytes": watch.peak_bytes}
        return BlockResult(
            float(len(items) * self.params["resolution"] ** 2), values, samples, reasons=reasons
        )

    def memory_bytes(self) -> dict[str, int]:
        """The Gaussians."""
        return {"hbm" if self.device == "cuda" else "dram": sum(t.nbytes for t in self.gaussians.values())}

"""Which view to capture next? Exact sigma of a splat scene, on bare tensors, without nerfstudio.

    python examples/nerfstudio_phdropout_next_view.py

Half an orbit of views is known; the Gaussians are the surface points those views see. Views of the other side
get the larger sigma and are proposed first. The plain sigma is 0 in holes, where nothing can be dropped, so
views are scored by sigma before a background of which nothing is known.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from nerfstudio_phdropout import (
    next_best_views,
    rasterization_moments,
    unknown_background_std,
    view_score,
)
from nerfstudio_phdropout.synthetic import CAMERA_ANGLE, camera_to_world, write_scene

SIZE = 48


def known_gaussians() -> dict[str, torch.Tensor]:
    """A Gaussian at each surface point that the training views see."""
    with tempfile.TemporaryDirectory() as folder:
        write_scene(folder, num_train=12, num_eval=1, resolution=SIZE, train_azimuth=(0, 180))
        cloud = np.load(Path(folder) / "points.npz")
        points, colors = torch.from_numpy(cloud["xyz"])[:1500], torch.from_numpy(cloud["rgb"])[:1500]
    count = len(points)
    return {
        "means": points,
        "quats": torch.tensor([[1.0, 0, 0, 0]]).expand(count, 4),
        "scales": torch.full((count, 3), 0.03),
        "opacities": torch.full((count,), 0.8),
        "colors": colors.float() / 255,
    }


def main() -> None:
    """Print the score of every candidate and the three best."""
    gaussians = known_gaussians()
    focal = 0.5 * SIZE / math.tan(0.5 * CAMERA_ANGLE)
    Ks = torch.tensor([[[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]]])
    azimuths = list(range(15, 360, 30))
    scores = []
    for azimuth in azimuths:
        view = np.linalg.inv(camera_to_world(azimuth, 25) @ np.diag([1.0, -1.0, -1.0, 1.0]))
        moments, _ = rasterization_moments(
            **gaussians, viewmats=torch.from_numpy(view).float()[None], Ks=Ks, width=SIZE, height=SIZE,
            dropout_ratio=0.05,
        )  # fmt: skip
        scores.append(view_score(unknown_background_std(moments)))
        plain = view_score(moments.std)
        print(f"azimuth {azimuth:3d}: mean sigma {scores[-1]:.4f}, without holes {plain:.4f}")
    print("capture next:", [azimuths[i] for i in next_best_views(scores, 3)])


if __name__ == "__main__":
    main()

"""The tracer against closed forms, and the folder it writes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from nerfstudio_phdropout.synthetic import CAMERA_ANGLE, TARGET, Solid, camera_to_world, trace, write_scene


def test_depth_and_outline_of_a_sphere():
    ball = Solid("sphere", TARGET, np.full(3, 0.8), 0.3, np.full((2, 3), 0.5), "waves", 5.0)
    image, depth = trace([ball], camera_to_world(30, 20), 65)
    assert depth[32, 32] == pytest.approx(4 - 0.8, abs=2e-3)
    focal = 0.5 * 65 / math.tan(0.5 * CAMERA_ANGLE)
    radius = focal * 0.8 / math.sqrt(16 - 0.64)
    assert image[..., 3].sum() == pytest.approx(math.pi * radius**2, rel=0.01)
    assert depth[0, 0] == 0


def test_nearer_solids_hide_others_and_poses_are_rotations():
    near = Solid(
        "box", TARGET + np.array([1.0, 0, 0]), np.full(3, 0.2), 0.0, np.zeros((2, 3)), "checker", 1.0
    )
    far = Solid(
        "sphere", TARGET - np.array([1.0, 0, 0]), np.full(3, 0.2), 0.0, np.ones((2, 3)), "checker", 1.0
    )
    image, depth = trace([far, near], camera_to_world(0, 0), 33)
    assert depth[16, 16] == pytest.approx(2.8, abs=1e-6)
    assert image[16, 16, :3].max() == 0
    rotation = camera_to_world(77, 31)[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_a_scene_folder_is_complete_and_repeatable(tmp_path):
    options = {"num_train": 4, "num_eval": 2, "resolution": 16, "train_azimuth": (0, 90)}
    first, second = (write_scene(tmp_path / name, **options) for name in ("a", "b"))
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second)) for p in second.rglob("*") if p.is_file())
    for name in names:
        if name.endswith((".png", ".json", ".npy")):
            assert (first / name).read_bytes() == (second / name).read_bytes()
    frames = json.loads((first / "transforms_train.json").read_text())["frames"]
    angles = [
        math.degrees(math.atan2(f["transform_matrix"][1][3], f["transform_matrix"][0][3])) for f in frames
    ]
    assert min(angles) == pytest.approx(0, abs=1e-6)
    assert max(angles) == pytest.approx(90)
    assert Image.open(first / "train/r_000.png").mode == "RGBA"
    points = np.load(first / "points.npz")
    assert points["xyz"].shape == points["rgb"].shape
    assert np.abs(points["xyz"]).max() < 1.5


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be positive"):
        write_scene(tmp_path, num_train=0)
    with pytest.raises(ValueError, match="at least 8"):
        write_scene(tmp_path, resolution=4)
    with pytest.raises(ValueError, match="an arc of at most 360"):
        write_scene(tmp_path, train_azimuth=(0, 400))

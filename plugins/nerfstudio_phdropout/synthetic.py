"""Procedural scenes with ground truth: textured solids on a slab, traced exactly, in Blender's format.

A scene folder holds ``transforms_{train,val,test}.json``, RGBA images (alpha is the object mask), z-depth as
``.npy`` and ``points.npz``, surface points that training cameras see, as structure from motion would give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CAMERA_ANGLE = 0.75
RADIUS = 4.0
TARGET = np.array([0.0, 0.0, -0.25])
_LIGHT = np.array([0.4, -0.5, 0.77])
_SUBPIXELS = 2
_FAR = 1e9


@dataclass(frozen=True)
class Solid:
    """A sphere or a box turned about the vertical axis, with a two-colour texture."""

    kind: str
    center: Array
    size: Array
    angle: float
    colors: Array
    pattern: str
    frequency: float

    def local(self, points: Array) -> Array:
        """World coordinates (or directions, for the linear part) to the solid's own axes."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        return points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def make_solids(seed: int) -> list[Solid]:
    """A slab and seven solids; every seed gives another arrangement, shape mix and set of textures."""
    rng = np.random.default_rng(seed)
    slab = Solid(
        "box", np.array([0, 0, -0.55]), np.array([1.25, 1.25, 0.05]), 0.0,
        np.array([[0.75, 0.72, 0.65], [0.35, 0.38, 0.45]]), "checker", 2.0,
    )  # fmt: skip
    solids = [slab]
    for index in range(7):
        angle = 2 * math.pi * index / 6 + rng.uniform(-0.25, 0.25)
        distance = 0.0 if index == 6 else rng.uniform(0.65, 0.95)
        size = rng.uniform(0.16, 0.3, size=3)
        kind = "sphere" if rng.random() < 0.45 else "box"
        if kind == "sphere":
            size[:] = size[0]
        if index == 6:
            size[2] *= 1.8 if kind == "box" else 1.0
        center = np.array([distance * math.cos(angle), distance * math.sin(angle), -0.5 + size[2]])
        colors = rng.uniform(0.05, 0.95, size=(2, 3))
        pattern = ("checker", "stripes", "waves")[int(rng.integers(3))]
        solids.append(
            Solid(kind, center, size, rng.uniform(0, math.pi), colors, pattern, rng.uniform(4.0, 9.0))
        )
    return solids


def camera_to_world(azimuth: float, elevation: float, radius: float = RADIUS) -> Array:
    """``[4, 4]`` pose of a camera (x right, y up, z back) on a sphere, looking at ``TARGET``; degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    pose = np.eye(4)
    pose[:3, :4] = np.stack([right, np.cross(back, right), back, TARGET + radius * back], axis=1)
    return pose


def trace(solids: list[Solid], pose: Array, resolution: int) -> tuple[Array, Array]:
    """Image of the solids.

    Returns:
        RGBA ``[H, W, 4]`` in [0, 1], colour not premultiplied, and z-depth ``[H, W]``, 0 without a hit.
    """
    fine = resolution * _SUBPIXELS
    focal = 0.5 * fine / math.tan(0.5 * CAMERA_ANGLE)
    ys, xs = np.mgrid[0:fine, 0:fine] + 0.5
    camera = np.stack([(xs - fine / 2) / focal, -(ys - fine / 2) / focal, -np.ones_like(xs)], axis=-1)
    directions = (camera @ pose[:3, :3].T).reshape(-1, 3)
    origin = pose[:3, 3]
    nearest = np.full(len(directions), _FAR)
    color = np.zeros((len(directions), 3))
    for solid in solids:
        distance = _intersect(solid, origin, directions)
        hit = distance < nearest
        nearest[hit] = distance[hit]
        color[hit] = _shade(solid, origin + distance[hit, None] * directions[hit])
    hit = nearest < _FAR
    shape = (resolution, _SUBPIXELS, resolution, _SUBPIXELS)
    share = hit.reshape(shape).mean(axis=(1, 3))
    weight = np.maximum(share, 1e-9)
    premultiplied = (color * hit[:, None]).reshape(*shape, 3).mean(axis=(1, 3))
    # Directions have unit z in camera axes, so the ray parameter is the z-depth.
    depth = np.where(hit, nearest, 0).reshape(shape).mean(axis=(1, 3)) / weight
    return np.concatenate([premultiplied / weight[..., None], share[..., None]], axis=-1), depth


def _intersect(solid: Solid, origin: Array, directions: Array) -> Array:
    """Ray parameter of the first hit of each ray, a large number if none."""
    o, d = solid.local(origin - solid.center), solid.local(directions)
    if solid.kind == "sphere":
        a, b = (d * d).sum(-1), d @ o
        inside = b * b - a * (o @ o - solid.size[0] ** 2)
        t = (-b - np.sqrt(np.maximum(inside, 0))) / a
        return np.where((inside > 0) & (t > 0), t, _FAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (-solid.size - o) / d, (solid.size - o) / d
    enter, leave = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
    return np.where((enter < leave) & (enter > 0), enter, _FAR)


def _shade(solid: Solid, points: Array) -> Array:
    """Texture times Lambert shading with ambient light, ``[n, 3]``."""
    local = solid.local(points - solid.center)
    if solid.kind == "sphere":
        normals = (points - solid.center) / solid.size[0]
    else:
        ratio = local / solid.size
        axis = np.abs(ratio).argmax(-1)
        face = np.zeros_like(local)
        face[np.arange(len(local)), axis] = np.sign(ratio[np.arange(len(local)), axis])
        c, s = math.cos(solid.angle), math.sin(solid.angle)
        normals = face @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]])
    phase = local * solid.frequency
    if solid.pattern == "checker":
        mix = np.floor(phase + 1e-4).sum(-1) % 2
    elif solid.pattern == "stripes":
        mix = 0.5 + 0.5 * np.sign(np.sin(math.pi * (phase[:, 0] + phase[:, 2])))
    else:
        mix = 0.5 + 0.5 * np.sin(math.pi * phase).mean(-1) * 1.5
    mix = np.clip(mix, 0, 1)[:, None]
    texture = (1 - mix) * solid.colors[0] + mix * solid.colors[1]
    light = 0.45 + 0.55 * np.maximum(normals @ (_LIGHT / np.linalg.norm(_LIGHT)), 0)
    return np.clip(texture * light[:, None], 0, 1)


def write_scene(
    path: Path | str,
    *,
    num_train: int = 24,
    num_eval: int = 12,
    resolution: int = 64,
    train_azimuth: tuple[float, float] = (0.0, 360.0),
    seed: int = 0,
    workers: int = 1,
) -> Path:
    """Trace a scene and write it.

    Args:
        path: folder, made if need be.
        num_train: training views, spread over ``train_azimuth`` (degrees) in three rings of elevation.
        num_eval: views of the whole orbit, so a partial ``train_azimuth`` leaves unseen sides.
        resolution: pixels a side.
        seed: decides the scene.
        workers: processes that trace; the files do not depend on it.

    Returns:
        ``path``.

    Raises:
        ValueError: no views, a resolution below 8, or an empty arc.
    """
    if num_train < 1 or num_eval < 1:
        raise ValueError(f"num_train and num_eval must be positive, got {num_train} and {num_eval}")
    if resolution < 8:
        raise ValueError(f"resolution must be at least 8, got {resolution}")
    low, high = train_azimuth
    if not 0 < high - low <= 360:
        raise ValueError(f"train_azimuth must be an arc of at most 360 degrees, got {train_azimuth}")
    folder = Path(path)
    solids = make_solids(seed)
    # A full circle must not visit its end twice.
    arc = (high - low) * (num_train - 1) / num_train if high - low == 360 else high - low
    train = [(low + arc * (i / max(num_train - 1, 1)), (12.0, 30.0, 50.0)[i % 3]) for i in range(num_train)]
    evaluation = [(360 * (i + 0.5) / num_eval, (22.0, 40.0)[i % 2]) for i in range(num_eval)]
    clouds = _write_split(folder, "train", solids, train, resolution=resolution, workers=workers)
    _write_split(folder, "test", solids, evaluation, resolution=resolution, workers=workers)
    (folder / "transforms_val.json").write_text((folder / "transforms_test.json").read_text())
    xyz = np.concatenate([cloud[0] for cloud in clouds])
    rgb = np.concatenate([cloud[1] for cloud in clouds])
    chosen = np.random.default_rng(seed).permutation(len(xyz))[:20_000]
    np.savez_compressed(folder / "points.npz", xyz=xyz[chosen].astype(np.float32), rgb=rgb[chosen])
    return folder


def _write_split(
    folder: Path,
    split: str,
    solids: list[Solid],
    views: list[tuple[float, float]],
    *,
    resolution: int,
    workers: int,
) -> list[tuple[Array, NDArray[np.uint8]]]:
    """Write images, depths and poses of one split; returns surface points and colours of each view."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    names = [f"{split}/r_{index:03d}" for index in range(len(views))]
    jobs = [(folder, name, solids, view, resolution) for name, view in zip(names, views, strict=True)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            clouds = list(pool.map(_write_view, jobs))
    else:
        clouds = list(map(_write_view, jobs))
    frames: Iterable[dict[str, Any]] = (
        {"file_path": f"./{name}", "transform_matrix": camera_to_world(*view).tolist()}
        for name, view in zip(names, views, strict=True)
    )
    content = {"camera_angle_x": CAMERA_ANGLE, "frames": list(frames)}
    (folder / f"transforms_{split}.json").write_text(json.dumps(content, indent=1))
    return clouds


def _write_view(
    job: tuple[Path, str, list[Solid], tuple[float, float], int],
) -> tuple[Array, NDArray[np.uint8]]:
    from PIL import Image

    folder, name, solids, view, resolution = job
    pose = camera_to_world(*view)
    image, depth = trace(solids, pose, resolution)
    pixels = (image * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    np.save(folder / f"{name}_depth.npy", depth.astype(np.float32))
    return _back_project(pixels, depth, pose)


def _back_project(pixels: NDArray[np.uint8], depth: Array, pose: Array) -> tuple[Array, NDArray[np.uint8]]:
    """World points and colours of every fourth fully covered pixel."""
    resolution = len(depth)
    focal = 0.5 * resolution / math.tan(0.5 * CAMERA_ANGLE)
    ys, xs = np.nonzero(pixels[..., 3] == 255)
    ys, xs = ys[::4], xs[::4]
    camera = np.stack(
        [(xs + 0.5 - resolution / 2) / focal, -(ys + 0.5 - resolution / 2) / focal, -np.ones(len(xs))],
        axis=-1,
    )
    points = camera * depth[ys, xs, None] @ pose[:3, :3].T + pose[:3, 3]
    return points, pixels[ys, xs, :3]

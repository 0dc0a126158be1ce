"""What is sigma good for? Several splat models fused by it, and the next view chosen by it, on bare tensors.

    python benchmarks/nerfstudio_phdropout_views.py [--scenes 0 1 2] [--part fusion|views]

Captures of the procedural scenes, small enough for a CPU; models are Gaussians trained by Adam through the
package's own rasterizer, their sigma is the exact one, plain and before an unknown background. No figure
depends on time, so they repeat up to rounding.

Fusion: models of one half-circle capture that differ by seed, and models of captures of different arcs,
judged on the whole orbit, alone and fused. Views: from a few views of an arc one view after the other is
added, and a model trained anew each time, by each sigma, at random, and at the largest angle from those there
are. Writes nerfstudio_phdropout_views.json (after every scene; one --part keeps what the file has of the
other) and a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from nerfstudio_phdropout import (  # noqa: E402
    ensemble_efficacy,
    fuse_by_uncertainty,
    max_dropout_ratio,
    next_best_views,
    rasterization,
    rasterization_moments,
    unknown_background_std,
    view_score,
)
from nerfstudio_phdropout.synthetic import CAMERA_ANGLE, camera_to_world, make_solids, trace  # noqa: E402

NAME = "nerfstudio_phdropout_views"
LEVELS = ("view", "pixel", "inverse_variance")
SIGMAS = ("sigma", "sigma before an unknown background")
RULES = (*SIGMAS, "random", "largest angle")
CAPTURES = ("one capture", "captures of three arcs")
Splats = dict[str, Tensor]


@dataclass(frozen=True)
class Capture:
    """Views of one scene: poses and intrinsics, images ``[V, H, W, 3]`` before black, and what is on them."""

    viewmats: Tensor
    Ks: Tensor
    images: Tensor
    azimuths: Tensor
    points: tuple[Tensor, ...]
    colors: tuple[Tensor, ...]

    def __getitem__(self, chosen: Sequence[int]) -> Capture:
        at = list(chosen)
        return Capture(
            self.viewmats[at], self.Ks[at], self.images[at], self.azimuths[at],
            tuple(self.points[i] for i in at), tuple(self.colors[i] for i in at),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)


def capture(seed: int, views: Sequence[tuple[float, float]], resolution: int) -> Capture:
    """Views at (azimuth, elevation) in degrees of the procedural scene ``seed``."""
    solids = make_solids(seed)
    focal = 0.5 * resolution / math.tan(0.5 * CAMERA_ANGLE)
    middle = resolution / 2
    viewmats, images, points, colors = [], [], [], []
    for azimuth, elevation in views:
        pose = camera_to_world(azimuth, elevation)
        image, depth = trace(solids, pose, resolution)
        images.append(image[..., :3] * image[..., 3:])
        viewmats.append(np.diag([1.0, -1.0, -1.0, 1.0]) @ np.linalg.inv(pose))
        ys, xs = np.nonzero(image[..., 3] > 0.99)
        camera = np.stack([(xs + 0.5 - middle) / focal, -(ys + 0.5 - middle) / focal, -np.ones(len(xs))], -1)
        points.append(camera * depth[ys, xs, None] @ pose[:3, :3].T + pose[:3, 3])
        colors.append(image[ys, xs, :3])
    tensor = lambda arrays: torch.from_numpy(np.stack(arrays)).float()  # noqa: E731
    lens = torch.tensor([[focal, 0, middle], [0, focal, middle], [0, 0, 1.0]])
    return Capture(
        tensor(viewmats), lens.expand(len(views), 3, 3), tensor(images), torch.tensor([v[0] for v in views]),
        *(tuple(torch.from_numpy(part).float() for part in parts) for parts in (points, colors)),
    )  # fmt: skip


def arc(low: float, high: float, count: int) -> list[tuple[float, float]]:
    """``count`` (azimuth, elevation), elevations in turn."""
    return [(low + (high - low) * i / max(count - 1, 1), (15.0, 32.0, 50.0)[i % 3]) for i in range(count)]


def train(seen: Capture, *, gaussians: int, steps: int, seed: int) -> Splats:
    """Gaussians that start on surface points of the training views, and differ by ``seed``."""
    random = torch.Generator().manual_seed(seed)
    points, colors = torch.cat(seen.points), torch.cat(seen.colors)
    start = torch.randint(len(points), (gaussians,), generator=random)
    jitter = torch.randn(gaussians, 3, generator=random) * 0.03
    parameters = {
        "means": points[start] + jitter,
        "quats": torch.randn(gaussians, 4, generator=random),
        "scales": torch.full((gaussians, 3), math.log(0.1)),
        "opacities": torch.full((gaussians,), 0.5),
        "colors": torch.logit(colors[start].clamp(0.05, 0.95)),
    }
    rates = {"means": 4e-3, "quats": 1e-2, "scales": 1.5e-2, "opacities": 4e-2, "colors": 3e-2}
    groups = [{"params": [parameters[n].requires_grad_()], "lr": rate} for n, rate in rates.items()]
    optimizer = torch.optim.Adam(groups, eps=1e-15)
    for _ in range(steps):
        view = [int(torch.randint(len(seen), (1,), generator=random))]
        image, _, _ = rasterization(**activated(parameters), **lens(seen[view]))
        loss = (image - seen.images[view]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in activated(parameters).items()}


def activated(parameters: Splats) -> Splats:
    """Arguments of `rasterization` from what Adam moves."""
    return {
        **parameters, "scales": parameters["scales"].exp(), "opacities": parameters["opacities"].sigmoid(),
        "colors": parameters["colors"].sigmoid(),
    }  # fmt: skip


def lens(views: Capture) -> dict[str, Any]:
    """Camera arguments of `rasterization`, before black."""
    height, width = views.images.shape[1:3]
    return {
        "viewmats": views.viewmats, "Ks": views.Ks, "width": width, "height": height,
        "backgrounds": torch.zeros(len(views), 3),
    }  # fmt: skip


def similarity(image: Tensor, target: Tensor) -> float:
    """SSIM of two ``[H, W, 3]``."""
    return float(
        structural_similarity(image.clamp(0, 1).numpy(), target.numpy(), channel_axis=-1, data_range=1.0)
    )


@torch.no_grad()
def sigmas_of(model: Splats, seen: Capture, views: Capture) -> tuple[Tensor, dict[str, Tensor], float]:
    """Plain images and sigmas ``[V, H, W, 3]`` of ``views``, and the ratio: it costs 5 % of training PSNR."""

    def quality(ratio: float) -> float:
        moments, _ = rasterization_moments(**model, **lens(seen), dropout_ratio=ratio)
        return -10 * math.log10(float(moments.expected_squared_error(seen.images).mean()))

    ratio = max_dropout_ratio(quality, 0.05).ratio
    moments, _ = rasterization_moments(**model, **lens(views), dropout_ratio=ratio)
    image, _, _ = rasterization(**model, **lens(views))
    return image, dict(zip(SIGMAS, (moments.std, unknown_background_std(moments)), strict=True)), ratio


def fuse_models(
    scene: int, captured: str, *, models: int, resolution: int, gaussians: int, steps: int, views: int = 8
) -> dict[str, Any]:
    """Squared errors of each model and of each fusion on the whole orbit, ``E_em``, and pictures.

    ``captured``: ``"one capture"`` of a half circle for all models, or ``"captures of three arcs"``, one for
    each of three models.
    """
    apart = captured == CAPTURES[1]
    models = 3 if apart else models
    arcs = [(120.0 * k, 120.0 * k + 130) if apart else (0.0, 180.0) for k in range(models)]
    test = capture(scene, arc(0, 360 * (1 - 1 / views), views), resolution)
    seen = [capture(scene, arc(*ends, 8 if apart else 12), resolution) for ends in arcs]
    trained = [train(s, gaussians=gaussians, steps=steps, seed=seed) for seed, s in enumerate(seen)]
    found = [sigmas_of(model, s, test) for model, s in zip(trained, seen, strict=True)]
    images, target = torch.stack([f[0] for f in found]), test.images
    error = lambda image: float(((image - target) ** 2).mean())  # noqa: E731
    ssim = [[similarity(image[v], target[v]) for image in images] for v in range(views)]
    result: dict[str, Any] = {
        "models": [error(image) for image in images],
        "plain mean": error(images.mean(0)),
        "ratios": [f[2] for f in found],
        "pictures": {"target": target, "images": images},
    }
    for kind in SIGMAS:
        stds = torch.stack([f[1][kind] for f in found])
        fused = {
            level: torch.stack([fuse_by_uncertainty(images[:, v], stds[:, v], level) for v in range(views)])
            for level in LEVELS
        }
        chosen = stds.mean(dim=(2, 3, 4)).argmin(0).tolist()
        efficacy = ensemble_efficacy(
            [row[k] for row, k in zip(ssim, chosen, strict=True)], [max(row) for row in ssim]
        )
        result[kind] = {**{level: error(image) for level, image in fused.items()}, "efficacy": efficacy}
        result["pictures"][kind] = stds, fused
    return result


def next_views(
    scene: int, rule: str, seed: int, *, resolution: int, gaussians: int, steps: int, rounds: int
) -> list[float]:
    """PSNR on the orbit after each round in which ``rule`` adds one of 16 candidate views."""
    start = arc(0, 60, 3)
    candidates = arc(11.25, 348.75, 16)
    pool = capture(scene, start + candidates, resolution)
    test = capture(scene, [(360 * (i + 0.5) / 8, (22.0, 40.0)[i % 2]) for i in range(8)], resolution)
    random = np.random.default_rng(seed)
    chosen = list(range(len(start)))
    curve = []
    for turn in range(rounds + 1):
        seen = pool[chosen]
        model = train(seen, gaussians=gaussians, steps=steps, seed=seed)
        with torch.no_grad():
            image, _, _ = rasterization(**model, **lens(test))
        curve.append(-10 * math.log10(float(((image - test.images) ** 2).mean())))
        if turn == rounds:
            break
        left = [i for i in range(len(pool)) if i not in chosen]
        chosen.append(left[next_best_views(scores(rule, model, seen, pool[left], random), 1)[0]])
    return curve


@torch.no_grad()
def scores(
    rule: str, model: Splats, seen: Capture, candidates: Capture, random: np.random.Generator
) -> list[float]:
    """How much a rule wants each candidate."""
    if rule == "random":
        return random.random(len(candidates)).tolist()
    if rule == "largest angle":
        apart = (candidates.azimuths[:, None] - seen.azimuths[None]).abs() % 360
        return torch.minimum(apart, 360 - apart).amin(1).tolist()
    return [view_score(sigma) for sigma in sigmas_of(model, seen, candidates)[1][rule]]


def draw(path: Path, found: dict[str, Any]) -> None:
    """One view: truth, models, their errors and sigmas, and the fusions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = found["pictures"]
    stds, fused = shown[SIGMAS[1]]
    view = len(shown["target"]) // 2
    target, images = shown["target"][view], shown["images"][:, view]
    lines: list[list[tuple[str, Tensor | None]]] = [
        [("truth", target), *((f"model {k}", image) for k, image in enumerate(images))],
        [("fused: model of lowest σ", fused["view"][view])],
        [("fused: weights 1 / σ²", fused["inverse_variance"][view])],
    ]
    lines[1] += [(f"error of model {k}", (i - target).abs().mean(-1)) for k, i in enumerate(images)]
    lines[2] += [(f"σ of model {k}", std[view].mean(-1)) for k, std in enumerate(stds)]
    tops = {"error": 0.0, "σ": 0.0}
    for title, panel in lines[1][1:] + lines[2][1:]:
        word = title.split()[0]
        tops[word] = max(tops[word], float(panel.quantile(0.995)))
    figure, axes = plt.subplots(3, len(lines[0]), figsize=(1.6 * len(lines[0]), 5.6))
    for row, line in zip(axes, lines, strict=True):
        for axis, (title, panel) in zip(row, line, strict=True):
            axis.axis("off")
            axis.set_title(title, fontsize=7)
            word = title.split()[0]
            colors = {"cmap": "magma" if word == "error" else "viridis", "vmin": 0, "vmax": tops.get(word)}
            kwargs = colors if word in tops else {}
            axis.imshow(panel.clamp(0, 1).numpy(), interpolation="nearest", **kwargs)
    figure.tight_layout(pad=0.4, h_pad=1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rows_of(fusion: dict[str, Any], views: dict[str, Any]) -> list[Headline]:
    """Means over scenes with their span."""
    rows = []

    def add(what: str, values: list[float], target: str = "", unit: str = "") -> None:
        note = f"mean of {len(values)}, least and most"
        rows.append(Headline(what, statistics.fmean(values), unit, min(values), max(values), target, note))

    for captured in CAPTURES if fusion else ():
        every = [found[captured] for found in fusion.values()]
        for kind in SIGMAS:
            for level in LEVELS:
                ratio = [found[kind][level] / min(found["models"]) for found in every]
                add(f"{captured}: MSE of fusion by {kind}, {level} / of the best model", ratio, "<= 1")
            add(f"{captured}: E_em by {kind}", [found[kind]["efficacy"] for found in every])
        ratio = [found["plain mean"] / min(found["models"]) for found in every]
        add(f"{captured}: MSE of the plain mean / of the best model", ratio)
    for rule in RULES if views else ():
        runs = [curve for found in views.values() for curve in found[rule]]
        add(f"PSNR after the last view, chosen by {rule}", [curve[-1] for curve in runs], unit="dB")
    return rows


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("fusion", "views", "all"), default="all")
    parser.add_argument("--scenes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, default=2, help="runs of each rule and scene")
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--gaussians", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/nerfstudio_phdropout_fusion.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = {"resolution": options.resolution, "gaussians": options.gaussians, "steps": options.steps}
    seeds = range(options.seeds)
    kept = options.out / f"{NAME}.json"
    before = json.loads(kept.read_text()) if options.part != "all" and kept.exists() else {}
    fusion: dict[str, Any] = before.get("fusion", {})
    views: dict[str, Any] = before.get("next_views", {})
    for scene in options.scenes:
        if options.part != "views":
            both = {c: fuse_models(scene, c, models=options.models, **size) for c in CAPTURES}
            if scene == options.scenes[0]:
                draw(options.figure, both[CAPTURES[1]])
            for found in both.values():
                del found["pictures"]
            fusion[f"scene {scene}"] = both
            print(scene, both, flush=True)
        if options.part != "fusion":
            views[f"scene {scene}"] = {
                rule: [next_views(scene, rule, seed, rounds=options.rounds, **size) for seed in seeds]
                for rule in RULES
            }
            print(scene, views[f"scene {scene}"], flush=True)
        write_result(
            NAME,
            question="Do models fused by sigma beat the best of them, and views chosen by it other choices?",
            headline=rows_of(fusion, views), samples={}, folder=options.out, fusion=fusion, next_views=views,
            settings={k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

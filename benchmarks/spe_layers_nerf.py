"""Few views: does SPE help a NeRF in nerfstudio, which initialisation, and is it more than a linear layer?

    python benchmarks/spe_layers_nerf.py --device cuda          about 150 s on an H100, in parallel processes

Procedural scenes of ``nerfstudio_phdropout.synthetic`` (8 training and 8 test views, 64 x 64). Every arm is a
model of nerfstudio in its own pipeline (pixel sampler, collider, RAdam as vanilla-nerf has it), with the same
rays, samples, steps, learning rates and seeds; fewer of each than vanilla-nerf's defaults. Rounds of all arms
one after another, so that a run that ends early has whole rounds. Test PSNR and SSIM by nerfstudio.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, Headline, write_result
from benchmarks.spe_layers_pool import run_pool

RATES = (5e-4, 2e-3)
# Options of spe-nerf's model; "vanilla-nerf" is nerfstudio's own.
FREE = {"annealing": True, "occlusion_loss_mult": 0.01}
ARMS: dict[str, dict[str, Any]] = {
    "vanilla-nerf": {},
    "PE L=6": {"first_layer": "relu", "num_bands": 6},
    "PE L=10": {"first_layer": "relu"},
    "linear L=10": {"first_layer": "identity"},
    "SPE uniform L=10": {},
    "SPE calibrated L=10": {"init": "calibrated"},
    "SPE calibrated L=10 decay 1": {"init": "calibrated", "decay": 1.0},
    "SPE uniform, bands from cameras": {"bands": "nyquist"},
    "FreeNeRF L=10": {"first_layer": "relu", **FREE},
    "FreeNeRF + SPE uniform L=10": {**FREE},
    "FreeNeRF + SPE calibrated L=10": {"init": "calibrated", **FREE},
}
# Differences that the documentation speaks of: (arm, the arm it is compared with).
PAIRS = [
    ("SPE uniform L=10", "PE L=10"),
    ("SPE calibrated L=10", "PE L=10"),
    ("linear L=10", "PE L=10"),
    ("SPE calibrated L=10", "SPE uniform L=10"),
    ("SPE calibrated L=10 decay 1", "SPE uniform L=10"),
    ("SPE uniform, bands from cameras", "SPE uniform L=10"),
    ("FreeNeRF + SPE uniform L=10", "FreeNeRF L=10"),
    ("FreeNeRF + SPE calibrated L=10", "FreeNeRF L=10"),
]
Job = tuple[str, int, int, float]  # arm, scene, seed, learning rate


@dataclass(frozen=True)
class Scale:
    """Training and test views, pixels a side, rays a step, coarse and further samples a ray, steps."""

    views: int = 8
    size: int = 64
    rays: int = 512
    coarse: int = 24
    fine: int = 48
    steps: int = 500


QUICK = Scale(views=2, size=12, rays=32, coarse=6, fine=6, steps=3)


def model_config(arm: str, scale: Scale) -> Any:
    """nerfstudio's model configuration of an arm."""
    from nerfstudio.models.vanilla_nerf import VanillaModelConfig

    from spe_layers.integrations.nerfstudio import SPENerfModelConfig

    samples = {"num_coarse_samples": scale.coarse, "num_importance_samples": scale.fine}
    if arm == "vanilla-nerf":
        return VanillaModelConfig(**samples)
    options = dict(ARMS[arm])
    if options.pop("annealing", False):
        options["annealing_steps"] = int(0.9 * scale.steps)
    return SPENerfModelConfig(**samples, **options)


class _NoLpips(torch.nn.Module):
    """vanilla-nerf's model downloads weights for LPIPS; this stands in their place and gives nothing."""

    def __init__(self, **_options: Any) -> None:
        super().__init__()

    def forward(self, *_images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(())


def build_pipeline(arm: str, folder: Path, scale: Scale, device: str) -> Any:
    """A pipeline of nerfstudio for this arm on this scene."""
    import torchmetrics.image.lpip
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
    from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig

    from spe_layers.integrations.nerfstudio import CameraDataManager

    torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity = _NoLpips
    config = VanillaPipelineConfig(
        datamanager=VanillaDataManagerConfig(
            _target=CameraDataManager,
            dataparser=BlenderDataParserConfig(data=folder),
            train_num_rays_per_batch=scale.rays,
            eval_num_rays_per_batch=scale.rays,
        ),
        model=model_config(arm, scale),
    )
    return config.setup(device=device)


def train(job: Job, scenes: Path, scale: Scale, device: str) -> dict[str, Any]:
    """Train one arm and score it on the test views; runs in a process of its own."""
    from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
    from nerfstudio.engine.optimizers import RAdamOptimizerConfig

    arm, scene, seed, rate = job
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    np.random.seed(seed)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = build_pipeline(arm, scenes / str(scene), scale, device)
        torch.manual_seed(seed)
        attributes = TrainingCallbackAttributes(None, None, pipeline, None)
        callbacks = pipeline.get_training_callbacks(attributes)
        optimiser = RAdamOptimizerConfig(lr=rate, eps=1e-8).setup(pipeline.get_param_groups()["fields"])
        pipeline.train()
        for step in range(scale.steps):
            for callback in callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            _, losses, _ = pipeline.get_train_loss_dict(step)
            optimiser.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimiser.step()
        pipeline.eval()
        metrics = pipeline.get_average_eval_image_metrics()
        camera, _ = next(iter(pipeline.datamanager.fixed_indices_eval_dataloader))
        with torch.no_grad():
            picture = pipeline.model.get_outputs_for_camera(camera)["rgb_fine"]
    bands = getattr(pipeline.model, "annealing", None)
    return {
        "psnr": float(metrics["psnr"]),
        "ssim": float(metrics["fine_ssim"]),
        "seconds": time.perf_counter() - start,
        "bands": bands.bands.num_bands if bands is not None else 10,
        "picture": (picture.clamp(0, 1) * 255).byte().cpu().numpy(),
    }


def jobs(seeds: int, scenes: int) -> list[Job]:
    """All of them; whole rounds of arms first."""
    rounds = itertools.product(range(seeds), range(scenes), RATES)
    return [(arm, scene, seed, rate) for seed, scene, rate in rounds for arm in ARMS]


def best_rates(found: dict[Job, dict[str, Any]]) -> dict[str, dict[tuple[int, int], float]]:
    """PSNR by arm and (scene, seed) at the arm's best learning rate, over what all that ran have done."""
    arms = [arm for arm in ARMS if any(job[0] == arm for job in found)]
    if not arms:
        return {}
    common = set.intersection(*({job[1:] for job in found if job[0] == arm} for arm in arms))
    rates = [rate for rate in RATES if any(rate == job[2] for job in common)]
    cells = sorted({cell[:2] for cell in common if all((*cell[:2], rate) in common for rate in rates)})
    if not cells:
        return {}
    table = {}
    for arm in arms:
        by_rate = [{cell: found[arm, *cell, rate]["psnr"] for cell in cells} for rate in rates]
        table[arm] = max(by_rate, key=lambda values: statistics.mean(values.values()))
    return table


def headline(found: dict[Job, dict[str, Any]]) -> list[Headline]:
    """Mean PSNR of each arm, and the differences of pairs over scenes and seeds."""
    table = best_rates(found)
    rows = [
        Headline(f"test PSNR: {arm}", statistics.mean(v.values()), "dB", min(v.values()), max(v.values()),
                 note=f"{len(v)} scene(s) x seed(s), lowest to highest")
        for arm, v in table.items()
    ]  # fmt: skip
    for arm, other in PAIRS:
        if not {arm, other} <= table.keys():
            continue
        gaps = [table[arm][cell] - table[other][cell] for cell in table[arm]]
        target = ">= 0.3" if arm == "FreeNeRF + SPE uniform L=10" else ""
        rows.append(Headline(f"{arm} - {other}", statistics.mean(gaps), "dB", min(gaps), max(gaps), target))
    return rows


def save(arguments: argparse.Namespace, found: dict[Job, dict[str, Any]], seconds: float) -> None:
    """Rewrite the result with what is done."""
    samples: dict[str, list[float]] = {}
    for (arm, scene, _seed, rate), result in sorted(found.items()):
        samples.setdefault(f"{arm}, scene {scene}, rate {rate:g} (dB)", []).append(result["psnr"])
    write_result(
        "spe_layers_nerf",
        question="Does SPE help a few-view NeRF in nerfstudio, and is it more than the linear control?",
        headline=headline(found),
        samples=samples,
        folder=arguments.out,
        scale=asdict(QUICK if arguments.quick else Scale()),
        learning_rates=list(RATES),
        seconds=round(seconds, 1),
        float32_matmul_precision="high",
        runs=[
            {"arm": arm, "scene": scene, "seed": seed, "rate": rate}
            | {key: value for key, value in result.items() if key != "picture"}
            for (arm, scene, seed, rate), result in sorted(found.items())
        ],
    )


def draw(found: dict[Job, dict[str, Any]], truth: Path, path: Path) -> None:
    """One test view of scene 0 by every arm, each at its best learning rate, beside the truth."""
    import matplotlib.pyplot as plt
    from PIL import Image

    image = np.asarray(Image.open(truth).convert("RGBA"), dtype=float) / 255
    tiles = {"truth": image[..., :3] * image[..., 3:] + 1 - image[..., 3:]}
    for arm in ARMS:
        runs = [r for job, r in found.items() if job[:3] == (arm, 0, 0)]
        if runs:
            best = max(runs, key=lambda r: r["psnr"])
            tiles[f"{arm}\n{best['psnr']:.1f} dB"] = best["picture"] / 255
    columns = 7
    rows = -(-len(tiles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.9 * rows), layout="tight")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, tile) in zip(axes.flat, tiles.items(), strict=False):
        axis.imshow(tile)
        axis.set_title(name, fontsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=150, help="seconds, after which no run is started")
    parser.add_argument("--quick", action="store_true", help="tiny pictures and 3 steps: does it run?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="processes that share the device")
    parser.add_argument("--arms", nargs="+", help="only these")
    arguments = parser.parse_args()
    for name in set(ARMS) - set(arguments.arms or ARMS):
        del ARMS[name]
    from nerfstudio_phdropout.synthetic import write_scene

    scale = QUICK if arguments.quick else Scale()
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder)
        for scene in range(arguments.scenes):
            write_scene(scenes / str(scene), num_train=scale.views, num_eval=scale.views,
                        resolution=scale.size, seed=scene)  # fmt: skip
        found = run_pool(
            train,
            jobs(arguments.seeds, arguments.scenes),
            (scenes, scale, arguments.device),
            workers=arguments.workers,
            budget=arguments.budget,
            save=partial(save, arguments),
        )
        draw(found, scenes / "0" / "test" / "r_000.png", arguments.out / "spe_layers_nerf.png")
    for row in headline(found):
        print(f"{row.what:60s} {row.value:7.2f} {row.low:7.2f} {row.high:7.2f} {row.target}")
    print(f"{len(found)} runs, longest {max((r['seconds'] for r in found.values()), default=0):.0f} s")


if __name__ == "__main__":
    main()

"""Does sigma say where a scene is wrong? Half-orbit captures, a splat and a NeRF model, several estimators.

    python benchmarks/nerfstudio_phdropout_quality.py [--scenes 0 1] [--members 3] [--out DIR]

Trains the -tiny methods on a CPU by nerfstudio's own train command (work folder: --work), so everything is
small and errors are large on the unseen side. Peers: Monte Carlo, the authors' settings, an ensemble of other
seeds, noise, and 1 - accumulation. Writes the result, and a sheet of pictures a scene to docs/images.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from nerfstudio_phdropout import PHDropoutConfig, uncertainty_metrics  # noqa: E402
from nerfstudio_phdropout.synthetic import write_scene  # noqa: E402

QUOTED = ("spearman", "foreground_spearman", "ause", "foreground_ause", "nll", "coverage95")


def prepare(work: Path) -> None:
    """LPIPS wants weights at construction; random ones need no network and lpips is not reported."""
    import torchvision

    weights = work / "torch/hub/checkpoints/alexnet-owt-7be5be79.pth"
    weights.parent.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), weights)
    os.environ["TORCH_HOME"] = str(work / "torch")


def train(method: str, data: Path, work: Path, seed: int, steps: int) -> tuple[Any, float]:
    """A trained pipeline and the seconds it took."""
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts import train as command
    from nerfstudio.utils.eval_utils import eval_setup

    config = copy.deepcopy(all_methods[method])
    config.data, config.output_dir, config.timestamp = data, work / "outputs", f"seed{seed}"
    config.experiment_name, config.max_num_iterations = data.name, steps
    config.machine.seed = seed
    start = time.perf_counter()
    path = config.get_base_dir() / "config.yml"
    if not list(config.get_checkpoint_dir().glob("*.phdropout.json")):
        command.main(config)
    seconds = time.perf_counter() - start
    return eval_setup(path, test_mode="test")[1], seconds


@torch.no_grad()
def images(pipeline: Any, settings: PHDropoutConfig, views: list[int]) -> list[dict[str, Tensor]]:
    """Model outputs of evaluation views; ``settings`` replace the run's own, except for the ratio."""
    model = pipeline.model
    own, ratio = model.config.phdropout, model.dropout_ratio()
    model.config.phdropout = dataclasses.replace(settings, ratio=ratio)
    cameras = pipeline.datamanager.eval_dataset.cameras
    found = [model.get_outputs_for_camera(cameras[i : i + 1]) for i in views]
    model.config.phdropout = own
    return found


def score(
    views: list[dict[str, Tensor]], sigmas: list[Tensor], truths: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Metrics over all views at once, each estimator judged against the error of its own mean image."""
    mean = torch.cat([view["rgb_mean"] for view in views])
    target, mask = (torch.cat(parts) for parts in zip(*truths, strict=True))
    return uncertainty_metrics(mean, torch.cat(sigmas), target, mask)


def with_sigma(views: list[dict[str, Tensor]], name: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Baselines: sigma from noise or from what the model leaves transparent, the mean the plain image."""
    plain = [{"rgb_mean": view["rgb"]} for view in views]
    if name == "random":
        generator = torch.Generator().manual_seed(0)
        return plain, [torch.rand(view["rgb"].shape, generator=generator) * 0.1 for view in views]
    return plain, [(1 - view["accumulation"]).clamp(min=0).expand_as(view["rgb"]) for view in views]


def ensemble(members: list[list[dict[str, Tensor]]]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Mean and standard deviation over separately trained models."""
    stacks = [torch.stack([views[i]["rgb"] for views in members]) for i in range(len(members[0]))]
    return [{"rgb_mean": stack.mean(0)} for stack in stacks], [stack.std(0) for stack in stacks]


def judge(method: str, data: Path, work: Path, *, steps: int, members: int, num_views: int) -> dict[str, Any]:
    """All estimators on one scene."""
    splats = "splat" in method
    pipeline, seconds = train(method, data, work, 0, steps)
    dataset, model = pipeline.datamanager.eval_dataset, pipeline.model
    chosen = [i * len(dataset) // num_views for i in range(num_views)]
    raw = [dataset.get_data(i)["image"] for i in chosen]
    truths = [(model.ground_truth(image), image[..., 3:] > 0.5) for image in raw]
    trials = 100 if splats else 30
    arms: dict[str, PHDropoutConfig] = {
        "monte carlo": PHDropoutConfig(estimator="monte_carlo", num_trials=trials, layers="hidden"),
        "authors' settings": PHDropoutConfig.reference("splat" if splats else "nerf"),
    }
    if splats:
        arms = {"exact": PHDropoutConfig(), **arms}
    else:
        arms["first layer, mask a trial"] = PHDropoutConfig(num_trials=trials, layers="first")
        arms["hidden layers, mask a sample"] = PHDropoutConfig(
            num_trials=trials, layers="hidden", mask="sample"
        )
    scores, pictures, spent = {}, {}, {}
    for name, settings in arms.items():
        start = time.perf_counter()
        views = images(pipeline, settings, chosen)
        spent[name] = (time.perf_counter() - start) / len(views)
        sigmas = [view["rgb_std"] for view in views]
        scores[name], pictures[name] = score(views, sigmas, truths), sigmas
    first = next(iter(arms.values()))
    others = [images(train(method, data, work, seed, steps)[0], first, chosen) for seed in range(1, members)]
    baselines = {"random": with_sigma(views, "random"), "1 - accumulation": with_sigma(views, "accumulation")}
    if others:
        baselines[f"ensemble of {members}"] = ensemble([views, *others])
    for name, (means, sigmas) in baselines.items():
        scores[name], pictures[name] = score(means, sigmas, truths), sigmas
    mse = [float(((view["rgb"] - truth) ** 2).mean()) for view, (truth, _) in zip(views, truths, strict=True)]
    return {
        "scores": scores,
        "seconds_a_view": spent,
        "training_seconds": seconds,
        "ratio": model.dropout_ratio(),
        "psnr_of_views": [float(-10 * np.log10(value)) for value in mse],
        "sheet": {"views": views, "truths": truths, "sigmas": pictures},
    }


def draw(path: Path, results: dict[str, dict[str, Any]], view: int) -> None:
    """Truth, image, error and the sigma of each estimator, a row a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = max(len(result["sheet"]["sigmas"]) for result in results.values()) + 3
    figure, axes = plt.subplots(
        len(results), columns, figsize=(1.75 * columns, 2.05 * len(results)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (method, result) in zip(axes, results.items(), strict=True):
        sheet = result["sheet"]
        truth, image = sheet["truths"][view][0], sheet["views"][view]["rgb"]
        error = (image - truth).abs().mean(-1)
        panels: list[tuple[str, Tensor, str | None]] = [
            ("truth", truth, None), (method.removesuffix("-tiny"), image, None), ("|error|", error, "magma"),
        ]  # fmt: skip
        for name, sigmas in sheet["sigmas"].items():
            panels.append(("sigma: " + name.replace(", ", ",\n"), sigmas[view].mean(-1), "viridis"))
        for axis, (title, panel, colors) in zip(row, panels, strict=False):
            top = {} if colors is None else {"vmin": 0, "vmax": max(float(panel.quantile(0.995)), 1e-6)}
            axis.imshow(
                panel.clamp(min=0).numpy() if colors else panel.clamp(0, 1).numpy(), cmap=colors, **top
            )
            axis.set_title(title, fontsize=7)
    figure.tight_layout(pad=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run scenes, write the result and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--members", type=int, default=3, help="splat models of the ensemble, 1 for none")
    parser.add_argument("--nerf-members", type=int, default=1, help="NeRF models of the ensemble, 1 for none")
    parser.add_argument(
        "--views", type=int, default=6, help="evaluation views judged, of 8 on the whole orbit"
    )
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--splat-steps", type=int, default=400)
    parser.add_argument("--nerf-steps", type=int, default=400)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "phdropout_quality")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare(options.work)
    rows: list[Headline] = []
    kept: dict[str, Any] = {}
    for seed in options.scenes:
        data = options.work / f"half{seed}_{options.resolution}"
        if not (data / "points.npz").exists():
            write_scene(
                data,
                num_train=18,
                num_eval=8,
                resolution=options.resolution,
                train_azimuth=(0, 180),
                seed=seed,
            )
        results = {
            method: judge(method, data, options.work, steps=steps, members=members, num_views=options.views)
            for method, steps, members in (
                ("phd-splatfacto-tiny", options.splat_steps, options.members),
                ("phd-nerfacto-tiny", options.nerf_steps, options.nerf_members),
            )
        }
        draw(ROOT / f"docs/images/nerfstudio_phdropout_scene{seed}.png", results, view=options.views * 2 // 3)
        for method, result in results.items():
            result.pop("sheet")
            kept[f"scene {seed}, {method}"] = result
            for arm, values in result["scores"].items():
                for metric in ("foreground_spearman", "ause"):
                    value = values[metric]
                    found = None if np.isnan(value) else value
                    rows.append(Headline(f"{metric}, scene {seed}, {method}: {arm}", found, ""))
                print(seed, method, arm, {name: round(values[name], 3) for name in QUOTED}, flush=True)
        clean = {
            name: {
                **r,
                "scores": {
                    a: {k: None if np.isnan(v) else v for k, v in s.items()} for a, s in r["scores"].items()
                },
            }
            for name, r in kept.items()
        }
        write_result(
            "nerfstudio_phdropout_quality",
            question="Which uncertainty ranks and sizes the errors of half-orbit captures best?",
            headline=rows,
            samples={},
            folder=options.out,
            results=clean,
            note="seconds_a_view were taken beside other work on the machine and say little",
        )


if __name__ == "__main__":
    main()

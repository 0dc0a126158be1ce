"""What one job of nerfstudio_phdropout_scenes.py does: train a member of an ensemble, and judge its sigmas.

Models are nerfstudio's own nerfacto and splatfacto in their PH-Dropout form, trained by nerfstudio's trainer.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics.image.lpip
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from nerfstudio_phdropout import (  # noqa: E402
    PHDropoutConfig,
    ause,
    drop_uniforms,
    ensemble_efficacy,
    fuse_by_uncertainty,
    max_dropout_ratio,
    nll,
    spearman,
    uncertainty_metrics,
    unknown_background_std,
)
from nerfstudio_phdropout.information import (  # noqa: E402
    SplatInformation,
    add_information,
    displacement_std,
    information_variance,
    ratios_from_information,
)
from nerfstudio_phdropout.nerfstudio_baselines import (  # noqa: E402
    fisher_map,
    fisher_table,
    laplace_grid,
    laplace_map,
    training_rays,
)
from nerfstudio_phdropout.nerfstudio_dataparser import PHDSyntheticDataParserConfig  # noqa: E402
from nerfstudio_phdropout.nerfstudio_methods import (  # noqa: E402
    phd_nerfacto_tiny,
    phd_splatfacto,
    phd_splatfacto_tiny,
)
from nerfstudio_phdropout.nerfstudio_models import _ssim  # noqa: E402
from nerfstudio_phdropout.rasterize import rasterization, rasterization_moments  # noqa: E402

# Only every other pixel of a map is scored, along each axis.
SCORED = 2
Maps = tuple[Tensor, Tensor]


class NoLPIPS(nn.Module):
    """LPIPS wants weights from the network at construction and is not reported."""

    def __init__(self, **_options: Any) -> None:
        super().__init__()

    def forward(self, image: Tensor, _target: Tensor) -> Tensor:
        """Nothing."""
        return image.new_zeros(())


torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity = NoLPIPS  # type: ignore[misc]


# The member that is trained with dropout, at this ratio, as MC dropout wants it.
TRAINED, TRAINED_RATIO = -1, 0.1
FIRST_MASK = 1_000_000  # masks of training are others than those of the trials


@dataclass(frozen=True)
class Job:
    """One model to train: member 0 of a scene is judged, the others only give images to the ensemble.

    Member ``TRAINED`` is a model trained with dropout: of hidden units, or of Gaussians. ``only`` names the
    arms wanted, all if empty.
    """

    kind: str
    scene: int
    member: int
    data: Path
    work: Path
    device: str
    steps: int
    trials: int
    stride: int
    views: int
    small: bool
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique among the jobs."""
        return f"{self.kind}{self.scene}_{'trained' if self.member == TRAINED else self.member}"


def trainer_config(job: Job) -> Any:
    """The method's configuration: stock optimizers and losses, bounds and sizes for the procedural scenes."""
    parser = PHDSyntheticDataParserConfig(data=job.data, max_points=1200 if job.small else 20_000)
    if job.kind == "nerfacto":
        config = copy.deepcopy(phd_nerfacto_tiny.config)
        config.pipeline.datamanager = VanillaDataManagerConfig(
            dataparser=parser, eval_num_rays_per_batch=64,
            train_num_rays_per_batch=512 if job.small else 2048,
        )  # fmt: skip
        if not job.small:
            model = config.pipeline.model
            model.num_levels, model.max_res, model.log2_hashmap_size = 12, 1024, 17
            model.num_proposal_iterations, model.num_proposal_samples_per_ray = 1, (48,)
            model.num_nerf_samples_per_ray = 24
            model.proposal_warmup, model.proposal_weights_anneal_max_num_iters = 300, 200
            model.eval_num_rays_per_chunk = 1 << 15
        for group in config.optimizers.values():
            group["scheduler"].max_steps = job.steps
    else:
        source = phd_splatfacto_tiny if job.small else phd_splatfacto
        config = copy.deepcopy(source.config)
        config.pipeline.datamanager = FullImageDatamanagerConfig(dataparser=parser, cache_images_type="uint8")
        config.pipeline.model.num_downscales = 0
    tiny = phd_nerfacto_tiny.config
    for name in ("steps_per_eval_batch", "steps_per_eval_image", "steps_per_eval_all_images"):
        setattr(config, name, 0)
    config.viewer, config.vis, config.steps_per_save = copy.deepcopy(tiny.viewer), "tensorboard", 1_000_000
    config.logging.local_writer.enable, config.logging.steps_per_log = False, 1000
    config.logging.profiler = "none"
    config.data, config.output_dir = job.data, job.work / "outputs"
    config.experiment_name, config.timestamp = f"scene{job.scene}", job.name
    config.max_num_iterations = job.steps
    config.machine.device_type, config.machine.seed = job.device, max(job.member, 0)
    # The ratio of each arm is searched later, on fewer pixels; a given one keeps the trainer from searching.
    config.pipeline.model.phdropout = PHDropoutConfig(ratio=0.05, num_trials=job.trials, layers="hidden")
    return config


def train(job: Job) -> tuple[Any, float]:
    """A trained pipeline in evaluation mode, and the seconds of its training loop.

    Weights that a former run left in the work folder are taken as they are, at 0 seconds.
    """
    config = trainer_config(job)
    kept = job.work / f"{job.name}.pt"
    random.seed(config.machine.seed)
    np.random.seed(config.machine.seed)
    torch.manual_seed(config.machine.seed)
    config.get_base_dir().mkdir(parents=True, exist_ok=True)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup(test_mode="test")
    if job.member == TRAINED:
        _drop_in_training(trainer)
    start = time.perf_counter()
    if kept.exists():
        trainer.pipeline.model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        trainer.train()
        torch.save(trainer.pipeline.model.state_dict(), kept)
    if job.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    trainer.pipeline.eval()
    return trainer.pipeline, seconds


def _drop_in_training(trainer: Any) -> None:
    """A fresh mask for every training step, at the ratio of MC dropout."""
    plain, model = trainer.train_iteration, trainer.pipeline.model
    if hasattr(model, "gauss_params"):
        masked_class = type("Masked", (_MaskedOpacities, type(model)), {"mask_number": 0})
        usual_class = type(model)

    def masked(step: int) -> Any:
        if not hasattr(model, "gauss_params"):
            with model._trial(TRAINED_RATIO, FIRST_MASK + step):
                return plain(step)
        model.__class__, masked_class.mask_number = masked_class, FIRST_MASK + step
        try:
            return plain(step)
        finally:
            model.__class__ = usual_class

    trainer.train_iteration = masked


class _MaskedOpacities:
    """A splatfacto whose Gaussians are dropped, differentiably for those that stay."""

    mask_number: int
    gauss_params: Any

    @property
    def opacities(self) -> Tensor:
        """Logits ``[N, 1]``; those of dropped Gaussians are next to nothing."""
        logits = self.gauss_params["opacities"]
        drawn = drop_uniforms(len(logits), seed=0, trial=self.mask_number, device=logits.device)
        return torch.where(drawn[:, None] < TRAINED_RATIO, logits.detach() - 40.0, logits)


def tensors(job: Job, pipeline: Any, split: str, count: int) -> tuple[list[Any], Tensor, Tensor]:
    """Cameras of ``count`` views, their images ``[V, h, w, 3]`` and masks ``[V, h, w, 3]``, strided."""
    dataset = getattr(pipeline.datamanager, f"{split}_dataset")
    chosen = [index * len(dataset) // count for index in range(count)]
    cameras = [dataset.cameras[i : i + 1].to(pipeline.device) for i in chosen]
    raw = [dataset.get_data(i)["image"].to(pipeline.device) for i in chosen]
    step = slice(None, None, job.stride)
    images = torch.stack([pipeline.model.ground_truth(image)[step, step] for image in raw])
    masks = torch.stack([(image[step, step, 3:] > 0.5).expand(-1, -1, 3) for image in raw])
    return cameras, images, masks


class NerfArms:
    """Sigmas of a nerfacto on strided rays of some views."""

    def __init__(self, job: Job, pipeline: Any) -> None:
        self.job, self.model = job, pipeline.model
        self.cameras, self.targets, self.masks = tensors(job, pipeline, "eval", job.views)
        self.rays = [self._rays(camera, job.stride) for camera in self.cameras]
        coarse = dataclasses.replace(job, stride=1 if job.small else 4)
        views, self.search_targets, _ = tensors(coarse, pipeline, "train", 4)
        self.search_rays = [self._rays(camera, coarse.stride) for camera in views]
        self.training = pipeline.datamanager.train_dataset.cameras.to(pipeline.device)
        self.ratios: dict[str, float] = {}

    @staticmethod
    def _rays(camera: Any, stride: int) -> Any:
        return camera.generate_rays(camera_indices=0, keep_shape=True)[::stride, ::stride]

    def _per_view(self, one: Callable[[Any], Tensor]) -> Tensor:
        """``one`` of ``[R]`` rays, chunk by chunk, back to ``[V, h, w, ...]``."""
        chunk = self.model.config.eval_num_rays_per_chunk
        found = []
        for rays in self.rays:
            flat = rays.flatten()
            parts = [one(flat[i : i + chunk]) for i in range(0, len(flat), chunk)]
            found.append(torch.cat(parts).view(*rays.shape, -1))
        return torch.stack(found)

    def plain(self) -> Tensor:
        """Images without dropout, ``[V, h, w, 3]``."""
        return torch.stack([self.model.masked_rgb_of_rays(rays, 0.0, 0) for rays in self.rays])

    def accumulation(self) -> Tensor:
        """``[V, h, w, 1]``."""
        with torch.no_grad():
            return self._per_view(lambda rays: self.model(rays)["accumulation"])

    def search(self, settings: PHDropoutConfig) -> float:
        """The largest ratio that costs 5 % of training SSIM."""
        self.model.config.phdropout = settings

        def quality(ratio: float) -> float:
            images = [self.model.masked_rgb_of_rays(rays, ratio, 0).clamp(0, 1) for rays in self.search_rays]
            scores = [_ssim(a, b) for a, b in zip(images, self.search_targets, strict=True)]
            return sum(scores) / len(scores)

        return max_dropout_ratio(quality, 0.05, first_violating=settings.first_violating).ratio

    def dropout(self, name: str, settings: PHDropoutConfig) -> Maps:
        """Mean and sigma of an arm of PH-Dropout, at the ratio found for it (kept for a second call)."""
        if name not in self.ratios:
            self.ratios[name] = self.search(settings)
        self.model.config.phdropout = settings
        moments = [self.model.moments_for_rays(rays, self.ratios[name]) for rays in self.rays]
        return (
            torch.stack([m.mean[..., :3] for m in moments]),
            torch.stack([m.std[..., :3] for m in moments]),
        )

    def trained_dropout(self) -> Maps:
        """MC dropout of a model that was trained with it."""
        self.ratios["trained MC dropout"] = TRAINED_RATIO
        return self.dropout(
            "trained MC dropout", PHDropoutConfig(num_trials=self.job.trials, layers="hidden")
        )

    def laplace(self) -> Maps:
        """BayesRays."""
        small = self.job.small
        batches = training_rays(self.training, 2048 if small else 65_536, 512 if small else 4096)
        grid = laplace_grid(self.model, batches, 32 if small else 128)
        found = self._per_view(lambda rays: laplace_map(self.model, rays, grid))
        return self.plain(), found.expand(-1, -1, -1, 3)

    def fisher(self) -> Maps:
        """FisherRF on the hash table."""
        small = self.job.small
        batches = training_rays(self.training, 2048 if small else 65_536, 256 if small else 1024)
        information = fisher_table(self.model, batches)
        return self.plain(), self._per_view(lambda rays: fisher_map(self.model, rays, information)).sqrt()

    def arms(self) -> dict[str, Callable[[], Maps]]:
        """Name -> what gives mean and sigma, most important first."""
        trials = self.job.trials
        modes = {
            "hidden units": PHDropoutConfig(num_trials=trials, layers="hidden"),
            "hash entries": PHDropoutConfig(num_trials=trials, layers="table"),
            "hash features": PHDropoutConfig(num_trials=trials, layers="features"),
            "authors' settings": dataclasses.replace(PHDropoutConfig.reference("nerf"), num_trials=trials),
            "hash entries, proposals too": PHDropoutConfig(
                num_trials=trials, layers="table", mask_proposal_networks=True
            ),
            "first layers": PHDropoutConfig(num_trials=trials, layers="first"),
            "hidden units, mask a sample": PHDropoutConfig(num_trials=trials, layers="hidden", mask="sample"),
        }
        ours = {
            name: lambda name=name, settings=settings: self.dropout(name, settings)
            for name, settings in modes.items()
        }
        peers = {"Laplace (BayesRays)": self.laplace, "Fisher (FisherRF)": self.fisher}
        first = dict(list(ours.items())[:4])
        return {**first, **peers, **ours}


class SplatArms:
    """Sigmas of a splatfacto; whole views are rendered and strided afterwards."""

    def __init__(self, job: Job, pipeline: Any) -> None:
        self.job, self.model = job, pipeline.model
        self.dataset = pipeline.datamanager.train_dataset
        # Trained before random colours; judged before the black that nerfacto is judged before.
        self.model.config.background_color = "black"
        self.cameras, self.targets, self.masks = tensors(job, pipeline, "eval", job.views)
        self.training, _, _ = tensors(job, pipeline, "train", 4 if job.small else 12)
        self.ratios: dict[str, float] = {}
        self.seen: SplatInformation | None = None

    def _strided(self, images: list[Tensor]) -> Tensor:
        step = slice(None, None, self.job.stride)
        return torch.stack([image[step, step] for image in images])

    def _render_arguments(self, camera: Any) -> dict[str, Any]:
        return {
            **self.model._gaussians(),
            **self.model._view(camera),
            "backgrounds": self.model._get_background_color()[None],
            "rasterize_mode": self.model.config.rasterize_mode,
        }

    def plain(self) -> Tensor:
        """Images without dropout, ``[V, h, w, 3]``."""
        return self._strided([self.model.plain_rgb(camera) for camera in self.cameras])

    @torch.no_grad()
    def accumulation(self) -> Tensor:
        """``[V, h, w, 1]``."""
        return self._strided([rasterization(**self._render_arguments(c))[1][0] for c in self.cameras])

    def dropout(self, name: str, settings: PHDropoutConfig) -> Maps:
        """Mean and sigma of an arm of PH-Dropout, at the ratio found for it (kept for a second call)."""
        self.model.config.phdropout = settings
        if name not in self.ratios:
            self.ratios[name] = self.model.search_ratio(self.dataset).ratio
        moments = [self.model.moments_for_camera(camera, self.ratios[name]) for camera in self.cameras]
        return self._strided([m.mean for m in moments]), self._strided([m.std for m in moments])

    def trained_dropout(self) -> Maps:
        """MC dropout of a model that was trained with it: its exact limit of many trials."""
        self.ratios["trained MC dropout"] = TRAINED_RATIO
        return self.dropout("trained MC dropout", PHDropoutConfig())

    def own_sigma(self) -> Tensor:
        """The exact sigma of this model, at the ratio found for it."""
        return self.dropout("exact", PHDropoutConfig(search_views=2 if self.job.small else 4))[1]

    @torch.no_grad()
    def information(self) -> SplatInformation:
        """What training views say about the Gaussians."""
        if self.seen is None:
            means = self.model._gaussians()["means"]
            self.seen = SplatInformation.zeros(len(means), like=means)
            for camera in self.training:
                add_information(self.seen, **self._render_arguments(camera))
        return self.seen

    @torch.no_grad()
    def by_information(self) -> Maps:
        """Exact moments with a ratio for each Gaussian; the mean ratio is the one found for all."""
        ratio = self.ratios.get("exact", 0.05)
        ratios = ratios_from_information(self.information(), ratio)
        moments = [
            rasterization_moments(**self._render_arguments(c), dropout_ratio=ratios)[0] for c in self.cameras
        ]
        return self._strided([m.mean[0] for m in moments]), self._strided([m.std[0] for m in moments])

    @torch.no_grad()
    def unknown_background(self) -> Maps:
        """Exact moments, and the spread of a background of which nothing is known."""
        ratio = self.ratios.get("exact", 0.05)
        moments = [
            rasterization_moments(**self._render_arguments(c), dropout_ratio=ratio)[0] for c in self.cameras
        ]
        return (
            self._strided([m.mean[0] for m in moments]),
            self._strided([unknown_background_std(m)[0] for m in moments]),
        )

    @torch.no_grad()
    def laplace(self) -> Maps:
        """BayesRays' displacements, one for each Gaussian, rendered as a colour."""
        spread = displacement_std(self.information())[:, None].expand(-1, 3)
        images = []
        for camera in self.cameras:
            arguments = {**self._render_arguments(camera), "colors": spread, "sh_degree": None}
            arguments["backgrounds"] = torch.zeros_like(arguments["backgrounds"])
            images.append(rasterization(**arguments)[0][0])
        return self.plain(), self._strided(images)

    @torch.no_grad()
    def fisher(self) -> Maps:
        """FisherRF."""
        images = [
            information_variance(self.information(), **self._render_arguments(c))[0].sqrt()
            for c in self.cameras
        ]
        return self.plain(), self._strided(images)

    def arms(self) -> dict[str, Callable[[], Maps]]:
        """Name -> what gives mean and sigma, most important first."""
        trials = self.job.trials if self.job.small else 100
        views = 2 if self.job.small else 4
        exact = PHDropoutConfig(search_views=views)
        sampled = PHDropoutConfig(estimator="monte_carlo", num_trials=trials, search_views=views)
        authors = dataclasses.replace(
            PHDropoutConfig.reference("splat"), num_trials=trials, search_views=views
        )
        return {
            "exact": lambda: self.dropout("exact", exact),
            "exact, background unknown": self.unknown_background,
            "Fisher (FisherRF)": self.fisher,
            "Laplace (BayesRays)": self.laplace,
            "exact, ratios by information": self.by_information,
            "Monte Carlo": lambda: self.dropout("Monte Carlo", sampled),
            "authors' settings": lambda: self.dropout("authors' settings", authors),
        }


def score(
    mean: Tensor, sigma: Tensor, target: Tensor, mask: Tensor, *, plain: Tensor
) -> dict[str, float | None]:
    """Metrics over all views together, ``[V, h, w, 3]`` each.

    Beside those of `uncertainty_metrics`, whose error is that of ``mean``: the NLL that sigma would have at
    its best scale; as ``plain_...`` how sigma ranks the errors of the plain image, one for all arms; and how
    much larger the mean foreground sigma is on the side that training did not see.
    """
    step = slice(None, None, SCORED)
    m, s, t, k, p = (
        x[:, step, step].cpu().reshape(len(x), -1, x.shape[-1]).float()
        for x in (mean, sigma, target, mask, plain)
    )
    found: dict[str, float] = uncertainty_metrics(m, s, t, k[..., :1])
    inside = k > 0.5
    found["nll_best_scale"] = best_nll(m, s, t)
    found["foreground_nll_best_scale"] = best_nll(m[inside], s[inside], t[inside])
    error = (p - t).abs()
    found["plain_ause"] = ause(error, s)
    found["plain_foreground_ause"] = ause(error[inside], s[inside])
    found["plain_foreground_spearman"] = spearman(error[inside], s[inside])
    # Views go round the orbit and training saw its first half.
    half = len(s) // 2
    seen, unseen = float(s[:half][inside[:half]].mean()), float(s[half:][inside[half:]].mean())
    found["unseen_over_seen"] = unseen / max(seen, 1e-12)
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def best_nll(mean: Tensor, sigma: Tensor, target: Tensor) -> float:
    """NLL at the factor on sigma that suits it best: what it says apart from its unit."""
    unit = max(float(sigma.mean()), 1e-12)
    search = minimize_scalar(
        lambda log: nll(target, mean, sigma * float(np.exp(log)) / unit), bounds=(-9, 3), method="bounded"
    )
    return float(search.fun)


def fusion(images: Tensor, sigmas: Tensor, target: Tensor) -> dict[str, float]:
    """What choosing between models by sigma gives.

    Args:
        images, sigmas: ``[K, V, h, w, 3]`` of K models and V views.
        target: ``[V, h, w, 3]``.

    Returns:
        Mean squared error of each model and of each way to fuse them, and ``efficacy`` (E_em, by SSIM).
    """
    found = {f"model {k}": float(((image - target) ** 2).mean()) for k, image in enumerate(images)}
    for level in ("view", "pixel", "inverse_variance"):
        fused = [fuse_by_uncertainty(images[:, v], sigmas[:, v], level) for v in range(len(target))]
        found[level] = float(((torch.stack(fused) - target) ** 2).mean())
    scores = [[_ssim(image[v], target[v]) for image in images] for v in range(len(target))]
    chosen = sigmas.mean(dim=(2, 3, 4)).argmin(0).tolist()
    found["efficacy"] = ensemble_efficacy(
        [row[k] for row, k in zip(scores, chosen, strict=True)], [max(row) for row in scores]
    )
    return found


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return -10 * float(np.log10(max(float(((image - target) ** 2).mean()), 1e-10)))

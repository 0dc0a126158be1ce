"""nerfstudio's nerfacto, vanilla-nerf and splatfacto with an uncertainty beside every image.

``rgb``, ``depth``, ``accumulation`` stay the plain model's. Added: ``rgb_mean``, ``rgb_std`` ``[H, W, 3]``,
``uncertainty``, ``accumulation_std``, ``depth_std`` ``[H, W, 1]``, and for splats ``uncertainty_with_holes``,
which is large where the model is transparent. nerfstudio's internals are used in the ``nerfstudio_*.py``
files only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.instant_ngp import InstantNGPModelConfig, NGPModel
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.models.splatfacto import SplatfactoModel, SplatfactoModelConfig
from nerfstudio.models.vanilla_nerf import NeRFModel, VanillaModelConfig
from torch import Tensor, nn

from nerfstudio_phdropout.config import PHDropoutConfig
from nerfstudio_phdropout.encodings import encoding_dropout
from nerfstudio_phdropout.masks import drop_uniforms, maskable_layers, posthoc_dropout
from nerfstudio_phdropout.metrics import uncertainty_metrics
from nerfstudio_phdropout.moments import RenderMoments, monte_carlo_moments
from nerfstudio_phdropout.nerfstudio_hashing import shared_lookup
from nerfstudio_phdropout.rasterize import expected_depth_moments, rasterization, rasterization_moments
from nerfstudio_phdropout.search import DropoutSearchResult, max_dropout_ratio
from nerfstudio_phdropout.selection import unknown_background_std
from nerfstudio_phdropout.shared_trunk import memoized
from nerfstudio_phdropout.sidecar import read_ratio, sidecar_path, write_sidecar
from nerfstudio_phdropout.tiles import ALPHA_MIN

Outputs = dict[str, Any]


class PHDropoutMixin:
    """What the three models share: the ratio and where it comes from, search, outputs, metrics."""

    config: Any
    device: Any
    _ratio: float | None = None
    _step: int | None = None
    _training_run: bool = False

    def dropout_ratio(self) -> float | None:
        """The ratio in use; None while a training run has not searched it yet.

        Raises:
            RuntimeError: no ratio is known and this is no training run.
        """
        settings: PHDropoutConfig = self.config.phdropout
        if settings.ratio is not None:
            return settings.ratio
        if self._ratio is None and settings.sidecar is not None:
            self._ratio = read_ratio(Path(settings.sidecar), self._step)
            if self._ratio == 0:
                warnings.warn(
                    f"no ratio kept the quality ({settings.sidecar}): at 0 nothing is dropped and "
                    "sigma is 0 everywhere; give ns-phdropout a --ratio or a larger --margin",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if self._ratio is None and not self._training_run:
            raise RuntimeError("no dropout ratio beside this checkpoint; run ns-phdropout first")
        return self._ratio

    def update_to_step(self, step: int) -> None:
        """Note which checkpoint is loaded."""
        super().update_to_step(step)  # type: ignore[misc]
        self._step = step

    def moments_for_camera(self, camera: Cameras, ratio: float) -> RenderMoments:
        """Moments of rgb ``[H, W, 3]`` for one camera, before any clamping."""
        raise NotImplementedError

    def masked_rgb(self, camera: Cameras, ratio: float, trial: int) -> Tensor:
        """``[H, W, 3]`` one trial."""
        raise NotImplementedError

    def plain_rgb(self, camera: Cameras) -> Tensor:
        """``[H, W, 3]`` the plain model."""
        return self.masked_rgb(camera, 0.0, 0)

    def ground_truth(self, image: Tensor) -> Tensor:
        """``[H, W, 3]`` image of the data set over the model's evaluation background."""
        raise NotImplementedError

    @torch.no_grad()
    def search_ratio(self, dataset: Any) -> DropoutSearchResult:
        """Search the ratio on views of a training set (nerfstudio's ``InputDataset``) and leave it in use."""
        settings: PHDropoutConfig = self.config.phdropout
        count = len(dataset)
        wanted = min(settings.search_views or count, count)
        views = [index * count // wanted for index in range(wanted)]
        cameras = [dataset.cameras[i : i + 1].to(self.device) for i in views]
        targets = [self.ground_truth(dataset.get_data(i)["image"].to(self.device)) for i in views]

        def psnr(squared_errors: list[Tensor]) -> float:
            return fmean(-10 * math.log10(max(float(error.mean()), 1e-10)) for error in squared_errors)

        def quality(ratio: float) -> float:
            if settings.quality == "expected_psnr":
                moments = [self.moments_for_camera(camera, ratio) for camera in cameras]
                return psnr([m.expected_squared_error(t) for m, t in zip(moments, targets, strict=True)])
            images = [self.masked_rgb(camera, ratio, 0).clamp(0, 1) for camera in cameras]
            if settings.quality == "psnr":
                return psnr([(a - b) ** 2 for a, b in zip(images, targets, strict=True)])
            return fmean(_ssim(image, target) for image, target in zip(images, targets, strict=True))

        found = max_dropout_ratio(
            quality, settings.margin, method=settings.search, first_violating=settings.first_violating
        )
        self._ratio = found.ratio
        return found

    def get_training_callbacks(self, training_callback_attributes: TrainingCallbackAttributes) -> list[Any]:
        """The plain model's callbacks, and the search after training."""
        self._training_run = True
        callbacks = super().get_training_callbacks(training_callback_attributes)  # type: ignore[misc]
        after = TrainingCallback(
            where_to_run=[TrainingCallbackLocation.AFTER_TRAIN],
            func=self._search_after_training,
            kwargs={"trainer": training_callback_attributes.trainer},
        )
        return [*callbacks, after]

    def _search_after_training(self, step: int, trainer: Any) -> None:
        settings: PHDropoutConfig = self.config.phdropout
        checkpoint = trainer.checkpoint_dir / f"step-{step:09d}.ckpt"
        pipeline = trainer.pipeline
        pipeline.eval()
        if settings.ratio is None:
            found: DropoutSearchResult | float = self.search_ratio(pipeline.datamanager.train_dataset)
        else:
            found = settings.ratio
        write_sidecar(checkpoint, settings, found)
        trainer.config.pipeline.model.phdropout.sidecar = str(sidecar_path(checkpoint))
        trainer.config.save_config()
        pipeline.train()

    def get_image_metrics_and_images(
        self, outputs: Outputs, batch: Outputs
    ) -> tuple[dict[str, float], Outputs]:
        """The plain model's metrics, and those of the uncertainty."""
        metrics, images = super().get_image_metrics_and_images(outputs, batch)  # type: ignore[misc]
        ratio = self.dropout_ratio()
        if "rgb_std" not in outputs or ratio is None:
            return metrics, images
        image = batch["image"].to(outputs["rgb_std"].device)
        mask = batch.get("mask")
        if image.shape[-1] == 4:
            mask = image[..., 3:] > (127 if image.dtype == torch.uint8 else 0.5)
        target = self.ground_truth(image)
        metrics.update(uncertainty_metrics(outputs["rgb_mean"], outputs["rgb_std"], target, mask))
        metrics["dropout_ratio"] = ratio
        shown = outputs["uncertainty"]
        images["uncertainty"] = (shown / shown.max().clamp(min=1e-8)).expand(-1, -1, 3)
        return metrics, images


def _ssim(image: Tensor, target: Tensor) -> float:
    """Structural similarity of two ``[H, W, 3]`` images in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    score: Any = structural_similarity_index_measure(
        image.movedim(-1, 0)[None], target.movedim(-1, 0)[None], data_range=1.0
    )
    return float(score)


def _as_float(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _uncertainty_outputs(moments: RenderMoments) -> Outputs:
    """Outputs from moments of ``[H, W, 3]``."""
    std = moments.std
    return {
        "rgb_mean": moments.mean.clamp(0, 1),
        "rgb_std": std,
        "uncertainty": std.mean(dim=-1, keepdim=True),
    }


class NeRFMixin(PHDropoutMixin):
    """Monte Carlo over sub-networks of a ray-based model."""

    _masked_prefixes: tuple[str, ...] = ("field.",)
    _proposal_prefixes: tuple[str, ...] = ("proposal_networks.",)
    _default_layers: str = "hidden"
    # Names of the outputs that hold colour, accumulation and depth.
    _channels: tuple[str, str, str] = ("rgb", "accumulation", "depth")

    def populate_modules(self) -> None:
        """Build the plain model and refuse settings that cannot work on it."""
        super().populate_modules()  # type: ignore[misc]
        if self.config.phdropout.estimator == "exact":
            raise ValueError("exact moments exist for Gaussian splatting only; set estimator='monte_carlo'")
        with self._trial(0.0, 0):
            pass

    def _select(self, name: str) -> bool:
        prefixes = self._masked_prefixes
        if self.config.phdropout.mask_proposal_networks:
            prefixes += self._proposal_prefixes
        return name.startswith(prefixes)

    def _shared_modules(self) -> list[nn.Module]:
        """Modules whose result does not depend on the mask."""
        raise NotImplementedError

    def _shared_lookups(self) -> AbstractContextManager[None]:
        """What trials of one chunk of rays share where masks act inside the encoding."""
        return nullcontext()

    def _layers(self) -> str:
        """What is dropped, with ``auto`` resolved."""
        settings: PHDropoutConfig = self.config.phdropout
        if settings.layers != "auto":
            return settings.layers
        return "hidden" if settings.mask == "sample" else self._default_layers

    @contextmanager
    def _trial(self, ratio: float, trial: int) -> Iterator[None]:
        settings: PHDropoutConfig = self.config.phdropout
        module: Any = self
        layers: Any = self._layers()
        common: dict[str, Any] = {
            "seed": settings.seed, "trial": trial, "rescale": settings.rescale, "select": self._select,
        }  # fmt: skip
        if layers in ("features", "table"):
            with encoding_dropout(module, ratio, part=layers, **common):
                yield
        else:
            with posthoc_dropout(module, ratio, layers=layers, mask=settings.mask, **common):
                yield

    def _first_layers(self, *prefixes: str) -> list[nn.Module]:
        first = maskable_layers(self, "first")  # type: ignore[arg-type]
        return [layer for name, layer in first.items() if name.startswith(prefixes)]

    @torch.no_grad()
    def moments_for_rays(self, camera_ray_bundle: RayBundle, ratio: float) -> RenderMoments:
        """Moments of rgb, accumulation and depth over trials, ``[H, W, 5]``, chunk by chunk.

        Args:
            camera_ray_bundle: ``[H, W]`` rays, any subset of a camera's.
            ratio: in [0, 1).

        Returns:
            rgb alone, ``[H, W, 3]``, where trials are rounded to 8 bits.
        """
        settings: PHDropoutConfig = self.config.phdropout
        if settings.quantize:
            return self._quantized_moments(camera_ray_bundle, ratio)
        device = camera_ray_bundle.directions.device
        height, width = camera_ray_bundle.origins.shape[:2]
        chunk = self.config.eval_num_rays_per_chunk
        shared = self._shared_modules() if settings.mask == "trial" else []
        parts = []
        for number, start in enumerate(range(0, len(camera_ray_bundle), chunk)):
            rays = camera_ray_bundle.get_row_major_sliced_ray_bundle(start, start + chunk).to(self.device)
            # Masks of single samples must not repeat from chunk to chunk.
            first = number * settings.num_trials if settings.mask == "sample" else 0

            def render(trial: int, rays: RayBundle = rays, first: int = first) -> Tensor:
                with self._trial(ratio, first + trial):
                    outputs = self.forward(ray_bundle=rays)  # type: ignore[attr-defined]
                return torch.cat([outputs[name] for name in self._channels], dim=-1)

            with memoized(shared), self._shared_lookups():
                parts.append(monte_carlo_moments(render, settings.num_trials, quantize=False))
        mean = torch.cat([part.mean for part in parts]).view(height, width, -1)
        variance = torch.cat([part.variance for part in parts]).view(height, width, -1)
        return RenderMoments(mean.to(device), variance.to(device))

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> Outputs:
        """The plain outputs of a whole image, and its uncertainty once a ratio is known."""
        outputs = super().get_outputs_for_camera_ray_bundle(camera_ray_bundle)  # type: ignore[misc]
        ratio = self.dropout_ratio()
        if ratio is None:
            return outputs
        moments = self.moments_for_rays(camera_ray_bundle, ratio)
        outputs.update(_uncertainty_outputs(RenderMoments(moments.mean[..., :3], moments.variance[..., :3])))
        if moments.mean.shape[-1] > 3:
            outputs["accumulation_std"] = moments.std[..., 3:4]
            outputs["depth_std"] = moments.std[..., 4:5]
        return outputs

    def _quantized_moments(self, camera_ray_bundle: RayBundle, ratio: float) -> RenderMoments:
        """As the authors do: whole images, each by way of 8 bits."""

        def render(trial: int) -> Tensor:
            return self.masked_rgb_of_rays(camera_ray_bundle, ratio, trial)

        return monte_carlo_moments(render, self.config.phdropout.num_trials, quantize=True)

    def moments_for_camera(self, camera: Cameras, ratio: float) -> RenderMoments:
        """See `PHDropoutMixin`."""
        moments = self.moments_for_rays(camera.generate_rays(camera_indices=0, keep_shape=True), ratio)
        return RenderMoments(moments.mean[..., :3], moments.variance[..., :3])

    @torch.no_grad()
    def masked_rgb(self, camera: Cameras, ratio: float, trial: int) -> Tensor:
        """See `PHDropoutMixin`."""
        return self.masked_rgb_of_rays(camera.generate_rays(camera_indices=0, keep_shape=True), ratio, trial)

    @torch.no_grad()
    def masked_rgb_of_rays(self, camera_ray_bundle: RayBundle, ratio: float, trial: int) -> Tensor:
        """``[H, W, 3]`` one trial of ``[H, W]`` rays."""
        with self._trial(ratio, trial):
            outputs = super().get_outputs_for_camera_ray_bundle(camera_ray_bundle)  # type: ignore[misc]
        return outputs[self._channels[0]].to(self.device)

    def ground_truth(self, image: Tensor) -> Tensor:
        """See `PHDropoutMixin`."""
        return self.renderer_rgb.blend_background(_as_float(image))  # type: ignore[attr-defined]


@dataclass
class PHDropoutNerfactoModelConfig(NerfactoModelConfig):
    """nerfacto with PH-Dropout."""

    _target: type = field(default_factory=lambda: PHDropoutNerfactoModel)
    phdropout: PHDropoutConfig = field(default_factory=PHDropoutConfig)
    """Uncertainty settings."""
    implementation: Literal["tcnn", "torch"] = "torch"
    """Fused tinycudann networks have no layers to mask: keep ``torch``."""


class PHDropoutNerfactoModel(NeRFMixin, NerfactoModel):
    """nerfacto with PH-Dropout."""

    config: PHDropoutNerfactoModelConfig

    _default_layers = "table"

    def _shared_base(self) -> list[nn.Module]:
        """What of the hash encoding and the first layer behind it comes before the first mask."""
        layers = self._layers()
        if layers == "table":
            return []
        encoding = self.field.mlp_base.model[0]
        if layers == "features":
            return [encoding]
        return [encoding, *self._first_layers("field.mlp_base.")]

    def _shared_lookups(self) -> AbstractContextManager[None]:
        settings = self.config.phdropout
        if self._layers() != "table" or settings.mask_proposal_networks:
            return nullcontext()
        return shared_lookup(self.field.mlp_base.model[0])

    def _shared_modules(self) -> list[nn.Module]:
        if self.config.phdropout.mask_proposal_networks:
            return []
        return [self.proposal_sampler, self.field.direction_encoding, *self._shared_base()]


@dataclass
class PHDropoutInstantNGPModelConfig(InstantNGPModelConfig):
    """instant-ngp with PH-Dropout."""

    _target: type = field(default_factory=lambda: PHDropoutInstantNGPModel)
    phdropout: PHDropoutConfig = field(default_factory=PHDropoutConfig)
    """Uncertainty settings."""


class PHDropoutInstantNGPModel(NeRFMixin, NGPModel):
    """instant-ngp with PH-Dropout. Its sampler (nerfacc) needs CUDA.

    The sampler asks the masked field which samples are empty, so trials share nothing.
    """

    config: PHDropoutInstantNGPModelConfig
    _default_layers = "table"

    def get_outputs(self, ray_bundle: RayBundle) -> Outputs:
        """The plain model's.

        Raises:
            RuntimeError: no CUDA device.
        """
        if self.device.type != "cuda":
            raise RuntimeError(
                "instant-ngp samples rays by nerfacc's CUDA kernels; use phd-nerfacto on a CPU"
            )
        return super().get_outputs(ray_bundle)

    def _shared_modules(self) -> list[nn.Module]:
        return []


@dataclass
class PHDropoutVanillaModelConfig(VanillaModelConfig):
    """vanilla-nerf with PH-Dropout."""

    _target: type = field(default_factory=lambda: PHDropoutVanillaModel)
    phdropout: PHDropoutConfig = field(default_factory=PHDropoutConfig)
    """Uncertainty settings."""


class PHDropoutVanillaModel(NeRFMixin, NeRFModel):
    """vanilla-nerf with PH-Dropout; the coarse field counts as its proposal network."""

    config: PHDropoutVanillaModelConfig
    _masked_prefixes = ("field_fine.",)
    _proposal_prefixes = ("field_coarse.",)
    _channels = ("rgb_fine", "accumulation_fine", "depth_fine")

    def _shared_modules(self) -> list[nn.Module]:
        if self.config.phdropout.mask_proposal_networks or self.temporal_distortion is not None:
            return []
        assert self.field_coarse is not None
        assert self.field_fine is not None
        # Both fields may use one encoding object, at other samples: only the fine first layer is shared.
        return [
            self.field_coarse,
            self.sampler_uniform,
            self.sampler_pdf,
            *self._first_layers("field_fine.mlp_base."),
        ]


@dataclass
class PHDropoutSplatfactoModelConfig(SplatfactoModelConfig):
    """splatfacto with PH-Dropout."""

    _target: type = field(default_factory=lambda: PHDropoutSplatfactoModel)
    phdropout: PHDropoutConfig = field(default_factory=PHDropoutConfig)
    """Uncertainty settings."""


class PHDropoutSplatfactoModel(PHDropoutMixin, SplatfactoModel):
    """splatfacto with PH-Dropout. On a CPU it renders and trains with the torch rasterizer."""

    config: PHDropoutSplatfactoModelConfig
    seed_points: Any

    def populate_modules(self) -> None:
        """Build the plain model. It moves seed colours to CUDA; without CUDA they are set here afterwards."""
        seeds: Any = self.seed_points
        if seeds is None or self.config.random_init or seeds[1].shape[0] == 0 or torch.cuda.is_available():
            super().populate_modules()
            return
        self.seed_points = (seeds[0], seeds[1][:0])
        super().populate_modules()
        self.seed_points = seeds
        colors = seeds[1].float() / 255
        if self.config.sh_degree > 0:
            dc = (colors - 0.5) / 0.28209479177387814
        else:
            dc = torch.logit(colors, eps=1e-10)
        self.gauss_params["features_dc"] = nn.Parameter(dc)

    def get_outputs(self, camera: Any) -> Outputs:
        """The plain outputs, and in evaluation the uncertainty once a ratio is known."""
        on_gpu = self.means.is_cuda
        outputs = super().get_outputs(camera) if on_gpu else self._torch_outputs(camera)
        if self.training or not outputs:
            return outputs
        ratio = self.dropout_ratio()
        if ratio is not None:
            outputs.update(self._uncertainty(camera, ratio))
        return outputs

    def _torch_outputs(self, camera: Cameras) -> Outputs:
        """splatfacto's rendering without its calls to ``.cuda()``."""
        if self.training:
            # absgrad exists in gsplat's kernels alone.
            self.strategy.absgrad = False
        gaussians = self._gaussians()
        if gaussians["means"].shape[0] == 0:
            size = (int(camera.width.item()), int(camera.height.item()))
            return self.get_empty_outputs(*size, self.background_color)
        scale = self._get_downscale_factor()
        camera.rescale_output_resolution(1 / scale)
        view = self._view(camera)
        camera.rescale_output_resolution(scale)
        self.last_size = (view["height"], view["width"])
        with_depth = self.config.output_depth_during_training or not self.training
        image, alpha, self.info = rasterization(
            **gaussians, **view, render_mode="RGB+ED" if with_depth else "RGB",
            rasterize_mode=self.config.rasterize_mode,
        )  # fmt: skip
        if self.training:
            self.strategy.step_pre_backward(
                self.gauss_params, self.optimizers, self.strategy_state, self.step, self.info
            )
        background = self._get_background_color()
        rgb = (image[0, ..., :3] + (1 - alpha[0]) * background).clamp(0, 1)
        depth = None
        if with_depth:
            depth = torch.where(alpha[0] > 0, image[0, ..., 3:], image[0, ..., 3:].detach().max())
        if not self.training:
            background = background.expand(*rgb.shape)
        return {"rgb": rgb, "depth": depth, "accumulation": alpha[0], "background": background}

    def _gaussians(self) -> dict[str, Any]:
        """The Gaussians inside the crop box, by argument names of `rasterization`."""
        inside: Any = slice(None)
        if self.crop_box is not None and not self.training:
            inside = self.crop_box.within(self.means).squeeze()
        colors = torch.cat([self.features_dc[:, None], self.features_rest], dim=1)[inside]
        degree: int | None = None
        if self.config.sh_degree > 0:
            degree = min(self.step // self.config.sh_degree_interval, self.config.sh_degree)
        else:
            colors = torch.sigmoid(colors).squeeze(1)
        return {
            "means": self.means[inside],
            "quats": self.quats[inside],
            "scales": torch.exp(self.scales[inside]),
            "opacities": torch.sigmoid(self.opacities[inside]).squeeze(-1),
            "colors": colors,
            "sh_degree": degree,
        }

    def _view(self, camera: Cameras) -> dict[str, Any]:
        """Camera in gsplat's convention (y down, z forward), by argument names of `rasterization`."""
        pose = self.camera_optimizer.apply_to_camera(camera) if self.training else camera.camera_to_worlds
        pose = pose.to(self.device)
        rotation = (pose[:, :3, :3] * pose.new_tensor([1.0, -1.0, -1.0])).transpose(1, 2)
        viewmats = torch.eye(4, device=pose.device, dtype=pose.dtype).repeat(len(pose), 1, 1)
        viewmats[:, :3, :3] = rotation
        viewmats[:, :3, 3:] = -rotation @ pose[:, :3, 3:]
        return {
            "viewmats": viewmats,
            "Ks": camera.get_intrinsics_matrices().to(self.device),
            "width": int(camera.width.item()),
            "height": int(camera.height.item()),
        }

    @torch.no_grad()
    def _moments(self, camera: Cameras, ratio: float, render_mode: Literal["RGB", "RGB+D"]) -> RenderMoments:
        """Moments with a leading camera dimension; by trials without accumulation where so configured."""
        settings: PHDropoutConfig = self.config.phdropout
        gaussians, view = self._gaussians(), self._view(camera)
        options = {
            "backgrounds": self._get_background_color()[None],
            "rasterize_mode": self.config.rasterize_mode,
        }
        if settings.estimator != "monte_carlo":
            return rasterization_moments(
                **gaussians, **view, **options, dropout_ratio=ratio, render_mode=render_mode
            )[0]

        def render(trial: int) -> Tensor:
            return rasterization(**self._drop(gaussians, ratio, trial), **view, **options)[0]

        return monte_carlo_moments(render, settings.num_trials, quantize=settings.quantize)

    def _drop(self, gaussians: dict[str, Any], ratio: float, trial: int) -> dict[str, Any]:
        opacities = gaussians["opacities"]
        seed = self.config.phdropout.seed
        uniforms = drop_uniforms(len(opacities), seed=seed, trial=trial, device=opacities.device)
        return {**gaussians, "opacities": opacities * (uniforms >= ratio)}

    def search_ratio(self, dataset: Any) -> DropoutSearchResult:
        """See `PHDropoutMixin`.

        Raises:
            ValueError: no Gaussian is opaque enough to be seen.
        """
        self._refuse_unseen()
        return super().search_ratio(dataset)

    def _refuse_unseen(self) -> None:
        """Dropping what nobody sees moves nothing: sigma would be 0 and look like certainty."""
        if self.num_points == 0 or float(torch.sigmoid(self.opacities.detach().max())) < ALPHA_MIN:
            raise ValueError(
                f"none of the {self.num_points} Gaussians has an opacity of 1/255 or more, so dropout moves "
                "nothing and sigma would be 0; train the model first"
            )

    def _uncertainty(self, camera: Cameras, ratio: float) -> Outputs:
        self._refuse_unseen()
        height, width = int(camera.height.item()), int(camera.width.item())
        if self._gaussians()["means"].shape[0] == 0:
            zero = self.means.new_zeros(height, width, 3)
            background = self._get_background_color().expand(height, width, 3)
            return _uncertainty_outputs(RenderMoments(background, zero))
        moments = self._moments(camera, ratio, "RGB+D")
        outputs = _uncertainty_outputs(RenderMoments(moments.mean[0, ..., :3], moments.variance[0, ..., :3]))
        if moments.covariance is not None and moments.accumulation_std is not None:
            outputs["accumulation_std"] = moments.accumulation_std[0, ..., None]
            outputs["depth_std"] = expected_depth_moments(moments)[1][0, ..., None]
            holes = unknown_background_std(moments)[0, ..., :3]
            outputs["uncertainty_with_holes"] = holes.mean(dim=-1, keepdim=True)
        return outputs

    def moments_for_camera(self, camera: Cameras, ratio: float) -> RenderMoments:
        """See `PHDropoutMixin`."""
        moments = self._moments(camera, ratio, "RGB")
        return RenderMoments(moments.mean[0], moments.variance[0])

    @torch.no_grad()
    def masked_rgb(self, camera: Cameras, ratio: float, trial: int) -> Tensor:
        """See `PHDropoutMixin`."""
        return rasterization(
            **self._drop(self._gaussians(), ratio, trial), **self._view(camera),
            backgrounds=self._get_background_color()[None], rasterize_mode=self.config.rasterize_mode,
        )[0][0]  # fmt: skip

    def ground_truth(self, image: Tensor) -> Tensor:
        """See `PHDropoutMixin`."""
        return self.composite_with_background(_as_float(image).to(self.device), self._get_background_color())

    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> Outputs:
        """The plain model's, with the crop box set for every output."""
        return super().get_outputs_for_camera(camera, obb_box)


PlainToTwin = dict[type, tuple[str, Callable[..., Any]]]
TWINS: PlainToTwin = {
    NerfactoModelConfig: ("phd-nerfacto", PHDropoutNerfactoModelConfig),
    SplatfactoModelConfig: ("phd-splatfacto", PHDropoutSplatfactoModelConfig),
    InstantNGPModelConfig: ("phd-instant-ngp", PHDropoutInstantNGPModelConfig),
    VanillaModelConfig: ("phd-vanilla-nerf", PHDropoutVanillaModelConfig),
}

"""SPE in nerfstudio: an ``Encoding``, a ``Field`` and two models. Only here are its internals known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

try:
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
    from nerfstudio.data.datasets.base_dataset import InputDataset
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
    from nerfstudio.field_components.encodings import Encoding
    from nerfstudio.field_components.field_heads import DensityFieldHead, FieldHeadNames, RGBFieldHead
    from nerfstudio.fields.base_field import Field
    from nerfstudio.model_components.losses import MSELoss
    from nerfstudio.model_components.ray_samplers import PDFSampler, UniformSampler
    from nerfstudio.model_components.renderers import AccumulationRenderer, DepthRenderer, RGBRenderer
    from nerfstudio.models.base_model import Model
    from nerfstudio.models.mipnerf import MipNerfModel
    from nerfstudio.models.vanilla_nerf import NeRFModel, VanillaModelConfig
except ImportError as error:
    raise ImportError('spe-nerf needs nerfstudio: pip install "graft-plugins[nerfstudio]"') from error

from spe_layers.bands import Bands
from spe_layers.encoding import FrequencyAnnealing, PositionalEncoding
from spe_layers.init import Init
from spe_layers.integrations.nerf_parts import (
    FirstLayer,
    RayCritic,
    SkipInput,
    Trunk,
    nyquist_octaves,
    occlusion_loss,
    xavier_linear,
)
from spe_layers.layer import SPE


class SPEncoding(Encoding):
    """SPE as a nerfstudio ``Encoding``: pass it wherever one is accepted, one instance a field.

    An MLP after it keeps all its own layers, so here SPE adds a layer; ``SPENerfField`` replaces one.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 256,
        bands: int | Bands = 10,
        init: Init = "uniform",
        **spe_options: Any,
    ) -> None:
        super().__init__(in_dim)
        self.layer = SPE(in_dim, out_dim, bands, init=init, **spe_options)

    def get_out_dim(self) -> int:
        """Number of units."""
        return self.layer.out_features

    def forward(self, in_tensor: Tensor, covs: Tensor | None = None) -> Tensor:
        """[..., in_dim] (and covariances [..., in_dim, in_dim]) -> [..., out_dim]."""
        return self.layer(in_tensor, covariance=covs)


@dataclass
class SPENerfModelConfig(VanillaModelConfig):
    """Vanilla NeRF with SPE. ``first_layer`` relu and identity are the controls."""

    _target: type = field(default_factory=lambda: SPENerfModel)
    first_layer: Literal["spe", "residual", "relu", "identity"] = "spe"
    """First layer of the position branch; spe is the paper's, residual the default of the authors' code."""
    direction_first_layer: Literal["relu", "spe"] = "relu"
    """Activation of the view branch: spe makes it a sine over features and encoded directions."""
    all_sine: bool = False
    """Sine instead of ReLU in every layer of the trunk."""
    num_bands: int = 10
    """Octaves of the position encoding."""
    bands: Literal["fixed", "nyquist"] = "fixed"
    """nyquist: as many octaves as the training cameras' pixels resolve at the near plane, not num_bands."""
    direction_bands: int = 4
    """Octaves of the direction encoding."""
    scale: float = 1.0
    """Radians per unit in the lowest octave (1 as in NeRF's code)."""
    decay: float = 0.0
    """Amplitude of octave l is 2^(-decay l)."""
    init: Literal["linear", "lecun", "uniform", "calibrated"] = "uniform"
    """Initialisation of SPE; uniform is the authors'."""
    skip_input: Literal["encoding", "spe"] = "encoding"
    """What joins the trunk after its fifth layer: the raw encoding, or the first layer's output."""
    integrated_variance: Literal["exact", "nerfstudio"] = "exact"
    """spe-mipnerf: damping of an octave by its own variance, or by that of nerfstudio's NeRFEncoding."""
    annealing_steps: int = 0
    """Open frequencies linearly over so many steps (FreeNeRF); 0 opens all at once."""
    occlusion_loss_mult: float = 0.0
    """Weight of the density near the camera (FreeNeRF uses 0.01)."""
    occlusion_samples: int = 20
    """How many first samples of a ray are near the camera."""
    occlusion_distance: float | None = None
    """Samples closer than this are near the camera, instead of the first ones."""
    adversarial_loss: Literal["none", "gan", "wgan"] = "none"
    """Critic on the colours of rays."""
    compute_lpips: bool = False
    """Compute LPIPS in evaluation; needs a download of AlexNet's weights."""


class SPENerfField(Field):
    """Radiance field with a chosen first layer and the paper's skip of the raw encoding.

    Attributes:
        mask: factors of the frequency groups [G], or None; set by the model while it anneals.
        recorded: (density, distance) [rays, S, 1] of the last call, for the occlusion loss.
    """

    def __init__(
        self,
        *,
        bands: Bands,
        direction_bands: Bands,
        first_layer: FirstLayer = "spe",
        direction_first_layer: Literal["relu", "spe"] = "relu",
        all_sine: bool = False,
        init: Init = "uniform",
        skip_input: SkipInput = "encoding",
        use_integrated_encoding: bool = False,
        integrated_variance: Literal["exact", "nerfstudio"] = "exact",
        width: int = 256,
        layers: int = 8,
        head_width: int = 128,
    ) -> None:
        super().__init__()
        self.trunk = Trunk(
            bands,
            first_layer=first_layer,
            init=init,
            skip_input=skip_input,
            all_sine=all_sine,
            width=width,
            layers=layers,
        )
        self.field_output_density = DensityFieldHead(in_dim=width)
        self.direction_encoding = PositionalEncoding(3, direction_bands)
        self.feature = xavier_linear(width, width)
        self.view = xavier_linear(width + self.direction_encoding.out_features, head_width)
        self.view_activation = torch.sin if direction_first_layer == "spe" else torch.relu
        self.field_output_rgb = RGBFieldHead(in_dim=head_width)
        self.use_integrated_encoding = use_integrated_encoding
        self.integrated_variance = integrated_variance
        self.mask: Tensor | None = None
        self.recorded: tuple[Tensor, Tensor] | None = None

    def get_density(self, ray_samples: Any) -> tuple[Tensor, Tensor]:
        """Density [..., 1] and features [..., width] of ray samples."""
        frustums = ray_samples.frustums
        if self.use_integrated_encoding:
            gaussians = frustums.get_gaussian_blob()
            features = self.trunk(gaussians.mean, self._covariance(gaussians.cov), self.mask)
        else:
            features = self.trunk(frustums.get_positions(), None, self.mask)
        density = self.field_output_density(features)
        self.recorded = (density, 0.5 * (frustums.starts + frustums.ends))
        return density, features

    def _covariance(self, covariance: Tensor) -> Tensor:
        if self.integrated_variance == "exact":
            return covariance
        # nerfstudio scales means by 2 pi and leaves variances: damping as if the scale were 1.
        return covariance / self.trunk.encoding.bands.scale**2

    def get_outputs(self, ray_samples: Any, density_embedding: Tensor | None = None) -> dict[Any, Tensor]:
        """Colours [..., 3] from features and directions."""
        assert density_embedding is not None
        directions = self.direction_encoding(ray_samples.frustums.directions)
        features = self.feature(density_embedding)
        h = self.view_activation(self.view(torch.cat([features, directions.to(features.dtype)], dim=-1)))
        return {FieldHeadNames.RGB: self.field_output_rgb(h)}


class CameraDataManager(VanillaDataManager[InputDataset]):
    """nerfstudio's, which also hands the training cameras to the model: ``bands`` nyquist needs them."""

    def create_train_dataset(self) -> InputDataset:
        """Dataset of training views; its metadata, which the model receives, has their cameras."""
        dataset = super().create_train_dataset()
        dataset.metadata["cameras"] = dataset.cameras
        return dataset


class _NoLpips(nn.Module):
    """Stands where LPIPS would be; its value is removed from the metrics."""

    def forward(self, *_images: Tensor) -> Tensor:
        return torch.tensor(float("nan"))


class _SPEModel(Model):
    """What both models add to nerfstudio's: fields with SPE, annealing, occlusion loss, critic."""

    config: SPENerfModelConfig

    def _fields(self) -> list[SPENerfField]:
        raise NotImplementedError

    def _position_bands(self) -> Bands:
        config = self.config
        count = config.num_bands
        if config.bands == "nyquist":
            cameras = (self.kwargs.get("metadata") or {}).get("cameras")
            if cameras is None:
                raise ValueError(
                    "bands 'nyquist' needs the training cameras: use the data manager of spe-nerf "
                    "(spe_layers.integrations.nerfstudio.CameraDataManager), or set num_bands"
                )
            near = (config.collider_params or {}).get("near_plane", 0.0)
            if not near > 0:
                raise ValueError(
                    f"bands 'nyquist' needs a positive near_plane in collider_params, got {near}"
                )
            count = nyquist_octaves(near / float(cameras.fx.max()), config.scale)
        return Bands.octaves(count, scale=config.scale, decay=config.decay)

    def _build_field(self, *, integrated: bool) -> SPENerfField:
        config = self.config
        return SPENerfField(
            bands=self._position_bands(),
            direction_bands=Bands.octaves(config.direction_bands),
            first_layer=config.first_layer,
            direction_first_layer=config.direction_first_layer,
            all_sine=config.all_sine,
            init=config.init,
            skip_input=config.skip_input,
            use_integrated_encoding=integrated,
            integrated_variance=config.integrated_variance,
        )

    def _populate_common(self, *, include_original: bool) -> None:
        """Samplers, renderers, losses and metrics as the parent's, without its download of LPIPS weights."""
        from torchmetrics.functional import structural_similarity_index_measure
        from torchmetrics.image import PeakSignalNoiseRatio

        config = self.config
        self.sampler_uniform = UniformSampler(num_samples=config.num_coarse_samples)
        self.sampler_pdf = PDFSampler(
            num_samples=config.num_importance_samples, include_original=include_original
        )
        self.renderer_rgb = RGBRenderer(background_color=config.background_color)
        self.renderer_accumulation, self.renderer_depth = AccumulationRenderer(), DepthRenderer()
        self.rgb_loss = MSELoss()
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = structural_similarity_index_measure
        self.lpips: nn.Module = _NoLpips()
        if config.compute_lpips:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.lpips = LearnedPerceptualImagePatchSimilarity(normalize=True)
        self.annealing = FrequencyAnnealing(self._position_bands(), config.annealing_steps)
        self.critic = RayCritic() if config.adversarial_loss != "none" else None

    def update_to_step(self, step: int) -> None:
        """Set the frequency mask of this step: while training, and when a checkpoint is loaded."""
        mask = None
        if self.config.annealing_steps > 0 and step <= self.config.annealing_steps:
            mask = self.annealing.mask(step).to(self.device, torch.float32)
        for module in self._fields():
            module.mask = mask

    def get_training_callbacks(self, training_callback_attributes: Any) -> list[Any]:
        """Annealing before each step, clipping of a Wasserstein critic after it."""
        callbacks = super().get_training_callbacks(training_callback_attributes)
        if self.config.annealing_steps:
            before = [TrainingCallbackLocation.BEFORE_TRAIN_ITERATION]
            callbacks.append(TrainingCallback(before, self.update_to_step, update_every_num_iters=1))
        if self.critic is not None and self.config.adversarial_loss == "wgan":
            after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
            critic = self.critic
            callbacks.append(TrainingCallback(after, lambda step: critic.clip(), update_every_num_iters=1))
        return callbacks

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        """``fields``, and ``critic`` if there is one.

        Raises:
            ValueError: fields that share parameters.
        """
        groups = super().get_param_groups()
        if len({id(p) for p in groups["fields"]}) != len(groups["fields"]):
            raise ValueError(
                "field_coarse and field_fine share parameters; the optimiser would step them twice"
            )
        if self.critic is not None:
            groups["critic"] = list(self.critic.parameters())
        return groups

    def get_outputs(self, ray_bundle: Any) -> dict[str, Tensor]:
        """The parent's, and what the extra losses need while training."""
        outputs = super().get_outputs(ray_bundle)
        if self.training and self.critic is not None:
            outputs["rays"] = torch.cat([ray_bundle.origins, ray_bundle.directions], dim=-1)
        return outputs

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Any], metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        """The parent's; and ``occlusion_loss``, ``adversarial_loss``, ``critic_loss`` where asked for."""
        losses = super().get_loss_dict(outputs, batch, metrics_dict)
        config = self.config
        if not self.training:
            return losses
        recorded = self._fields()[-1].recorded
        if config.occlusion_loss_mult and recorded is not None:
            near = occlusion_loss(
                *recorded, samples=config.occlusion_samples, distance=config.occlusion_distance
            )
            losses["occlusion_loss"] = config.occlusion_loss_mult * near
        if self.critic is not None:
            predicted, image = self.renderer_rgb.blend_background_for_loss_computation(
                pred_image=outputs["rgb_fine"],
                pred_accumulation=outputs["accumulation_fine"],
                gt_image=batch["image"].to(self.device),
            )
            real, fake = (torch.cat([outputs["rays"], colour], dim=-1) for colour in (image, predicted))
            losses.update(self.critic.losses(real, fake, wasserstein=config.adversarial_loss == "wgan"))
        return losses

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The parent's; LPIPS only where it was computed."""
        metrics, images = super().get_image_metrics_and_images(outputs, batch)
        if not self.config.compute_lpips:
            metrics.pop("fine_lpips", None)
        return metrics, images


class SPENerfModel(_SPEModel, NeRFModel):
    """Vanilla NeRF: a coarse and a fine field, each with an SPE of its own."""

    def populate_modules(self) -> None:
        """Fields, samplers, renderers, losses, metrics."""
        Model.populate_modules(self)
        if self.config.enable_temporal_distortion:
            raise ValueError("spe-nerf has no temporal distortion; set enable_temporal_distortion to False")
        self.field_coarse = self._build_field(integrated=False)
        self.field_fine = self._build_field(integrated=False)
        self._populate_common(include_original=True)

    def _fields(self) -> list[SPENerfField]:
        return [self.field_coarse, self.field_fine]


class SPEMipNerfModel(_SPEModel, MipNerfModel):
    """Mip-NeRF: one field over Gaussians, with the right variance in every octave."""

    def populate_modules(self) -> None:
        """Field, samplers, renderers, losses, metrics."""
        Model.populate_modules(self)
        self.field = self._build_field(integrated=True)
        self._populate_common(include_original=False)

    def _fields(self) -> list[SPENerfField]:
        return [self.field]

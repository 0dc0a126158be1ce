"""Method specifications behind the entry points ``spe-nerf``, ``spe-mipnerf`` and ``spe-freenerf``."""

from __future__ import annotations

from typing import Any

from spe_layers.integrations.nerfstudio import CameraDataManager, SPEMipNerfModel, SPENerfModelConfig

# isort: split
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig, RAdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

STEPS = 50_000


def _trainer(method_name: str, model: SPENerfModelConfig, **trainer_options: Any) -> TrainerConfig:
    """As vanilla-nerf's, with a group for the critic; built from parts, for its module imports plugins."""
    return TrainerConfig(
        method_name=method_name,
        max_num_iterations=STEPS,
        pipeline=VanillaPipelineConfig(
            datamanager=VanillaDataManagerConfig(
                _target=CameraDataManager, dataparser=BlenderDataParserConfig()
            ),
            model=model,
        ),
        optimizers={
            "fields": {"optimizer": RAdamOptimizerConfig(lr=5e-4, eps=1e-8), "scheduler": None},
            "critic": {"optimizer": AdamOptimizerConfig(lr=5e-4, eps=1e-8), "scheduler": None},
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 12),
        **trainer_options,
    )


spe_nerf = MethodSpecification(
    config=_trainer("spe-nerf", SPENerfModelConfig()),
    description="Vanilla NeRF with sinusoidal positional encoding as its first layer.",
)

spe_mipnerf = MethodSpecification(
    config=_trainer(
        "spe-mipnerf",
        SPENerfModelConfig(
            _target=SPEMipNerfModel,
            num_coarse_samples=128,
            num_importance_samples=128,
            eval_num_rays_per_chunk=1024,
        ),
    ),
    description="Mip-NeRF with sinusoidal positional encoding as its first layer.",
)

spe_freenerf = MethodSpecification(
    config=_trainer(
        "spe-freenerf",
        SPENerfModelConfig(annealing_steps=int(0.9 * STEPS), occlusion_loss_mult=0.01),
    ),
    description="spe-nerf for few views: frequencies opened over 90 % of the steps, occlusion loss.",
)

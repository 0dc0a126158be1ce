"""Methods that ``ns-train`` finds by entry point: phd-nerfacto, phd-splatfacto, phd-vanilla-nerf, and tiny.

The -tiny forms train in a minute or two on a CPU. Every ns-* command imports this module before it loads a
checkpoint, so NumPy's scalar types are allowed here: nerfstudio's own checkpoints hold them as soon as a
scheduler is used, and ``torch.load`` refuses them otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManagerConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig, RAdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.pipelines.dynamic_batch import DynamicBatchPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

from nerfstudio_phdropout.nerfstudio_dataparser import PHDSyntheticDataParserConfig
from nerfstudio_phdropout.nerfstudio_models import (
    PHDropoutInstantNGPModelConfig,
    PHDropoutNerfactoModelConfig,
    PHDropoutSplatfactoModelConfig,
    PHDropoutVanillaModelConfig,
)


def allow_numpy_scalars() -> None:
    """Let ``torch.load(weights_only=True)`` read the NumPy scalars that learning-rate schedulers store."""
    scalar = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar  # type: ignore[attr-defined]
    torch.serialization.add_safe_globals([scalar, np.dtype, type(np.dtype(np.float64))])


allow_numpy_scalars()


def _adam(lr: float, lr_final: float | None = None, max_steps: int = 30_000, **more: Any) -> dict[str, Any]:
    scheduler = None
    if lr_final is not None:
        scheduler = ExponentialDecaySchedulerConfig(lr_final=lr_final, max_steps=max_steps, **more)
    return {"optimizer": AdamOptimizerConfig(lr=lr, eps=1e-15), "scheduler": scheduler}


def _splat_optimizers(speed: float = 1.0) -> dict[str, Any]:
    """splatfacto's optimizers; ``speed`` multiplies rates, for runs of a few hundred steps."""
    warm = {"warmup_steps": 1000, "lr_pre_warmup": 0}
    return {
        "means": _adam(1.6e-4 * speed, 1.6e-6 * speed),
        "features_dc": _adam(2.5e-3 * speed),
        "features_rest": _adam(2.5e-3 / 20 * speed),
        "opacities": _adam(0.05),
        "scales": _adam(5e-3 * speed),
        "quats": _adam(1e-3 * speed),
        "camera_opt": _adam(1e-4, 5e-7, **warm),
        "bilateral_grid": _adam(2e-3, 1e-4, **warm),
    }


def _tiny_trainer(
    name: str, pipeline: VanillaPipelineConfig, optimizers: dict[str, Any], steps: int
) -> TrainerConfig:
    """A run without viewer or evaluation on the way, that ends when training does."""
    return TrainerConfig(
        method_name=name,
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        steps_per_save=10_000,
        max_num_iterations=steps,
        mixed_precision=False,
        machine=MachineConfig(device_type="cpu"),
        pipeline=pipeline,
        optimizers=optimizers,
        viewer=ViewerConfig(quit_on_train_completion=True),
        vis="tensorboard",
    )


phd_nerfacto = MethodSpecification(
    config=TrainerConfig(
        method_name="phd-nerfacto",
        steps_per_eval_batch=500,
        steps_per_save=2000,
        max_num_iterations=30_000,
        mixed_precision=True,
        pipeline=VanillaPipelineConfig(
            datamanager=ParallelDataManagerConfig(
                dataparser=NerfstudioDataParserConfig(),
                train_num_rays_per_batch=4096,
                eval_num_rays_per_batch=4096,
            ),
            model=PHDropoutNerfactoModelConfig(
                eval_num_rays_per_chunk=1 << 15,
                average_init_density=0.01,
                camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"),
            ),
        ),
        optimizers={
            "proposal_networks": _adam(1e-2, 1e-4, max_steps=200_000),
            "fields": _adam(1e-2, 1e-4, max_steps=200_000),
            "camera_opt": _adam(1e-3, 1e-4, max_steps=5000),
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    ),
    description="nerfacto with post hoc epistemic uncertainty (PH-Dropout)",
)

phd_splatfacto = MethodSpecification(
    config=TrainerConfig(
        method_name="phd-splatfacto",
        steps_per_eval_image=100,
        steps_per_eval_batch=0,
        steps_per_save=2000,
        steps_per_eval_all_images=1000,
        max_num_iterations=30_000,
        mixed_precision=False,
        pipeline=VanillaPipelineConfig(
            datamanager=FullImageDatamanagerConfig(
                dataparser=NerfstudioDataParserConfig(load_3D_points=True), cache_images_type="uint8"
            ),
            model=PHDropoutSplatfactoModelConfig(),
        ),
        optimizers=_splat_optimizers(),
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    ),
    description="splatfacto with exact post hoc epistemic uncertainty (PH-Dropout)",
)

phd_instant_ngp = MethodSpecification(
    config=TrainerConfig(
        method_name="phd-instant-ngp",
        steps_per_eval_batch=500,
        steps_per_save=2000,
        max_num_iterations=30_000,
        mixed_precision=True,
        pipeline=DynamicBatchPipelineConfig(
            datamanager=VanillaDataManagerConfig(
                dataparser=NerfstudioDataParserConfig(),
                train_num_rays_per_batch=4096,
                eval_num_rays_per_batch=4096,
            ),
            model=PHDropoutInstantNGPModelConfig(eval_num_rays_per_chunk=8192),
        ),
        optimizers={"fields": _adam(1e-2, 1e-4, max_steps=200_000)},
        viewer=ViewerConfig(num_rays_per_chunk=1 << 12),
        vis="viewer",
    ),
    description="instant-ngp with post hoc epistemic uncertainty (PH-Dropout); needs CUDA",
)

phd_vanilla_nerf = MethodSpecification(
    config=TrainerConfig(
        method_name="phd-vanilla-nerf",
        pipeline=VanillaPipelineConfig(
            datamanager=VanillaDataManagerConfig(dataparser=BlenderDataParserConfig()),
            model=PHDropoutVanillaModelConfig(),
        ),
        optimizers={
            name: {"optimizer": RAdamOptimizerConfig(lr=5e-4, eps=1e-8), "scheduler": None}
            for name in ("fields", "temporal_distortion")
        },
    ),
    description="vanilla-nerf with post hoc epistemic uncertainty (PH-Dropout)",
)

phd_nerfacto_tiny = MethodSpecification(
    config=_tiny_trainer(
        "phd-nerfacto-tiny",
        VanillaPipelineConfig(
            datamanager=VanillaDataManagerConfig(
                dataparser=PHDSyntheticDataParserConfig(),
                train_num_rays_per_batch=512,
                eval_num_rays_per_batch=256,
            ),
            model=PHDropoutNerfactoModelConfig(
                near_plane=2.0,
                far_plane=7.0,
                background_color="random",
                disable_scene_contraction=True,
                num_levels=8,
                max_res=256,
                log2_hashmap_size=14,
                num_proposal_samples_per_ray=(32, 16),
                num_nerf_samples_per_ray=16,
                proposal_net_args_list=[
                    {
                        "hidden_dim": 16,
                        "log2_hashmap_size": 13,
                        "num_levels": 4,
                        "max_res": 64,
                        "use_linear": False,
                    },
                    {
                        "hidden_dim": 16,
                        "log2_hashmap_size": 13,
                        "num_levels": 4,
                        "max_res": 128,
                        "use_linear": False,
                    },
                ],
                proposal_initial_sampler="uniform",
                use_appearance_embedding=False,
                camera_optimizer=CameraOptimizerConfig(mode="off"),
                eval_num_rays_per_chunk=4096,
            ),
        ),
        {"proposal_networks": _adam(1e-2, 1e-3, max_steps=1000), "fields": _adam(1e-2, 1e-3, max_steps=1000)},
        steps=600,
    ),
    description="phd-nerfacto of a size for a CPU and the procedural scenes",
)

phd_vanilla_nerf_tiny = MethodSpecification(
    config=_tiny_trainer(
        "phd-vanilla-nerf-tiny",
        VanillaPipelineConfig(
            datamanager=VanillaDataManagerConfig(
                dataparser=PHDSyntheticDataParserConfig(),
                train_num_rays_per_batch=128,
                eval_num_rays_per_batch=128,
            ),
            model=PHDropoutVanillaModelConfig(
                num_coarse_samples=16, num_importance_samples=16, eval_num_rays_per_chunk=2048
            ),
        ),
        {"fields": {"optimizer": RAdamOptimizerConfig(lr=5e-4, eps=1e-8), "scheduler": None}},
        steps=300,
    ),
    description="phd-vanilla-nerf of a size for a CPU and the procedural scenes",
)

phd_splatfacto_tiny = MethodSpecification(
    config=_tiny_trainer(
        "phd-splatfacto-tiny",
        VanillaPipelineConfig(
            datamanager=FullImageDatamanagerConfig(
                dataparser=PHDSyntheticDataParserConfig(max_points=1200), cache_images_type="uint8"
            ),
            model=PHDropoutSplatfactoModelConfig(
                sh_degree=1, num_downscales=0, warmup_length=150, refine_every=100, use_absgrad=False,
                background_color="black",
            ),
        ),
        _splat_optimizers(speed=6.0),
        steps=400,
    ),
    description="phd-splatfacto of a size for a CPU and the procedural scenes",
)  # fmt: skip

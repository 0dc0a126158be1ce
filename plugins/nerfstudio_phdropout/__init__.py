"""PH-Dropout: where a trained NeRF or Gaussian-splat scene is guessing, without training it again."""

from nerfstudio_phdropout.config import PHDropoutConfig
from nerfstudio_phdropout.kernels import rasterize_moments
from nerfstudio_phdropout.masks import drop_uniforms, maskable_layers, posthoc_dropout
from nerfstudio_phdropout.metrics import (
    auce,
    ause,
    calibrate_scale,
    coverage,
    ece,
    nll,
    pearson,
    sparsification_curve,
    spearman,
    uncertainty_metrics,
)
from nerfstudio_phdropout.moments import RenderMoments, composite_moments, monte_carlo_moments
from nerfstudio_phdropout.rasterize import rasterization, rasterization_moments
from nerfstudio_phdropout.search import DropoutSearchResult, max_dropout_ratio
from nerfstudio_phdropout.selection import (
    ensemble_efficacy,
    fuse_by_uncertainty,
    next_best_views,
    unknown_background_std,
    view_score,
)

__all__ = [
    "DropoutSearchResult",
    "PHDropoutConfig",
    "RenderMoments",
    "auce",
    "ause",
    "calibrate_scale",
    "composite_moments",
    "coverage",
    "drop_uniforms",
    "ece",
    "ensemble_efficacy",
    "fuse_by_uncertainty",
    "maskable_layers",
    "max_dropout_ratio",
    "monte_carlo_moments",
    "next_best_views",
    "nll",
    "pearson",
    "posthoc_dropout",
    "rasterization",
    "rasterization_moments",
    "rasterize_moments",
    "sparsification_curve",
    "spearman",
    "uncertainty_metrics",
    "unknown_background_std",
    "view_score",
]

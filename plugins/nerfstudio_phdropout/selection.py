"""Uses of an uncertainty: choose the next view, choose or blend models (arXiv 2410.05468, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nerfstudio_phdropout.moments import RenderMoments

# Weights of the inverse-variance blend stay finite where a model is certain.
_VARIANCE_FLOOR = 1e-8


def view_score(rgb_std: Tensor, reduction: Literal["mean", "max"] = "mean") -> float:
    """One figure a view: the mean or largest standard deviation of ``rgb_std`` ``[..., 3]``."""
    if reduction not in ("mean", "max"):
        raise ValueError(f"reduction must be 'mean' or 'max', got {reduction!r}")
    return float(rgb_std.mean() if reduction == "mean" else rgb_std.max())


def unknown_background_std(moments: RenderMoments, spread: float = 12**-0.5) -> Tensor:
    """Sigma where the colour behind the Gaussians is not known either: ``sqrt(V + E[T^2] spread^2)``.

    Dropping Gaussians cannot move a pixel that has none, so plain sigma is 0 where a model has a hole. With
    an independent background of standard deviation ``spread`` the law of total variance adds
    ``E[T^2] = (1 - accumulation)^2 + accumulation_variance`` times its variance, exactly. To choose views,
    or between models that have seen different sides, use this one.

    Args:
        moments: of `rasterization_moments` or `composite_moments`; fields ``[*B, D]`` and ``[*B]``.
        spread: of the background; by default that of a uniform colour.

    Returns:
        ``[*B, D]``.

    Raises:
        ValueError: moments without accumulation, or a negative spread.
    """
    accumulation, variance = moments.accumulation, moments.accumulation_variance
    if accumulation is None or variance is None:
        raise ValueError("moments have no accumulation; take those of rasterization_moments")
    if not spread >= 0:
        raise ValueError(f"spread must be >= 0, got {spread}")
    transparent = (1 - accumulation) ** 2 + variance
    return (moments.variance + (transparent * spread**2)[..., None]).sqrt()


def next_best_views(scores: Sequence[float], k: int) -> list[int]:
    """Indices of the ``k`` highest scores, best first; equal scores by index.

    Raises:
        ValueError: k outside 1 .. len(scores).
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"k must lie in 1 .. {len(scores)} (candidates), got {k}")
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def fuse_by_uncertainty(
    means: Tensor, stds: Tensor, level: Literal["view", "pixel", "inverse_variance"] = "view"
) -> Tensor:
    """One image out of several models'.

    Args:
        means, stds: ``[K, H, W, 3]``.
        level: ``view``: the model of lowest mean std; ``pixel``: the same, pixel by pixel;
            ``inverse_variance``: all models, weighted by 1 / std^2.

    Returns:
        ``[H, W, 3]``.

    Raises:
        ValueError: shapes differ, or an unknown level.
    """
    if means.shape != stds.shape or means.ndim != 4:
        raise ValueError(
            f"means and stds must both be [K, H, W, 3], got {tuple(means.shape)}, {tuple(stds.shape)}"
        )
    if level == "view":
        return means[int(stds.mean(dim=(1, 2, 3)).argmin())]
    if level == "pixel":
        best = stds.mean(dim=-1, keepdim=True).argmin(dim=0, keepdim=True)
        return torch.gather(means, 0, best.expand(1, *means.shape[1:]))[0]
    if level == "inverse_variance":
        weights = 1 / (stds**2 + _VARIANCE_FLOOR)
        return (weights * means).sum(dim=0) / weights.sum(dim=0)
    raise ValueError(f"level must be 'view', 'pixel' or 'inverse_variance', got {level!r}")


def ensemble_efficacy(selected: Sequence[float], best: Sequence[float]) -> float:
    """E_em: mean over views of SSIM of the model selected / SSIM of the best possible one; 1 is perfect.

    Raises:
        ValueError: lengths differ, no views, or a best value that is not positive.
    """
    if len(selected) != len(best) or not best:
        raise ValueError(
            f"selected and best must be equally long and not empty, got {len(selected)}, {len(best)}"
        )
    if min(best) <= 0:
        raise ValueError(f"best must be positive, got {min(best)}")
    return sum(s / b for s, b in zip(selected, best, strict=True)) / len(best)

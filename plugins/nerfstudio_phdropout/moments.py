"""Mean and variance of a rendering over dropout masks: exact for compositing, by trials for anything else.

Exact moments of masked compositing. Splat i (front to back) has opacity a, colour c, drop probability p,
q = 1 - p. One trial composites C_i = C_{i+1} + m_i a_i (c_i - C_{i+1}), with the background behind the last.
From the total expectation and variance, back to front, with M, V, T, V_T, K the mean and variance of the
colour, the mean and variance of the transmittance and their covariance behind splat i:

    d = a (c - M),   t = -a T,   g = p + q (1 - a)^2
    V <- g V + p q d^2,   V_T <- g V_T + p q t^2,   K <- g K + p q d t,   M <- M + q d,   T <- T + q t

Every term of V is >= 0, so nothing cancels, as it would in raw second moments (E[C^2] - M^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nerfstudio_phdropout.checks import check_floating, check_ratio


@dataclass(frozen=True)
class RenderMoments:
    """First two moments of a rendering over dropout masks. ``B`` stands for any leading shape.

    Attributes:
        mean: ``[*B, D]`` E[colour].
        variance: ``[*B, D]`` Var[colour], >= 0.
        accumulation: ``[*B]`` E[1 - final transmittance].
        accumulation_variance: ``[*B]``.
        covariance: ``[*B, D]`` Cov[colour, accumulation].
    """

    mean: Tensor
    variance: Tensor
    accumulation: Tensor | None = None
    accumulation_variance: Tensor | None = None
    covariance: Tensor | None = None

    @property
    def std(self) -> Tensor:
        """``[*B, D]`` standard deviation of each channel."""
        return self.variance.sqrt()

    @property
    def accumulation_std(self) -> Tensor | None:
        """``[*B]`` standard deviation of the accumulation, if known."""
        return None if self.accumulation_variance is None else self.accumulation_variance.sqrt()

    def expected_squared_error(self, target: Tensor) -> Tensor:
        """``[*B, D]`` E[(trial - target)^2] = variance + (mean - target)^2."""
        return self.variance + (self.mean - target) ** 2


def composite_moments(
    alphas: Tensor,
    colors: Tensor,
    dropout_ratio: float | Tensor,
    background: Tensor | None = None,
) -> RenderMoments:
    """Exact moments of front-to-back compositing when each splat is dropped independently.

    Differentiable in every tensor argument. Time and memory are those of one compositing.

    Args:
        alphas: ``[*B, N]`` in [0, 1], front to back, already clamped and cut.
        colors: ``[N, D]`` or ``[*B, N, D]``.
        dropout_ratio: scalar, ``[N]`` or ``[*B, N]``, in [0, 1).
        background: ``[D]`` or ``[*B, D]``; zeros if None.

    Raises:
        ValueError: ratio outside [0, 1), or shapes that do not fit.
        TypeError: integer tensors.
    """
    check_floating("alphas", alphas)
    check_floating("colors", colors)
    check_ratio(dropout_ratio)
    count, channels = alphas.shape[-1], colors.shape[-1]
    if colors.shape[-2] != count:
        raise ValueError(f"colors hold {colors.shape[-2]} splats, alphas {count}")
    shape = (*alphas.shape[:-1], channels)
    drop = torch.as_tensor(dropout_ratio, dtype=alphas.dtype, device=alphas.device).expand(alphas.shape)
    mean = alphas.new_zeros(shape) if background is None else background.to(alphas).expand(shape)
    variance, covariance = alphas.new_zeros(shape), alphas.new_zeros(shape)
    through, through_variance = torch.ones_like(alphas[..., 0]), torch.zeros_like(alphas[..., 0])
    for i in range(count - 1, -1, -1):
        a, p = alphas[..., i], drop[..., i]
        q = 1 - p
        g, pq = p + q * (1 - a) ** 2, p * q
        d = a[..., None] * (colors[..., i, :] - mean)
        t = -a * through
        variance = g[..., None] * variance + pq[..., None] * d**2
        through_variance = g * through_variance + pq * t**2
        covariance = g[..., None] * covariance + (pq * t)[..., None] * d
        mean = mean + q[..., None] * d
        through = through + q * t
    return RenderMoments(mean, variance, 1 - through, through_variance, -covariance)


def monte_carlo_moments(
    render_trial: Callable[[int], Tensor], num_trials: int, *, quantize: bool = False
) -> RenderMoments:
    """Mean and unbiased variance of ``num_trials`` renderings, one at a time (Welford), in float32.

    Args:
        render_trial: trial number -> image ``[*B, D]``.
        num_trials: at least 2.
        quantize: round each image to 8 bits first, as the authors' code does by way of PNG files.

    Raises:
        ValueError: fewer than 2 trials.
    """
    if num_trials < 2:
        raise ValueError(f"num_trials must be at least 2 for an unbiased variance, got {num_trials}")
    mean = squares = None
    for trial in range(num_trials):
        image = render_trial(trial)
        if quantize:
            image = (image.clamp(0, 1) * 255).round() / 255
        if mean is None or squares is None:
            mean, squares = torch.zeros_like(image), torch.zeros_like(image)
        delta = image - mean
        mean = mean + delta / (trial + 1)
        squares = squares + delta * (image - mean)
    assert mean is not None
    assert squares is not None
    return RenderMoments(mean, squares / (num_trials - 1))

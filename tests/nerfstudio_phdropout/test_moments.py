"""Exact moments against the enumeration of every mask, and the streaming estimator against two passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splat_scenes import enumerate_masks

from nerfstudio_phdropout import RenderMoments, composite_moments, monte_carlo_moments

FIELDS = ("mean", "variance", "accumulation", "accumulation_variance", "covariance")


def ray(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    alphas = torch.rand(count, generator=generator, dtype=torch.float64)
    if count > 2:
        alphas[0], alphas[1] = 0.0, 0.999
    colors = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    drop = torch.rand(count, generator=generator, dtype=torch.float64) * 0.95
    return alphas, colors, drop, torch.rand(3, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000), st.booleans(), st.booleans())
def test_ph01_equals_enumeration_of_all_masks(count, seed, uniform, black):
    alphas, colors, drop, background = ray(count, seed)
    if uniform:
        drop = drop[:1].expand(count)
    if black:
        background = torch.zeros(3, dtype=torch.float64)
    exact = composite_moments(
        alphas, colors, float(drop[0]) if uniform else drop, None if black else background
    )
    expected = enumerate_masks(alphas, colors, drop, background)
    for field in FIELDS:
        torch.testing.assert_close(getattr(exact, field), expected[field], rtol=0, atol=1e-12)


def test_ph01_twelve_splats_and_order_matters():
    alphas, colors, drop, background = ray(12, 3)
    for order in (torch.arange(12), torch.arange(11, -1, -1)):
        a, c, p = alphas[order], colors[order], drop[order]
        exact = composite_moments(a, c, p, background)
        expected = enumerate_masks(a, c, p, background)
        for field in FIELDS:
            torch.testing.assert_close(getattr(exact, field), expected[field], rtol=0, atol=1e-12)


def test_ph01_mean_is_the_render_with_scaled_alphas():
    alphas, colors, drop, background = ray(50, 4)
    plain = composite_moments((1 - drop) * alphas, colors, 0.0, background)
    torch.testing.assert_close(
        composite_moments(alphas, colors, drop, background).mean, plain.mean, rtol=0, atol=1e-14
    )


def test_ph01_batches_and_zero_ratio():
    alphas = torch.rand(4, 5, 30, dtype=torch.float64)
    colors = torch.rand(4, 5, 30, 3, dtype=torch.float64)
    drop = torch.rand(4, 5, 30, dtype=torch.float64) * 0.9
    together = composite_moments(alphas, colors, drop)
    alone = composite_moments(alphas[2, 3], colors[2, 3], drop[2, 3])
    torch.testing.assert_close(together.variance[2, 3], alone.variance, rtol=0, atol=1e-15)
    none = composite_moments(alphas, colors, 0.0)
    assert torch.equal(none.variance, torch.zeros_like(none.variance))


def test_ph01_float32_keeps_small_sigma():
    generator = torch.Generator().manual_seed(0)
    alphas = torch.rand(16, 1500, generator=generator, dtype=torch.float64) * 0.05
    colors = torch.rand(1500, 3, generator=generator, dtype=torch.float64)
    exact = composite_moments(alphas, colors, 0.001).std
    single = composite_moments(alphas.float(), colors.float(), 0.001).std
    assert float(((single - exact).abs() / exact).max()) < 1e-4


def test_ph21_gradients_of_the_moments():
    alphas, colors, drop, background = ray(5, 7)
    alphas = alphas.clamp(0.1, 0.9)
    inputs = [tensor.clone().requires_grad_() for tensor in (alphas, colors, drop, background)]

    def all_fields(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        moments = composite_moments(*tensors)
        return tuple(getattr(moments, field) for field in FIELDS)

    assert torch.autograd.gradcheck(all_fields, inputs)


def test_ph07_streaming_equals_two_passes():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(50, 6, 5, 3, generator=generator)
    moments = monte_carlo_moments(lambda trial: images[trial], 50)
    torch.testing.assert_close(moments.mean, images.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.std, images.std(0, unbiased=True), rtol=0, atol=1e-6)


def test_ph07_keeps_no_trial_alive():
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def trial(_index: int) -> torch.Tensor:
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2
        image = torch.rand(64, 64, 3)
        alive.append(weakref.ref(image))
        return image

    monte_carlo_moments(trial, 12)


def test_ph07_quantized_trials_lose_small_differences():
    moments = monte_carlo_moments(lambda trial: torch.full((4, 4, 3), 0.5 + 1e-4 * trial), 5, quantize=True)
    assert float(moments.std.max()) == 0.0
    assert float(moments.mean[0, 0, 0]) == pytest.approx(128 / 255)


def test_expected_squared_error_adds_variance_and_bias():
    moments = RenderMoments(torch.tensor([0.5]), torch.tensor([0.04]))
    assert float(moments.expected_squared_error(torch.tensor([0.2]))) == pytest.approx(0.13)


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), torch.tensor([0.2, 1.5])])
def test_ratio_outside_the_interval_is_refused(ratio):
    with pytest.raises(ValueError, match=r"dropout_ratio must lie in \[0, 1\), got"):
        composite_moments(torch.rand(2), torch.rand(2, 3), ratio)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="colors hold 3 splats, alphas 2"):
        composite_moments(torch.rand(2), torch.rand(3, 3), 0.1)
    with pytest.raises(TypeError, match="alphas must be a floating-point tensor"):
        composite_moments(torch.ones(2, dtype=torch.int64), torch.rand(2, 3), 0.1)
    with pytest.raises(ValueError, match="num_trials must be at least 2"):
        monte_carlo_moments(lambda _: torch.rand(2), 1)

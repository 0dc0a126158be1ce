"""Views and models chosen by uncertainty."""

from __future__ import annotations

import pytest
import torch
from splat_scenes import enumerate_masks

from benchmarks import nerfstudio_phdropout_views as study
from nerfstudio_phdropout import (
    RenderMoments,
    composite_moments,
    ensemble_efficacy,
    fuse_by_uncertainty,
    next_best_views,
    unknown_background_std,
    view_score,
)


def test_ph16_next_views_descend_and_ties_go_by_index():
    assert next_best_views([0.1, 0.5, 0.5, 0.9], 3) == [3, 1, 2]
    with pytest.raises(ValueError, match=r"k must lie in 1 .. 2"):
        next_best_views([0.1, 0.2], 3)


def test_ph16_fusion_levels():
    means = torch.stack([torch.zeros(4, 4, 3), torch.ones(4, 4, 3)])
    stds = torch.full((2, 4, 4, 3), 0.1)
    stds[0, :, :1] = 0.4
    assert torch.equal(fuse_by_uncertainty(means, stds, "view"), torch.ones(4, 4, 3))
    stds[1, :, 1:] = 0.2
    picked = fuse_by_uncertainty(means, stds, "pixel")
    assert torch.equal(picked[..., 0], torch.tensor([[1.0, 0, 0, 0]]).expand(4, 4))
    blended = fuse_by_uncertainty(means, stds, "inverse_variance")
    assert float(blended[0, 1, 0]) == pytest.approx(0.2, rel=1e-4)
    with pytest.raises(ValueError, match="level must be"):
        fuse_by_uncertainty(means, stds, "median")
    with pytest.raises(ValueError, match="must both be"):
        fuse_by_uncertainty(means, stds[..., :1])


def test_ph16_efficacy_and_scores():
    assert ensemble_efficacy([0.8, 0.9], [0.8, 0.9]) == 1.0
    assert ensemble_efficacy([0.4, 0.9], [0.8, 0.9]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="equally long"):
        ensemble_efficacy([0.4], [])
    std = torch.tensor([[[0.1, 0.2, 0.3]]])
    assert view_score(std) == pytest.approx(0.2)
    assert view_score(std, "max") == pytest.approx(0.3)


SMALL = {"models": 3, "resolution": 24, "gaussians": 150, "steps": 60}


def test_ph16_models_of_different_arcs_fused_by_sigma_beat_the_best_of_them_and_their_mean():
    found = study.fuse_models(0, "captures of three arcs", **SMALL)
    best, fused = min(found["models"]), found["sigma before an unknown background"]
    for level in ("view", "pixel", "inverse_variance"):
        assert fused[level] <= 0.9 * best, level
        assert fused[level] < found["plain mean"], level
    assert 0.95 < fused["efficacy"] <= 1
    # Plain sigma is 0 in the holes of a model, so it chooses the models that have them.
    assert found["sigma"]["pixel"] > best


def test_ph16_sigma_before_an_unknown_background_is_that_of_all_masks_and_two_backgrounds():
    generator = torch.Generator().manual_seed(0)
    alphas, colors = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((6,), (6, 3)))
    drop, spread, middle = 0.3, 0.2, torch.tensor([0.4, 0.1, 0.7], dtype=torch.float64)
    found = unknown_background_std(composite_moments(alphas, colors, drop, middle), spread)
    ratios = torch.full((6,), drop, dtype=torch.float64)
    two = [enumerate_masks(alphas, colors, ratios, middle + sign * spread) for sign in (-1, 1)]
    square = sum(moments["variance"] + moments["mean"] ** 2 for moments in two) / 2
    mean = sum(moments["mean"] for moments in two) / 2
    assert torch.allclose(found**2, square - mean**2, rtol=1e-12, atol=1e-14)
    hole = composite_moments(torch.zeros(6), colors.float(), drop)
    assert unknown_background_std(hole, 0.5).tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="no accumulation"):
        unknown_background_std(RenderMoments(colors, colors))
    with pytest.raises(ValueError, match="spread must be >= 0"):
        unknown_background_std(hole, float("nan"))


def test_ph16_the_next_view_lies_on_the_side_that_no_view_has_shown():
    views = [(float(azimuth), 30.0) for azimuth in range(0, 360, 30)]
    seen, candidates = study.capture(1, study.arc(0, 120, 8), 24), study.capture(1, views, 24)
    model = study.train(seen, gaussians=150, steps=60, seed=0)
    sigmas = study.sigmas_of(model, seen, candidates)[1]["sigma before an unknown background"]
    for chosen in next_best_views([view_score(view) for view in sigmas], 3):
        assert 150 <= views[chosen][0] <= 330

"""Views and models chosen by uncertainty."""

from __future__ import annotations

import pytest
import torch

from nerfstudio_phdropout import ensemble_efficacy, fuse_by_uncertainty, next_best_views, view_score


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

"""``phdropout.render`` under the harness's contract."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moecap_eval.workload import ArmConfig
from nerfstudio_phdropout.moecap_workloads import RenderWorkload

PARAMS = {"views": 4, "resolution": 24, "gaussians": 200}


def opened(**options):
    context = SimpleNamespace(seed=0, params=PARAMS)
    return RenderWorkload().open(ArmConfig("arm", options), context)


def test_ph22_arms_agree_on_the_image_and_differ_in_what_sigma_costs():
    items = RenderWorkload().items(PARAMS, 0)
    assert [item.id for item in items] == ["view/0", "view/1", "view/2", "view/3"]
    exact, trials, plain = (
        opened(estimator="exact").run(items),
        opened(estimator="monte_carlo", num_trials=60).run(items),
        opened(estimator="none").run(items),
    )
    for result in (exact, trials, plain):
        assert result.work == 4 * 24 * 24
        assert result.values["frames_per_s"] > 0
        assert result.values["peak_bytes"] is None
        assert "peak_bytes" in result.reasons
    for one, many in zip(exact.samples, trials.samples, strict=True):
        assert one.values["psnr_db"] == pytest.approx(many.values["psnr_db"], abs=0.3)
        assert one.values["spearman"] == pytest.approx(many.values["spearman"], abs=0.05)
    assert plain.samples[0].values["spearman"] is None
    assert "spearman" in plain.reasons


def test_ph22_unknown_options_are_refused():
    with pytest.raises(ValueError, match="did you mean 'num_trials'"):
        opened(num_trial=3)
    with pytest.raises(ValueError, match="estimator must be one of"):
        opened(estimator="laplace")
    with pytest.raises(ValueError, match="num_trials must be at least 2"):
        opened(num_trials=1)
    with pytest.raises(ValueError, match="did you mean 'views'"):
        RenderWorkload().items({"view": 3}, 0)
    with pytest.raises(ValueError, match="dropout_ratio must lie"):
        RenderWorkload().items({"ratio": 1.0}, 0)

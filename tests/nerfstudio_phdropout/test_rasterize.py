"""The torch rasterizer and its moments against dense renderings, gsplat's torch functions and trials."""

from __future__ import annotations

import math

import pytest
import torch
from splat_scenes import dense_alphas, dense_render, enumerate_masks, random_gaussians

from nerfstudio_phdropout import (
    composite_moments,
    drop_uniforms,
    gsplat_backend,
    rasterization,
    rasterization_moments,
    rasterize_moments,
)
from nerfstudio_phdropout.geometry import project, sh_basis
from nerfstudio_phdropout.rasterize import expected_depth_moments
from nerfstudio_phdropout.tiles import intersect_tiles

SIZE = (40, 30)
BACKGROUND = torch.tensor([[0.2, 0.5, 0.7]], dtype=torch.float64)


def test_ph04_equals_a_dense_render():
    scene = random_gaussians(60)
    image, accumulation, _ = rasterization(**scene, width=40, height=30, backgrounds=BACKGROUND)
    alphas, order = dense_alphas(scene, *SIZE)
    expected = dense_render(alphas, scene["colors"][order], BACKGROUND[0])
    torch.testing.assert_close(image[0], expected, rtol=0, atol=1e-5)
    black = dense_render(alphas, torch.ones(60, 1, dtype=torch.float64), torch.zeros(1))
    torch.testing.assert_close(accumulation[0], black, rtol=0, atol=1e-5)


def test_ph04_gradcheck_of_five_gaussians():
    scene = random_gaussians(5, seed=2)
    scene["opacities"] = scene["opacities"].clamp(max=0.6)
    names = ("means", "quats", "scales", "opacities", "colors")
    inputs = [scene[name].clone().requires_grad_() for name in names]

    def render(*tensors: torch.Tensor) -> torch.Tensor:
        values = {**scene, **dict(zip(names, tensors, strict=True))}
        return rasterization(**values, width=10, height=8, backgrounds=BACKGROUND)[0]

    scene["Ks"] = torch.tensor([[[10.0, 0, 5], [0, 10, 4], [0, 0, 1]]], dtype=torch.float64)
    scene["scales"] = scene["scales"] * 0 + 0.9
    assert torch.autograd.gradcheck(render, inputs, eps=1e-7, atol=1e-4, rtol=1e-3, nondet_tol=0.0)


@pytest.mark.nerfstudio
def test_ph04_projection_equals_gsplats_torch_functions():
    reference = pytest.importorskip("gsplat.cuda._torch_impl")
    scene = random_gaussians(200, seed=5)
    covars, _ = reference._quat_scale_to_covar_preci(scene["quats"], scene["scales"])
    expected = reference._fully_fused_projection(
        scene["means"], covars, scene["viewmats"], scene["Ks"], *SIZE, calc_compensations=True
    )
    means2d, conics, opacity, depths, radii = project(
        scene["means"], scene["quats"], scene["scales"], scene["opacities"], scene["viewmats"], scene["Ks"],
        *SIZE, 0.01, 1e10, 0.3, True,
    )  # fmt: skip
    shown = (radii > 0).all(-1)
    assert int(shown.sum()) > 100
    for ours, theirs in ((means2d, expected[1]), (depths, expected[2]), (conics, expected[3])):
        torch.testing.assert_close(ours[shown], theirs[shown])
    torch.testing.assert_close(opacity, scene["opacities"] * expected[4])
    assert bool((radii <= expected[0]).all())


@pytest.mark.nerfstudio
def test_ph04_tile_lists_and_harmonics_equal_gsplats_torch_functions():
    reference = pytest.importorskip("gsplat.cuda._torch_impl")
    generator = torch.Generator().manual_seed(0)
    means2d = torch.rand(2, 30, 2, generator=generator) * 60 - 10
    radii = torch.randint(0, 12, (2, 30, 2), generator=generator)
    depths = torch.rand(2, 30, generator=generator)
    _, isect_ids, flatten_ids = reference._isect_tiles(means2d, radii, depths, 8, 5, 4)
    offsets = reference._isect_offset_encode(isect_ids, 2, 5, 4)
    ours, ids = intersect_tiles(means2d, radii, depths, 8, 5, 4)
    assert torch.equal(ours, offsets)
    assert torch.equal(ids, flatten_ids)
    directions = torch.nn.functional.normalize(torch.randn(50, 3, generator=generator), dim=-1)
    for degree in range(5):
        theirs = reference._eval_sh_bases_fast((degree + 1) ** 2, directions)
        torch.testing.assert_close(sh_basis(degree, directions), theirs, rtol=0, atol=2e-6)


def test_ph03_mean_is_the_render_with_scaled_opacities_and_zero_is_plain():
    for mode in ("classic", "antialiased"):
        scene = random_gaussians(80, seed=3, dtype=torch.float32)
        scene["opacities"] = scene["opacities"].clamp(max=0.6)
        options = {"width": 40, "height": 30, "backgrounds": BACKGROUND.float(), "rasterize_mode": mode}
        plain = rasterization(**scene, **options)[0]
        nothing, _ = rasterization_moments(**scene, dropout_ratio=0.0, **options)
        assert torch.equal(nothing.mean, plain)
        assert torch.equal(nothing.variance, torch.zeros_like(plain))
    scene = random_gaussians(40, seed=3)
    alphas, order = dense_alphas(scene, *SIZE)
    moments, _ = rasterization_moments(
        **scene, dropout_ratio=0.2, width=40, height=30, backgrounds=BACKGROUND
    )
    expected = dense_render(0.8 * alphas, scene["colors"][order], BACKGROUND[0])
    torch.testing.assert_close(moments.mean[0], expected, rtol=0, atol=1e-12)


def test_ph03_equals_enumeration_on_a_small_scene():
    scene = random_gaussians(8, seed=4)
    drop = torch.linspace(0.05, 0.6, 8, dtype=torch.float64)
    moments, _ = rasterization_moments(
        **scene, dropout_ratio=drop, width=40, height=30, backgrounds=BACKGROUND
    )
    alphas, order = dense_alphas(scene, *SIZE)
    crowded = alphas.gt(0).sum(-1).flatten().argsort(descending=True)[:6]
    for pixel in crowded.tolist():
        y, x = divmod(pixel, 40)
        expected = enumerate_masks(alphas[y, x], scene["colors"][order], drop[order], BACKGROUND[0])
        assert float(moments.variance[0, y, x].max()) > 1e-4
        torch.testing.assert_close(moments.mean[0, y, x], expected["mean"], rtol=0, atol=1e-12)
        torch.testing.assert_close(moments.variance[0, y, x], expected["variance"], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            moments.accumulation_variance[0, y, x], expected["accumulation_variance"], rtol=0, atol=1e-12
        )


def test_ph03_tiles_agree_with_the_dense_recursion_and_float32():
    scene = random_gaussians(300, seed=6)
    options = {"width": 40, "height": 30, "dropout_ratio": 0.05, "render_mode": "RGB+D"}
    moments, _ = rasterization_moments(**scene, backgrounds=BACKGROUND, **options)
    alphas, order = dense_alphas(scene, *SIZE)
    square = torch.cumprod(0.05 + 0.95 * (1 - alphas) ** 2, dim=-1)
    alphas = torch.where(square > 1e-8, alphas, 0.0)
    depth = (scene["means"][:, 2] + 4)[:, None]
    channels = torch.cat([scene["colors"], depth], dim=-1)[order]
    expected = composite_moments(alphas, channels, 0.05, torch.cat([BACKGROUND[0], torch.zeros(1)]))
    for field in ("mean", "variance", "accumulation", "accumulation_variance", "covariance"):
        torch.testing.assert_close(
            getattr(moments, field)[0], getattr(expected, field), rtol=1e-9, atol=1e-12
        )
    single = {name: tensor.float() for name, tensor in scene.items()}
    coarse, _ = rasterization_moments(**single, backgrounds=BACKGROUND.float(), **options)
    torch.testing.assert_close(coarse.std.double(), moments.std, rtol=1e-3, atol=1e-5)


def test_ph03_within_five_standard_errors_of_trials():
    trials, ratio, scene = 1500, 0.1, random_gaussians(40, seed=8, dtype=torch.float32)
    scene["opacities"] = scene["opacities"].clamp(max=0.5)

    def render(trial: int) -> torch.Tensor:
        kept = drop_uniforms(40, seed=0, trial=trial) >= ratio
        return rasterization(**{**scene, "opacities": scene["opacities"] * kept}, width=16, height=12)[0]

    scene["Ks"] = torch.tensor([[[16.0, 0, 8], [0, 16, 6], [0, 0, 1]]])
    exact, _ = rasterization_moments(**scene, dropout_ratio=ratio, width=16, height=12)
    images = torch.stack([render(trial) for trial in range(trials)]).double()
    error = exact.std.double() / math.sqrt(trials)
    assert bool(((images.mean(0) - exact.mean).abs() <= 5 * error + 2e-6).all())
    centred = (images - images.mean(0)) ** 2
    variance_error = (centred**2).mean(0).sub(centred.mean(0) ** 2).clamp(min=0).sqrt() / math.sqrt(trials)
    assert bool(((images.var(0) - exact.variance).abs() <= 5 * variance_error + 1e-7).all())


def test_ph14_depth_and_expected_depth():
    ratio, splats, count = 0.05, 500, 20_000
    scene = random_gaussians(splats, seed=9)
    scene["opacities"] = scene["opacities"] * 0.12
    scene["Ks"] = torch.tensor([[[8.0, 0, 2], [0, 8, 2], [0, 0, 1]]], dtype=torch.float64)
    exact, _ = rasterization_moments(**scene, dropout_ratio=ratio, render_mode="RGB+D", width=4, height=4)
    alphas, order = dense_alphas(scene, 4, 4)
    alphas = alphas.view(16, splats)
    depths = (scene["means"][order, 2] + 4).expand(16, splats)
    total = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count // 1000):
        kept = torch.rand(1000, 1, splats, generator=generator) >= ratio
        through = torch.cumprod(1 - alphas * kept, dim=-1)
        weights = alphas * kept * torch.cat([torch.ones(1000, 16, 1), through[..., :-1]], dim=-1)
        depth, accumulation = (weights * depths).sum(-1), 1 - through[..., -1]
        total.append(torch.stack([depth, accumulation, depth / accumulation.clamp(min=1e-10)]))
    trials = torch.cat(total, dim=1)
    mean, spread = trials.mean(1), trials.std(1)
    centred = (trials - mean[:, None]) ** 2
    spread_error = centred.var(1).sqrt() / (2 * spread * math.sqrt(count))
    dense = exact.accumulation.flatten() > 0.5
    assert int(dense.sum()) > 10
    expected_mean, expected_std = expected_depth_moments(exact)
    for row, ours, bias in (
        (0, exact.std[..., 3], 0.0),
        (1, exact.accumulation_std, 0.0),
        (2, expected_std, 0.03),
    ):
        difference = (ours.flatten() - spread[row]).abs()[dense]
        assert bool((difference <= bias * spread[row][dense] + 5 * spread_error[row][dense] + 2e-4).all())
    assert float((expected_std.flatten() / spread[2])[dense].mean()) == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(expected_mean.flatten()[dense], mean[2][dense], rtol=5e-3, atol=0)
    with pytest.raises(ValueError, match=r"render with render_mode='RGB\+D'"):
        expected_depth_moments(rasterization_moments(**scene, dropout_ratio=0.1, width=8, height=8)[0])


def test_ph03_a_stack_of_opaque_splats_keeps_its_rare_gaps():
    """Four opaque splats leave E[T] = 1e-4, but dropped together show the fifth: 1e-2 of its contrast."""
    count, ratio = 9, 0.1
    means = torch.zeros(count, 3, dtype=torch.float64)
    means[:, 2] = torch.arange(count) * 0.01
    scene = {
        "means": means,
        "quats": torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).expand(count, 4),
        "scales": torch.full((count, 3), 5.0, dtype=torch.float64),
        "opacities": torch.ones(count, dtype=torch.float64),
        "colors": (torch.arange(count) >= 4).double()[:, None].expand(count, 3),
        **{name: random_gaussians(1)[name] for name in ("viewmats", "Ks")},
    }
    moments, _ = rasterization_moments(**scene, dropout_ratio=ratio, width=40, height=30)
    alphas, order = dense_alphas(scene, 40, 30)
    drop = torch.full((count,), ratio, dtype=torch.float64)
    expected = enumerate_masks(
        alphas[15, 20], scene["colors"][order], drop, torch.zeros(3, dtype=torch.float64)
    )
    std = expected["variance"].sqrt()
    assert float(std[0]) > 0.009
    torch.testing.assert_close(moments.std[0, 15, 20], std, rtol=0, atol=1e-4)


def test_ph03_cameras_harmonics_and_empty_images():
    scene = random_gaussians(30, seed=1, dtype=torch.float32)
    scene["colors"] = torch.randn(30, 9, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    far = scene["viewmats"].clone()
    far[0, 2, 3] = -50.0
    scene["viewmats"], scene["Ks"] = torch.cat([scene["viewmats"], far]), scene["Ks"].repeat(2, 1, 1)
    backgrounds = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    moments, info = rasterization_moments(
        **scene, sh_degree=2, width=37, height=29, dropout_ratio=0.1, backgrounds=backgrounds
    )
    assert moments.mean.shape == (2, 29, 37, 3)
    assert info["n_cameras"] == 2
    assert float(moments.std[0].max()) > 0
    assert torch.equal(moments.mean[1], backgrounds[1].expand(29, 37, 3))
    assert float(moments.std[1].max()) == 0.0


def test_bad_input_is_refused():
    scene = random_gaussians(5, dtype=torch.float32)
    size = {"width": 8, "height": 8}
    with pytest.raises(ValueError, match=r"dropout_ratio must lie in \[0, 1\)"):
        rasterization_moments(**scene, dropout_ratio=1.0, **size)
    with pytest.raises(ValueError, match=r"means has shape|quats has shape \[4, 4\], expected \[5, 4\]"):
        rasterization(**{**scene, "quats": scene["quats"][:4]}, **size)
    with pytest.raises(ValueError, match="opacities are missing; dropout acts on them"):
        rasterization_moments(**{**scene, "opacities": None}, dropout_ratio=0.1, **size)
    with pytest.raises(ValueError, match=r"opacities has shape \[5, 1\], expected \[5\]"):
        rasterization(**{**scene, "opacities": scene["opacities"][:, None]}, **size)
    with pytest.raises(ValueError, match="unknown option 'pakced'; did you mean 'packed'"):
        rasterization(**scene, **size, pakced=True)
    with pytest.raises(ValueError, match="camera_model='fisheye' needs gsplat's CUDA kernels"):
        rasterization(**scene, **size, camera_model="fisheye")
    with pytest.raises(ValueError, match="sh_degree=2 needs colors"):
        rasterization(**scene, **size, sh_degree=2)
    with pytest.raises(ValueError, match="render_mode must be one of"):
        rasterization(**scene, **size, render_mode="depth")
    with pytest.raises(ValueError, match="render_mode of rasterization_moments"):
        rasterization_moments(**scene, **size, dropout_ratio=0.1, render_mode="ED")
    with pytest.raises(ValueError, match=r"dropout_ratio must be a scalar, \[5\] or \[1, 5\], got \[3\]"):
        rasterization_moments(**scene, **size, dropout_ratio=torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="backend must be"):
        rasterization_moments(**scene, **size, dropout_ratio=0.1, backend="cuda")


def test_triton_without_a_device_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scene = random_gaussians(5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors, or TRITON_INTERPRET=1.*backend='torch'"):
        rasterization_moments(**scene, width=8, height=8, dropout_ratio=0.1, backend="triton")


def test_many_gaussians_on_the_torch_path_warn(monkeypatch):
    monkeypatch.setattr("nerfstudio_phdropout.rasterize._MANY_GAUSSIANS", 4)
    with pytest.warns(RuntimeWarning, match="5 Gaussians on the torch rasterizer are slow"):
        rasterization(**random_gaussians(5, dtype=torch.float32), width=8, height=8)


def test_rasterize_moments_takes_gsplats_arguments():
    scene = random_gaussians(20, dtype=torch.float32)
    moments, info = rasterization_moments(**scene, width=24, height=20, dropout_ratio=0.1)
    again = rasterize_moments(
        info["means2d"], info["conics"], scene["colors"][None], info["opacities"], 24, 20, 16,
        info["isect_offsets"], info["flatten_ids"], 0.1,
    )  # fmt: skip
    assert torch.equal(moments.variance, again.variance)


def test_gsplat_is_called_unpacked_unless_asked(monkeypatch):
    """Packed, gsplat 1.5.3 asserts on backgrounds of a camera batch; its kernels cannot run here."""
    gsplat = pytest.importorskip("gsplat")
    seen = []
    monkeypatch.setattr(gsplat, "rasterization", lambda **options: seen.append(options["packed"]))
    gsplat_backend.rasterization(means=None)
    gsplat_backend.rasterization(means=None, packed=True)
    assert seen == [False, True]

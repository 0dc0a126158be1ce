"""What needs a CUDA device: the compiled kernel against its twin and gsplat, and masks across devices."""

from __future__ import annotations

import pytest
import torch
from splat_scenes import random_gaussians

from nerfstudio_phdropout import drop_uniforms, rasterization_moments

pytestmark = pytest.mark.gpu


def gaussians(count: int) -> dict:
    scene = random_gaussians(count, seed=1, dtype=torch.float32)
    scene["Ks"][0, :2] *= 4
    return {name: tensor.cuda() for name, tensor in scene.items()} | {"width": 160, "height": 121}


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.05, "each"])
def test_ph02_compiled_kernel_equals_its_twin(ratio):
    scene = gaussians(2000)
    drop = torch.rand(2000, device="cuda") * 0.8 if ratio == "each" else ratio
    background = torch.tensor([[0.1, 0.5, 0.9]], device="cuda")
    options = {**scene, "dropout_ratio": drop, "render_mode": "RGB+D", "backgrounds": background}
    triton, _ = rasterization_moments(**options, backend="triton")
    twin, _ = rasterization_moments(**options, backend="torch")
    for field in ("mean", "accumulation"):
        torch.testing.assert_close(getattr(triton, field), getattr(twin, field), rtol=1e-4, atol=1e-5)
    for field in ("std", "accumulation_std"):
        torch.testing.assert_close(getattr(triton, field), getattr(twin, field), rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_ph02_ph03_zero_ratio_equals_gsplat(mode):
    gsplat = pytest.importorskip("gsplat")
    scene = gaussians(2000)
    image, alphas, _ = gsplat.rasterization(**scene, packed=False, rasterize_mode=mode)
    moments, _ = rasterization_moments(**scene, dropout_ratio=0.0, rasterize_mode=mode)
    torch.testing.assert_close(moments.mean, image, rtol=0, atol=1e-4)
    torch.testing.assert_close(moments.accumulation, alphas[..., 0], rtol=0, atol=1e-4)
    assert float(moments.variance.max()) == 0.0


def test_ph06_masks_are_bitwise_equal_across_devices():
    for start in (0, 2**32 - 100):
        here = drop_uniforms(1000, seed=1, trial=2, stream=3, start=start)
        assert torch.equal(
            here, drop_uniforms(1000, seed=1, trial=2, stream=3, start=start, device="cuda").cpu()
        )

"""SPE in the real nerfstudio: the command line on a generated scene, the models' parts in process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.nerfstudio
pytest.importorskip("nerfstudio", reason="needs nerfstudio")

from nerfstudio.cameras.rays import RayBundle  # noqa: E402
from nerfstudio.data.scene_box import SceneBox  # noqa: E402

from spe_layers import SPE, Bands, FrequencyAnnealing, positional_encoding  # noqa: E402
from spe_layers.integrations import nerf_parts  # noqa: E402
from spe_layers.integrations.nerfstudio import (  # noqa: E402
    CameraDataManager,
    SPEMipNerfModel,
    SPEncoding,
    SPENerfModel,
    SPENerfModelConfig,
)

SIZE, FOV = 32, 0.7


def look_at(angle: float) -> np.ndarray:
    """Camera to world of a camera 4 units away, looking at the origin along its -z."""
    position = 4 * np.array([math.cos(angle), math.sin(angle), 0.4])
    back = position / np.linalg.norm(position)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, position], 1)
    return pose


def render_sphere(pose: np.ndarray) -> np.ndarray:
    """RGBA picture of a unit sphere coloured by its normal."""
    focal = 0.5 * SIZE / math.tan(0.5 * FOV)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    local = np.stack([(x - SIZE / 2) / focal, -(y - SIZE / 2) / focal, -np.ones_like(x)], -1)
    rays = local @ pose[:3, :3].T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    along = -(rays @ pose[:3, 3])
    gap = along**2 - (pose[:3, 3] @ pose[:3, 3] - 1)
    normal = pose[:3, 3] + rays * (along - np.sqrt(np.maximum(gap, 0)))[..., None]
    picture = np.concatenate([0.5 + 0.5 * normal, np.ones((SIZE, SIZE, 1))], -1)
    return (np.where((gap > 0)[..., None], picture, 0) * 255).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A scene in the format of Blender's synthetic scenes."""
    import imageio.v2 as imageio

    root = tmp_path_factory.mktemp("scene")
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        frames = []
        for index in range(count):
            pose = look_at(2 * math.pi * index / count + (0.4 if split != "train" else 0.0))
            imageio.imwrite(root / f"{split}_{index}.png", render_sphere(pose))
            frames.append({"file_path": f"./{split}_{index}", "transform_matrix": pose.tolist()})
        (root / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": FOV, "frames": frames}))
    return root


def command(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spe-nerf", "spe-mipnerf", "spe-freenerf"])
def test_sp13_ns_train_and_ns_eval(method, scene, tmp_path):
    """Train for a few steps from the command line; ns-eval reads the checkpoint of spe-freenerf."""
    command(
        "nerfstudio.scripts.train", method, "--machine.device-type", "cpu", "--max-num-iterations", "4",
        "--output-dir", str(tmp_path), "--experiment-name", "scene", "--timestamp", "now",
        "--vis", "tensorboard",
        "--pipeline.model.num-coarse-samples", "8", "--pipeline.model.num-importance-samples", "8",
        "--pipeline.datamanager.train-num-rays-per-batch", "64", "--logging.profiler", "none",
        "--pipeline.datamanager.eval-num-rays-per-batch", "64",
        "--data", str(scene), cwd=tmp_path,
    )  # fmt: skip
    folder = tmp_path / "scene" / method / "now"
    assert list((folder / "nerfstudio_models").glob("*.ckpt"))
    if method == "spe-freenerf":
        command(
            "nerfstudio.scripts.eval", "--load-config", str(folder / "config.yml"),
            "--output-path", str(tmp_path / "eval.json"), cwd=tmp_path,
        )  # fmt: skip
        results = json.loads((tmp_path / "eval.json").read_text())["results"]
        assert 0 < results["psnr"] < 60
        assert "fine_lpips" not in results


def small(**options) -> SPENerfModelConfig:
    return SPENerfModelConfig(num_coarse_samples=6, num_importance_samples=5, **options)


def build(config: SPENerfModelConfig, kind: type = SPENerfModel):
    box = SceneBox(aabb=torch.tensor([[-1.5] * 3, [1.5] * 3]))
    return kind(replace(config, _target=kind), scene_box=box, num_train_data=1)


def rays(count: int = 7) -> RayBundle:
    directions = torch.nn.functional.normalize(torch.randn(count, 3), dim=-1)
    return RayBundle(
        origins=-3 * directions,
        directions=directions,
        pixel_area=torch.full((count, 1), 1e-3),
        nears=torch.full((count, 1), 2.0),
        fars=torch.full((count, 1), 5.0),
        camera_indices=torch.zeros(count, 1, dtype=torch.long),
    )


def test_sp13_coarse_and_fine_share_no_parameter():
    model = build(small())
    groups = model.get_param_groups()
    assert set(groups) == {"fields"}
    coarse = {id(p) for p in model.field_coarse.parameters()}
    assert not coarse & {id(p) for p in model.field_fine.parameters()}
    assert isinstance(model.field_coarse.trunk.first, SPE)
    model.field_fine = model.field_coarse
    with pytest.raises(ValueError, match="share parameters; the optimiser would step them twice"):
        model.get_param_groups()


def test_sp13_first_layer_has_the_parameters_of_the_linear_it_replaces():
    counts = {}
    for name in ("spe", "relu", "identity", "residual"):
        model = build(small(first_layer=name))
        counts[name] = sum(p.numel() for p in model.get_param_groups()["fields"])
    assert counts["spe"] == counts["relu"] == counts["identity"]
    assert counts["residual"] == counts["spe"] + 2 * (63 * 256 + 256)


def test_sp13_encoding_is_an_encoding_of_nerfstudio():
    from nerfstudio.fields.vanilla_nerf_field import NeRFField

    encoding = SPEncoding(3, 32, bands=4)
    assert encoding.get_out_dim() == 32
    x, covariance = torch.rand(5, 3), torch.eye(3).expand(5, 3, 3) * 1e-3
    torch.testing.assert_close(encoding(x, covs=covariance), encoding.layer(x, covariance=covariance))
    field = NeRFField(position_encoding=encoding, base_mlp_num_layers=2, base_mlp_layer_width=16)
    assert field.mlp_base.in_dim == 32


def test_sp13_skip_joins_the_raw_encoding():
    torch.manual_seed(0)
    bands = Bands.octaves(3)
    trunk = nerf_parts.Trunk(bands, width=8, layers=8, init="linear")
    x = torch.rand(5, 3)
    h = trunk.first(x)
    for index, layer in enumerate(trunk.hidden, start=1):
        if index == 5:
            h = torch.cat([positional_encoding(x, bands), h], -1)
        h = torch.relu(h @ layer.weight.T + layer.bias)
    torch.testing.assert_close(trunk(x), h)


@pytest.mark.parametrize(
    "options",
    [
        {"first_layer": "residual"},
        {"direction_first_layer": "spe"},
        {"all_sine": True},
        {"skip_input": "spe"},
        {"scale": math.pi, "decay": 1.0, "init": "calibrated"},
    ],
)
def test_sp19_variants_render_and_train(options):
    model = build(small(**options))
    outputs = model.get_outputs(rays())
    assert outputs["rgb_fine"].shape == (7, 3)
    loss = sum(model.get_loss_dict(outputs, {"image": torch.rand(7, 3)}).values())
    loss.backward()
    assert all(p.grad is not None for p in model.get_param_groups()["fields"])


def test_sp19_residual_and_all_sine_equal_their_formulas():
    torch.manual_seed(1)
    bands, x = Bands.octaves(2), torch.rand(4, 3)
    layer = nerf_parts.ResidualFirstLayer(6, bands)
    w1, w2 = layer.encoded.linear, layer.sine
    expected = torch.relu(positional_encoding(x, bands) @ w1.weight.T + w1.bias)
    expected = expected + torch.sin(x.repeat(1, 5) @ w2.weight.T + w2.bias)
    torch.testing.assert_close(layer(x), expected)
    trunk = nerf_parts.Trunk(bands, width=6, layers=3, all_sine=True)
    h = trunk.first(x)
    for linear in trunk.hidden:
        h = torch.sin(linear(h))
    torch.testing.assert_close(trunk(x), h)


@pytest.mark.parametrize("kind", ["gan", "wgan"])
def test_sp19_critic_and_field_train_only_themselves(kind):
    model = build(small(adversarial_loss=kind))
    assert set(model.get_param_groups()) == {"fields", "critic"}
    losses = model.get_loss_dict(model.get_outputs(rays()), {"image": torch.rand(7, 3)})
    fields, critic = (model.get_param_groups()[k] for k in ("fields", "critic"))
    of_critic = torch.autograd.grad(
        losses["critic_loss"], fields + critic, retain_graph=True, allow_unused=True
    )
    assert all(g is None for g in of_critic[: len(fields)])
    assert all(g is not None for g in of_critic[len(fields) :])
    of_field = torch.autograd.grad(losses["adversarial_loss"], fields + critic, allow_unused=True)
    assert any(g is not None for g in of_field[: len(fields)])
    assert all(g is None for g in of_field[len(fields) :])


def test_sp15_annealing_follows_the_trainer_and_the_checkpoint():
    model = build(small(annealing_steps=10, num_bands=4))
    (callback,) = model.get_training_callbacks(None)
    schedule = FrequencyAnnealing(4, 10)
    for step in range(13):
        callback.run_callback_at_location(step, callback.where_to_run[0])
        for field in (model.field_coarse, model.field_fine):
            if step > 10:
                assert field.mask is None
            else:
                torch.testing.assert_close(field.mask, schedule.mask(step).float())
    model.update_to_step(3)
    torch.testing.assert_close(model.field_fine.mask, schedule.mask(3).float())


def test_sp15_occlusion_loss_is_the_mean_density_of_near_samples():
    density = torch.rand(5, 30, 1)
    distances = torch.linspace(2, 6, 30)[None, :, None].expand(5, 30, 1)
    by_index = nerf_parts.occlusion_loss(density, distances, samples=20, distance=None)
    assert by_index.item() == pytest.approx(density[:, :20].sum().item() / 150)
    by_distance = nerf_parts.occlusion_loss(density, distances, samples=20, distance=3.0)
    assert by_distance.item() == pytest.approx(density[distances < 3].sum().item() / 150)
    model = build(small(occlusion_loss_mult=0.01, occlusion_samples=4))
    outputs = model.get_outputs(rays())
    density, _ = model.field_fine.recorded
    losses = model.get_loss_dict(outputs, {"image": torch.rand(7, 3)})
    expected = 0.01 * density[:, :4].sum() / density.numel()
    torch.testing.assert_close(losses["occlusion_loss"], expected)
    model.eval()
    assert "occlusion_loss" not in model.get_loss_dict(model.get_outputs(rays()), {"image": torch.rand(7, 3)})


@pytest.mark.parametrize("variance", ["exact", "nerfstudio"])
def test_sp14_mipnerf_damps_by_the_chosen_variance(variance):
    model = build(small(integrated_variance=variance, scale=2 * math.pi, num_bands=3), SPEMipNerfModel)
    model.get_outputs(rays())
    covariance = torch.eye(3) * 1e-2
    divisor = 1.0 if variance == "exact" else (2 * math.pi) ** 2
    torch.testing.assert_close(model.field._covariance(covariance), covariance / divisor)


@pytest.mark.parametrize(("pixel_size", "scale"), [(0.0247, 1.0), (0.002, 1.0), (0.002, math.pi), (7.0, 1.0)])
def test_sp25_highest_octave_is_the_last_below_the_pixels_nyquist(pixel_size, scale):
    count = nerf_parts.nyquist_octaves(pixel_size, scale)
    frequency = Bands.octaves(count, scale=scale).max_frequency
    if count > 1:
        assert frequency <= 1 / (2 * pixel_size) < 2 * frequency
    else:
        assert 2 * frequency > 1 / (2 * pixel_size)


def test_sp25_model_takes_bands_from_the_cameras_of_its_data_manager(scene):
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig

    manager = VanillaDataManagerConfig(
        _target=CameraDataManager, dataparser=BlenderDataParserConfig(data=scene)
    ).setup(device="cpu")
    dataset = manager.train_dataset
    config = small(bands="nyquist", annealing_steps=10)
    model = SPENerfModel(
        config, scene_box=dataset.scene_box, num_train_data=len(dataset), metadata=dataset.metadata
    )
    focal = 0.5 * SIZE / math.tan(0.5 * FOV)
    expected = nerf_parts.nyquist_octaves(2.0 / focal, 1.0)
    assert expected != config.num_bands
    assert model.field_fine.trunk.encoding.bands == Bands.octaves(expected)
    assert model.annealing.bands == Bands.octaves(expected)
    with pytest.raises(ValueError, match="needs the training cameras"):
        build(config)
    with pytest.raises(ValueError, match="positive near_plane"):
        SPENerfModel(
            small(bands="nyquist", collider_params={"near_plane": 0.0, "far_plane": 6.0}),
            scene_box=dataset.scene_box, num_train_data=len(dataset), metadata=dataset.metadata,
        )  # fmt: skip


def test_missing_nerfstudio_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['nerfstudio'] = None\n"
        "try:\n    import spe_layers.integrations.nerfstudio\n"
        "except ImportError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'spe-nerf needs nerfstudio: pip install "graft-plugins[nerfstudio]"' in done.stdout

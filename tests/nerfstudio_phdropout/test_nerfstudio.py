"""PH-Dropout inside the real nerfstudio, on a CPU: train, evaluate, render, attach to plain runs."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("nerfstudio")
pytestmark = [pytest.mark.nerfstudio, pytest.mark.slow]

STEPS = {"phd-nerfacto-tiny": 40, "phd-splatfacto-tiny": 120, "phd-vanilla-nerf-tiny": 4}
METRICS = ("spearman", "pearson", "ause", "ause_reference", "nll", "ece", "auce", "coverage95", "sharpness")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A scene, and LPIPS weights that need no network (random: lpips then means nothing)."""
    import torchvision

    from nerfstudio_phdropout.synthetic import write_scene

    folder = tmp_path_factory.mktemp("phd")
    weights = folder / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    weights.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), weights)
    write_scene(folder / "half", num_train=9, num_eval=3, resolution=32, train_azimuth=(0, 180))
    patch = pytest.MonkeyPatch()
    patch.setenv("TORCH_HOME", str(folder / "torch"))
    patch.chdir(folder)
    yield folder
    patch.undo()


def train(method: str, *, timestamp: str, config: Any = None, steps: int | None = None) -> Path:
    """Train by nerfstudio's own train command, in this process; returns config.yml."""
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts import train as command

    config = copy.deepcopy(config or all_methods[method])
    config.data, config.output_dir, config.timestamp = Path("half"), Path("outputs"), timestamp
    config.experiment_name = "half"
    config.max_num_iterations = steps or STEPS[method]
    config.machine.seed = 1
    if hasattr(config.pipeline.model, "phdropout"):
        config.pipeline.model.phdropout.search_views = 2
        config.pipeline.model.phdropout.num_trials = 3
    command.main(config)
    return config.get_base_dir() / "config.yml"


def evaluate(config: Path) -> dict[str, float]:
    """ns-eval's results."""
    from nerfstudio.scripts.eval import ComputePSNR

    output = config.parent / "eval.json"
    ComputePSNR(load_config=config, output_path=output).main()
    return json.loads(output.read_text())["results"]


def load(config: Path) -> Any:
    """The pipeline as ns-* commands load it."""
    from nerfstudio.utils.eval_utils import eval_setup

    return eval_setup(config, test_mode="test")[1]


def first_outputs(pipeline: Any) -> dict[str, torch.Tensor]:
    return pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[:1])


@pytest.fixture(scope="module")
def runs(workspace):
    """One trained run a method, made when first asked for."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = train(method, timestamp="run")
        return made[method]

    return run


@pytest.mark.parametrize("method", list(STEPS))
def test_ph09_trains_searches_and_evaluates_on_a_cpu(runs, method):
    config = runs(method)
    sidecar = next((config.parent / "nerfstudio_models").glob("*.phdropout.json"))
    found = json.loads(sidecar.read_text())
    assert 0 <= found["ratio"] < 1
    assert len(found["evaluations"]) <= 8
    state = torch.load(sidecar.with_name(found["checkpoint"]), weights_only=True)
    assert not [name for name in state["pipeline"] if "dropout" in name or "ratio" in name]
    results = evaluate(config)
    for name in METRICS:
        assert name in results
        assert f"foreground_{name}" in results
    assert results["dropout_ratio"] == pytest.approx(found["ratio"])
    assert results["psnr"] > 0


@pytest.mark.parametrize("method", ["phd-nerfacto-tiny", "phd-splatfacto-tiny"])
def test_ph09_renders_uncertainty_by_ns_render(runs, method):
    from nerfstudio.scripts.render import DatasetRender

    config = runs(method)
    target = config.parent / "renders"
    DatasetRender(
        load_config=config, output_path=target, split="test", rendered_output_names=["rgb", "uncertainty"]
    ).main()
    for name in ("rgb", "uncertainty"):
        assert len(list((target / "test" / name).glob("*"))) == 3


def test_ph09_outputs_for_the_viewer_are_images(runs):
    for method in ("phd-nerfacto-tiny", "phd-splatfacto-tiny"):
        outputs = first_outputs(load(runs(method)))
        assert outputs["rgb_mean"].shape == outputs["rgb_std"].shape == (32, 32, 3)
        for name in ("uncertainty", "accumulation_std", "depth_std"):
            assert outputs[name].shape == (32, 32, 1)
            assert bool(torch.isfinite(outputs[name]).all())
        torch.testing.assert_close(outputs["uncertainty"], outputs["rgb_std"].mean(-1, keepdim=True))
        assert float(outputs["uncertainty"].max()) > 0
    holes, transparent = outputs["uncertainty_with_holes"], 1 - outputs["accumulation"]
    assert holes.shape == (32, 32, 1)
    assert bool((holes >= outputs["uncertainty"] - 1e-6).all())
    assert bool((holes[transparent > 0.999] > 0.28).all())


def test_ph08_a_ratio_of_0_that_a_search_has_left_warns_wherever_it_is_used(tmp_path):
    from nerfstudio_phdropout import PHDropoutConfig
    from nerfstudio_phdropout.nerfstudio_models import PHDropoutMixin
    from nerfstudio_phdropout.sidecar import write_sidecar

    checkpoint = tmp_path / "step-000000007.ckpt"
    checkpoint.write_bytes(b"weights")
    model = PHDropoutMixin()
    sidecar = write_sidecar(checkpoint, PHDropoutConfig(), 0.0)
    model.config = SimpleNamespace(phdropout=PHDropoutConfig(sidecar=str(sidecar)))
    with pytest.warns(RuntimeWarning, match="sigma is 0 everywhere; give ns-phdropout a --ratio"):
        assert model.dropout_ratio() == 0


def training_psnr(config: Path) -> float:
    """Mean PSNR of three training views."""
    pipeline = load(config)
    dataset, model = pipeline.datamanager.train_dataset, pipeline.model
    total = 0.0
    for i in (0, 3, 6):
        target = model.ground_truth(dataset.get_data(i)["image"])
        error = (model.plain_rgb(dataset.cameras[i : i + 1]) - target) ** 2
        total += -10 * math.log10(float(error.mean())) / 3
    return total


def test_ph04_splatfacto_learns_on_a_cpu(workspace):
    """From random Gaussians; densification runs too."""
    from nerfstudio.configs.method_configs import all_methods

    config = copy.deepcopy(all_methods["phd-splatfacto-tiny"])
    model = config.pipeline.model
    model.random_init, model.num_random, model.random_scale, model.warmup_length = True, 800, 2.5, 60
    model.refine_every = 50
    start = train("phd-splatfacto-tiny", timestamp="random1", config=config, steps=1)
    end = train("phd-splatfacto-tiny", timestamp="random2", config=config, steps=150)
    assert training_psnr(end) - training_psnr(start) >= 5
    assert load(end).model.num_points != 800


def test_ph09_cpu_rendering_of_splats_equals_splatfactos_own(runs, monkeypatch):
    """splatfacto's method itself, with ``.cuda()`` made harmless and gsplat's function replaced by ours."""
    from nerfstudio.models import splatfacto

    from nerfstudio_phdropout import rasterization

    pipeline = load(runs("phd-splatfacto-tiny"))
    ours = first_outputs(pipeline)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(
        splatfacto, "rasterization", lambda **options: rasterization(**{**options, "absgrad": False})
    )
    monkeypatch.setattr(splatfacto, "get_viewmat", splatfacto.get_viewmat.__wrapped__, raising=False)
    camera = pipeline.datamanager.eval_dataset.cameras[:1]
    with torch.no_grad():
        theirs = splatfacto.SplatfactoModel.get_outputs(pipeline.model, camera)
    for name in ("rgb", "depth", "accumulation", "background"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)


def test_ph13_expected_psnr_search_agrees_with_many_trials(runs):
    """No random numbers; the same ratio, within one step, as the mean squared error of 300 masks gives."""
    pipeline = load(runs("phd-splatfacto-tiny"))
    model, dataset = pipeline.model, pipeline.datamanager.train_dataset
    model.config.phdropout.quality, model.config.phdropout.search_views = "expected_psnr", 2
    first, second = model.search_ratio(dataset), model.search_ratio(dataset)
    assert first == second
    cameras = [dataset.cameras[i : i + 1] for i in (0, len(dataset) // 2)]
    targets = [model.ground_truth(dataset.get_data(i)["image"]) for i in (0, len(dataset) // 2)]

    def sampled(ratio: float) -> float:
        total = 0.0
        for camera, target in zip(cameras, targets, strict=True):
            images = [model.masked_rgb(camera, ratio, trial) for trial in range(150)]
            error = torch.stack([(image - target) ** 2 for image in images]).mean()
            total += -10 * math.log10(float(error)) / 2
        return total

    threshold = 0.95 * sampled(0.0)
    assert sampled(max(first.ratio - 0.01, 0.0)) > threshold
    assert sampled(first.ratio + 0.02) < threshold


def test_ph15_shared_trunk_gives_the_images_of_full_renders(runs):
    for method in ("phd-nerfacto-tiny", "phd-vanilla-nerf-tiny"):
        pipeline = load(runs(method))
        model = pipeline.model
        camera = pipeline.datamanager.eval_dataset.cameras[:1]
        model.config.phdropout.num_trials, model.config.phdropout.layers = 4, "hidden"
        shared = model.moments_for_camera(camera, 0.3)
        images = torch.stack([model.masked_rgb(camera, 0.3, trial) for trial in range(4)])
        torch.testing.assert_close(shared.mean, images.mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(shared.std, images.std(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", ["features", "table"])
def test_ph15_trials_in_the_hash_encoding_give_the_images_of_full_renders(runs, layers):
    pipeline = load(runs("phd-nerfacto-tiny"))
    model = pipeline.model
    camera = pipeline.datamanager.eval_dataset.cameras[:1]
    settings = model.config.phdropout
    settings.layers, settings.num_trials = layers, 3
    before = model.plain_rgb(camera)
    shared = model.moments_for_camera(camera, 0.2)
    images = torch.stack([model.masked_rgb(camera, 0.2, trial) for trial in range(3)])
    assert float(shared.std.max()) > 0
    torch.testing.assert_close(shared.mean, images.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(shared.std, images.std(0), rtol=0, atol=1e-5)
    assert torch.equal(model.plain_rgb(camera), before)
    vanilla = load(runs("phd-vanilla-nerf-tiny")).model
    vanilla.config.phdropout.layers = layers
    with pytest.raises(ValueError, match="no hash encoding in PHDropoutVanillaModel; use layers='hidden'"):
        vanilla.masked_rgb(camera, 0.1, 0)


def test_ph15_shared_lookups_read_what_the_encoding_reads(runs):
    from nerfstudio_phdropout.nerfstudio_hashing import shared_lookup

    encoding = load(runs("phd-nerfacto-tiny")).model.field.mlp_base.model[0]
    torch.manual_seed(0)
    points = torch.rand(500, 3)
    points[:3] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0, 1]])
    with torch.no_grad():
        plain = encoding(points)
        with shared_lookup(encoding):
            torch.testing.assert_close(encoding(points), plain, rtol=1e-5, atol=1e-7)
            encoding.hash_table.data.mul_(2)
            torch.testing.assert_close(encoding(points), 2 * plain, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(encoding(points), 2 * plain)


def test_ph20_probes_of_nerfacto_are_its_derivatives(runs):
    """Along a change of the hash table and of sample points, against finite differences in float64."""
    from nerfstudio_phdropout.nerfstudio_baselines import NerfactoProbe, training_rays

    pipeline = load(runs("phd-nerfacto-tiny"))
    model = pipeline.model.double()
    rays = next(training_rays(pipeline.datamanager.train_dataset.cameras, 40, 40, seed=1))
    for name in ("origins", "directions", "pixel_area"):
        setattr(rays, name, getattr(rays, name).double())
    probe = NerfactoProbe(model)
    table, samples = probe.table, probe._samples(rays)
    probe._samples = lambda _rays: samples  # proposals would follow changes of nothing here; keep one set
    torch.manual_seed(0)
    direction = torch.randn_like(table)
    change = next(probe.along(rays, [direction]))
    step, whole = 1e-5, table.data

    def color(amount: float) -> torch.Tensor:
        table.data = whole + amount * direction
        with torch.no_grad():
            found = probe._field(samples)[0]
        table.data = whole
        return found

    expected = (color(step) - color(-step)) / (2 * step)
    # Colours clipped to [0, 1] do not move.
    inside = (color(0.0) > 0) & (color(0.0) < 1)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(change[inside], expected[inside], rtol=1e-4, atol=1e-6)
    signs = torch.ones(len(rays), 3, dtype=torch.float64)
    gradient = torch.autograd.grad(probe._field(samples)[0].sum(), table)[0]
    torch.testing.assert_close(probe.table_square(rays, signs), gradient.square())
    points, gradients = probe.by_position(rays)
    outside = ((points < 0) | (points > 1)).any(-1)
    assert not bool(gradients[:, outside].any())
    moved = torch.randn_like(gradients[0]) * 1e-7
    with torch.no_grad():
        samples.frustums.set_offsets(moved)
        ahead = probe._field(samples)[0]
        samples.frustums.set_offsets(-moved)
        behind = probe._field(samples)[0]
    torch.testing.assert_close(
        (gradients * moved).sum((-1, -2)).T[inside], ((ahead - behind) / 2)[inside], rtol=2e-2, atol=1e-9
    )


def test_ph20_laplace_and_fisher_maps_of_a_run(runs):
    from nerfstudio_phdropout.nerfstudio_baselines import (
        fisher_map,
        fisher_table,
        laplace_grid,
        laplace_map,
        training_rays,
    )

    pipeline = load(runs("phd-nerfacto-tiny"))
    model, cameras = pipeline.model, pipeline.datamanager.train_dataset.cameras
    grid = laplace_grid(model, training_rays(cameras, 600, 200), resolution=16)
    information = fisher_table(model, training_rays(cameras, 600, 200))
    assert grid.rays == 600
    assert float(grid.information.max()) > 0
    assert information.shape == model.field.mlp_base.model[0].hash_table.shape
    rays = next(training_rays(cameras, 50, 50, seed=3))
    spread, variance = laplace_map(model, rays, grid), fisher_map(model, rays, information, probes=4)
    assert spread.shape == (50,)
    assert variance.shape == (50, 3)
    assert bool(torch.isfinite(spread).all())
    assert bool((variance >= 0).all())
    less = fisher_map(model, rays, information * 100, probes=4, prior=1e-4)
    assert float(less.mean()) < float(variance.mean())
    with pytest.raises(ValueError, match="has no hash table in torch"):
        laplace_grid(load(runs("phd-vanilla-nerf-tiny")).model, [])


def test_instant_ngp_has_a_form_whose_field_is_masked(workspace):
    """Its sampler needs CUDA; the field, where dropout happens, does not."""
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.data.scene_box import SceneBox

    from nerfstudio_phdropout import PHDropoutConfig
    from nerfstudio_phdropout.nerfstudio_attach import twin_config

    twin = twin_config(all_methods["instant-ngp"], PHDropoutConfig(ratio=0.3))
    assert twin.method_name == "phd-instant-ngp"
    assert all_methods["phd-instant-ngp"].pipeline.model.phdropout is not None
    twin.pipeline.model.log2_hashmap_size = 10
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1.0, 1, 1]]))
    model = twin.pipeline.model.setup(scene_box=box, num_train_data=3, metadata={})
    rays = SimpleNamespace(origins=torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="by nerfacc's CUDA kernels; use phd-nerfacto on a CPU"):
        model.get_outputs(rays)
    points = torch.rand(64, 3) - 0.5
    plain = model.field.density_fn(points)
    for layers in ("hidden", "features", "table"):
        model.config.phdropout.layers = layers
        with model._trial(0.3, 0):
            assert not torch.equal(model.field.density_fn(points), plain)
        assert torch.equal(model.field.density_fn(points), plain)


def test_reference_mode_masks_samples_and_rounds_to_8_bits(runs):
    from nerfstudio_phdropout import PHDropoutConfig

    pipeline = load(runs("phd-nerfacto-tiny"))
    settings = PHDropoutConfig.reference("nerf")
    settings.ratio, settings.num_trials = 0.1, 3
    pipeline.model.config.phdropout = settings
    outputs = first_outputs(pipeline)
    trials = outputs["rgb_mean"] * 3 * 255
    torch.testing.assert_close(trials, trials.round(), rtol=0, atol=2e-2)
    pipeline = load(runs("phd-splatfacto-tiny"))
    settings = PHDropoutConfig.reference("splat")
    settings.ratio, settings.num_trials = 0.1, 3
    pipeline.model.config.phdropout = settings
    assert float(first_outputs(pipeline)["uncertainty"].max()) > 0


def plain_nerfacto() -> Any:
    """nerfacto itself at the size of the tiny method, with the schedulers of its configuration."""
    import dataclasses

    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManagerConfig
    from nerfstudio.models.nerfacto import NerfactoModelConfig

    config = copy.deepcopy(all_methods["phd-nerfacto-tiny"])
    tiny = config.pipeline.model
    values = {
        f.name: getattr(tiny, f.name) for f in dataclasses.fields(NerfactoModelConfig) if f.name != "_target"
    }
    config.pipeline.model = NerfactoModelConfig(**values)
    config.pipeline.datamanager = ParallelDataManagerConfig(
        dataparser=config.pipeline.datamanager.dataparser, train_num_rays_per_batch=256
    )
    config.method_name = "nerfacto"
    return config


def test_ph10_attaches_to_a_plain_nerfacto_run_with_schedulers(workspace, capsys):
    from nerfstudio_phdropout.nerfstudio_attach import attach

    plain = train("nerfacto", timestamp="plain", config=plain_nerfacto(), steps=20)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        attach(plain.with_name("other.yml"))
    config = attach(plain, margin=0.1)
    assert config == Path("outputs/half/phd-nerfacto/plain/config.yml")
    checkpoint = next((config.parent / "nerfstudio_models").glob("*.ckpt"))
    assert set(torch.load(checkpoint, weights_only=True)) == {"step", "pipeline"}
    before, after = first_outputs(load(plain)), first_outputs(load(config))
    for name in ("rgb", "depth", "accumulation"):
        assert torch.equal(before[name], after[name])
    assert "uncertainty" in after
    with pytest.raises(FileExistsError, match="choose another --output-dir"):
        attach(plain)
    again = attach(plain, ratio=0.2, output_dir=Path("elsewhere"))
    assert json.loads(next((again.parent / "nerfstudio_models").glob("*.json")).read_text())["ratio"] == 0.2


def test_ph10_attaches_to_a_plain_splatfacto_run(runs):
    """A plain run has splatfacto's own configuration; its checkpoint is the same as ours."""
    import dataclasses
    import shutil

    import yaml
    from nerfstudio.models.splatfacto import SplatfactoModelConfig

    from nerfstudio_phdropout.nerfstudio_attach import attach

    config = yaml.load(runs("phd-splatfacto-tiny").read_text(), Loader=yaml.Loader)
    source = config.get_checkpoint_dir()
    model = config.pipeline.model
    values = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(SplatfactoModelConfig)
        if f.name != "_target"
    }
    config.pipeline.model, config.method_name, config.timestamp = (
        SplatfactoModelConfig(**values),
        "splatfacto",
        "plain",
    )
    config.get_checkpoint_dir().mkdir(parents=True)
    shutil.copy(next(source.glob("*.ckpt")), config.get_checkpoint_dir())
    config.save_config()
    attached = attach(config.get_base_dir() / "config.yml")
    assert "phd-splatfacto/plain" in str(attached)
    ours, theirs = first_outputs(load(attached)), first_outputs(load(runs("phd-splatfacto-tiny")))
    assert torch.equal(ours["rgb"], theirs["rgb"])
    assert float(ours["uncertainty"].max()) > 0


def test_methods_without_a_twin_are_refused(workspace):
    from nerfstudio.configs.method_configs import all_methods

    from nerfstudio_phdropout import PHDropoutConfig
    from nerfstudio_phdropout.nerfstudio_attach import twin_config

    with pytest.raises(
        ValueError, match="supported methods: nerfacto, splatfacto, instant-ngp, vanilla-nerf"
    ):
        twin_config(all_methods["tensorf"], PHDropoutConfig())


def test_rendering_without_a_ratio_and_exact_on_nerf_are_refused(runs):
    pipeline = load(runs("phd-nerfacto-tiny"))
    pipeline.model.config.phdropout.sidecar = None
    pipeline.model._ratio = None
    with pytest.raises(RuntimeError, match="no dropout ratio beside this checkpoint; run ns-phdropout first"):
        first_outputs(pipeline)
    pipeline.model.config.phdropout.estimator = "exact"
    with pytest.raises(ValueError, match="exact moments exist for Gaussian splatting only"):
        pipeline.model.populate_modules()


def test_splats_that_nobody_sees_are_refused_not_certain(runs):
    pipeline = load(runs("phd-splatfacto-tiny"))
    with torch.no_grad():
        pipeline.model.opacities.fill_(-9.0)
    with pytest.raises(ValueError, match="has an opacity of 1/255 or more, so dropout moves nothing"):
        first_outputs(pipeline)
    with pytest.raises(ValueError, match="sigma would be 0; train the model first"):
        pipeline.model.search_ratio(pipeline.datamanager.train_dataset)


def test_entry_points_load_in_a_fresh_process():
    code = (
        "from importlib.metadata import entry_points as e;"
        "n=[p.load() for g in ('nerfstudio.method_configs','nerfstudio.dataparser_configs')"
        " for p in e(group=g) if p.name.startswith('phd-')];"
        "assert len(n)==8, n;"
        "import numpy, torch, io; b=io.BytesIO();"
        "torch.save({'lr': numpy.float64(0.1)}, b); b.seek(0);"
        "assert torch.load(b, weights_only=True)['lr']==0.1"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]


def test_ph09_the_command_line_names_every_method():
    command = Path(sys.executable).with_name("ns-phdropout")
    child = subprocess.run(
        [command, "--load-config", "missing.yml"], capture_output=True, text=True, check=False
    )
    assert child.returncode == 1
    assert "ns-phdropout: missing.yml does not exist" in child.stderr

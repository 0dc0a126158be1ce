"""First layers by name, surgery, spectrum report, tiny-cuda-nn configurations (SP-12, 17, 18, 20)."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from spe_layers import (
    FIRST_LAYERS,
    SPE,
    Bands,
    PositionalEncoding,
    build_first_layer,
    effective_frequencies,
    from_tcnn_config,
    insert_spe,
    positional_encoding,
    spectrum_report,
    swap_first_layer,
)
from spe_layers.baselines import HashGrid
from spe_layers.signals import power_law_signal


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", sorted(FIRST_LAYERS))
def test_sp12_each_first_layer_maps_and_trains(name):
    layer = build_first_layer(name, 2, 24, 4)
    y = layer(torch.rand(3, 5, 2))
    assert y.shape == (3, 5, 24)
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert FIRST_LAYERS[name].__doc__


def test_sp12_controls_have_the_parameters_of_spe():
    size = parameters(build_first_layer("spe", 3, 64, 6))
    for name in ("relu", "identity", "relu_he", "tiled"):
        assert parameters(build_first_layer(name, 3, 64, 6)) == size
    assert parameters(build_first_layer("rff", 3, 64, 6)) == pytest.approx(size, rel=0.03)


def test_sp12_peers_equal_their_formulas():
    torch.manual_seed(0)
    x = torch.rand(6, 2)
    siren = build_first_layer("siren", 2, 8, omega_0=10.0)
    w = siren[0]
    assert w.weight.abs().max() <= 0.5
    torch.testing.assert_close(siren(x), torch.sin(10 * (x @ w.weight.T + w.bias)))
    finer = build_first_layer("finer", 2, 8)
    z = x @ finer[0].weight.T + finer[0].bias
    torch.testing.assert_close(finer(x), torch.sin(30 * (z.abs() + 1) * z))
    rff = build_first_layer("rff", 2, 4000, 200, sigma=3.0)
    assert rff[0].matrix.std().item() == pytest.approx(2 * math.pi * 3, rel=0.05)
    assert "0.matrix" not in dict(rff.named_parameters())
    he = build_first_layer("relu_he", 3, 4000, 8)
    assert he[1].weight.var().item() == pytest.approx(2 / 51, rel=0.03)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_sp12_hash_grid_interpolates_its_corners(dims):
    torch.manual_seed(dims)
    grid = HashGrid(dims, levels=3, features=2, log2_size=6, coarsest=2, finest=8)
    assert grid.cells == [2, 4, 8]
    with torch.no_grad():
        grid.tables.uniform_(-1, 1)
    # On a corner of the finest grid that level is one row of its table: the hash, computed by hand.
    corner = torch.randint(0, 9, (20, dims))
    found = grid(corner / 8 * 2.0 - 1)
    primes = [1, 2654435761, 805459861]
    for row, point in zip(found, corner.tolist(), strict=True):
        index = 0
        for c, p in zip(point, primes, strict=False):
            index ^= c * p
        torch.testing.assert_close(row[4:], grid.tables[2, index % 64], atol=1e-5, rtol=0)
    # Linear between two corners of one cell of the finest grid (the others' cells hold several of them).
    a, b = corner[:1] / 8 * 2.0 - 1, None
    a = a.clamp(max=1 - 2 / 8)
    b = a + 2 / 8 * torch.eye(dims)[:1]
    middle = (grid(a) + grid(b)) / 2
    torch.testing.assert_close(grid((a + b) / 2)[:, 4:], middle[:, 4:], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at most 7 coordinates"):
        HashGrid(8, levels=1, features=1, log2_size=4, coarsest=2, finest=2)


def test_sp12_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown first layer 'sirn'.*did you mean 'siren'"):
        build_first_layer("sirn", 2, 8)
    with pytest.raises(TypeError, match="'relu' has no option 'sigma'"):
        build_first_layer("relu", 2, 8, sigma=1.0)


def test_sp17_insert_spe_before_a_linear():
    model = nn.ModuleDict({"head": nn.Sequential(nn.ReLU(), nn.Linear(6, 3, dtype=torch.float64))})
    before = parameters(model)
    old = model["head"][1]
    layer = insert_spe(model, "head.1", bands=2, init="lecun")
    assert parameters(model) == before + 6 * (6 * 5 + 1)
    assert layer.weight.dtype == torch.float64
    h = torch.rand(4, 6, dtype=torch.float64)
    torch.testing.assert_close(model["head"][1](h), old(layer(h)))
    with pytest.raises(AttributeError, match=r"no module 'head\.7'"):
        insert_spe(model, "head.7")
    with pytest.raises(TypeError, match=r"needs an nn\.Linear at 'head\.0', found ReLU"):
        insert_spe(model, "head.0")


def test_sp17_swap_first_layer_keeps_the_parameter_count():
    bands = Bands.octaves(4)
    mlp = nn.Sequential(PositionalEncoding(3, bands), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 1))
    before = parameters(mlp)
    layer = swap_first_layer(mlp, 3, bands)
    assert isinstance(mlp[0], SPE)
    assert mlp[0] is layer
    assert [type(m).__name__ for m in mlp] == ["SPE", "Linear"]
    assert parameters(mlp) == before
    assert mlp(torch.rand(5, 3)).shape == (5, 1)
    raw = nn.Sequential(nn.Linear(3, 16, bias=False), nn.Tanh(), nn.Linear(16, 1))
    assert swap_first_layer(raw, 3, bands).bias is None
    with pytest.raises(ValueError, match=r"has 9 inputs; expected 3 \(raw coordinates\) or 27"):
        swap_first_layer(nn.Sequential(nn.Linear(9, 4), nn.ReLU()), 3, bands)
    with pytest.raises(ValueError, match="expects an activation"):
        swap_first_layer(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), 3, bands)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        swap_first_layer(nn.Sequential(nn.ReLU()), 3, bands)


@pytest.mark.parametrize(
    "bands",
    [
        Bands.octaves(3),
        Bands.octaves(4, scale=math.pi, decay=1.0, layout="tcnn"),
        Bands.harmonics(3, power=1.0),
    ],
)
def test_sp18_effective_frequencies_equal_autograd(bands):
    layer = SPE(2, 7, bands, dtype=torch.float64)
    x = torch.rand(5, 2, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(layer.phase))(x)
    torch.testing.assert_close(effective_frequencies(layer, x), jacobian.norm(dim=-1), atol=1e-9, rtol=1e-9)


def test_sp18_report_counts_what_lies_above_nyquist():
    layer = SPE(1, 2, Bands.octaves(0), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0], [50.0]]))
    x = torch.rand(10, 1)
    report = spectrum_report(layer, x, spacing=0.1, bins=4)
    assert report.share_above_nyquist == 0.5
    assert sum(report.counts) == pytest.approx(1.0)
    assert report.counts[0] == report.counts[-1] == 0.5
    assert report.quantiles[0.5] == pytest.approx(50.0)
    assert "above Nyquist" in str(report)
    assert spectrum_report(layer, x).share_above_nyquist is None
    with pytest.raises(ValueError, match="at least one point"):
        spectrum_report(layer, x[:0])
    with pytest.raises(ValueError, match="must be positive"):
        spectrum_report(layer, x, spacing=0.0)


def test_sp20_configurations():
    layer = from_tcnn_config(
        {"otype": "SinusoidalPositional", "n_frequencies": 4, "n_output_dims": 8, "init": "uniform"}, 3
    )
    assert isinstance(layer, SPE)
    assert (layer.in_features, layer.out_features, layer.bands.num_bands) == (3, 8, 4)
    frequency = from_tcnn_config({"otype": "frequency", "n_frequencies": 3}, 2)
    x = torch.rand(5, 5)
    expected = positional_encoding(
        x[:, :2], Bands.octaves(3, scale=math.pi, include_input=False, layout="tcnn")
    )
    torch.testing.assert_close(frequency(x[:, :2]), expected)
    both = from_tcnn_config(
        {
            "otype": "Composite",
            "nested": [
                {"n_dims_to_encode": 2, "otype": "Frequency", "n_frequencies": 3},
                {"otype": "SinusoidalPositional", "n_output_dims": 7},
            ],
        },
        5,
    )
    found = both(x)
    assert found.shape == (5, 12 + 7)
    torch.testing.assert_close(found[:, :12], expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"otype": "HashGrid"},
            "unknown otype 'HashGrid', known: Frequency, SinusoidalPositional, Composite",
        ),
        ({"otype": "Frequency", "n_frequency": 3}, "no key 'n_frequency'.*did you mean 'n_frequencies'"),
        ({"otype": "Composite", "nested": []}, "at least one entry"),
        (
            {"otype": "Composite", "nested": [{"otype": "Frequency", "n_dims_to_encode": 9}]},
            "takes 9 of the 3",
        ),
        (
            {"otype": "Composite", "nested": [{"otype": "Frequency", "n_dims_to_encode": 2}]},
            "1 of 3 coordinates",
        ),
    ],
)
def test_sp20_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_tcnn_config(config, 3)


def test_power_law_signal_has_its_spectrum():
    signal = power_law_signal(256, 1.0, seed=3)
    assert (signal.min().item(), signal.max().item()) == pytest.approx((-0.5, 0.5))
    assert torch.fft.fft(signal).abs()[70:187].max() < 1e-9
    assert torch.equal(signal, power_law_signal(256, 1.0, seed=3))


def test_import_needs_no_framework_and_touches_no_device():
    code = (
        "import sys\n"
        "sys.modules.update({n: None for n in ('nerfstudio', 'transformers', 'torch_geometric')})\n"
        "import spe_layers, torch\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

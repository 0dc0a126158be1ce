"""Closed forms against quadrature, the paper's table, sampled networks; the choice of bands."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spe_layers import (
    SPE,
    Bands,
    closed_form_ntk,
    empirical_ntk,
    gradient_flow,
    leave_one_out,
    positional_encoding,
    select_bands,
)
from spe_layers.signals import image_halves, paper_signal

RELU = "relu"


def train_and_test(activation: str, gain: float, steps: int) -> tuple[float, float]:
    x, y = paper_signal()
    train = torch.arange(256) % 8 == 0
    e = positional_encoding(x, Bands.harmonics(16, power=1.0))
    kernel, _ = closed_form_ntk(e, e, (activation, RELU, RELU), width=1024, first_gain=gain)
    fitted, predicted = gradient_flow(
        kernel[train][:, train], kernel[~train][:, train], y[train], learning_rate=1e-5, steps=steps
    )
    return float((fitted - y[train]).square().mean()), float((predicted - y[~train]).square().mean())


def test_sp11_signal_is_the_papers():
    _, y = paper_signal()
    np.testing.assert_allclose(y[128:132], [0.2563293, 0.2486671, 0.2420912, 0.2300265], atol=2e-7)
    spectrum = torch.fft.fft(y - y.mean()).abs()
    assert spectrum[80:177].max() < 1e-5


@pytest.mark.parametrize(
    ("activation", "gain", "steps", "expected"),
    [
        ("relu", 1.0, 40_000, (1.73e-3, 6.13e-3)),
        ("sine", 1.0, 20_000, (1.67e-3, 5.97e-3)),
        ("identity", 1.0, 20_000, (1.57e-3, 5.92e-3)),
        ("relu", 2.0, 20_000, (1.77e-3, 6.15e-3)),
        ("sine", 16.0, 20_000, (1.2e-10, 5.38e-3)),
    ],
)
def test_sp11_table_of_the_1d_study(activation, gain, steps, expected):
    assert train_and_test(activation, gain, steps) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("name", "phi", "slope"),
    [
        ("sine", torch.sin, torch.cos),
        ("relu", torch.relu, lambda u: (u > 0).double()),
        ("identity", lambda u: u, torch.ones_like),
    ],
)
def test_sp11_expectations_by_quadrature(name, phi, slope):
    """Theta_1 = width K + Theta_0 K' with K, K' by a dense rule over the two pre-activations."""
    e1 = torch.tensor([[0.9, -0.3, 0.5]], dtype=torch.float64)
    e2 = torch.tensor([[0.4, 0.8, 0.1]], dtype=torch.float64)
    width, gain = 10, 2.0
    ntk, nngp = closed_form_ntk(e1, e2, (name,), width=width, first_gain=gain)
    both = torch.cat([e1, e2])
    root = torch.linalg.cholesky(gain / 3 * both @ both.T)
    grid = torch.linspace(-9, 9, 2401, dtype=torch.float64)
    weight = torch.exp(-0.5 * (grid[:, None] ** 2 + grid[None, :] ** 2))
    weight /= weight.sum()
    u = root[0, 0] * grid[:, None].expand(-1, len(grid))
    v = root[1, 0] * grid[:, None] + root[1, 1] * grid[None, :]
    k = (weight * phi(u) * phi(v)).sum()
    k_prime = (weight * slope(u) * slope(v)).sum()
    assert nngp.item() == pytest.approx(k.item(), abs=1e-3 if name == "relu" else 1e-7)
    expected = width * k + (e1 @ e2.T).item() * k_prime
    assert ntk.item() == pytest.approx(expected.item(), rel=2e-3)


def test_sp11_empirical_kernel_of_a_wide_network_is_the_closed_form():
    torch.manual_seed(0)
    width, bands = 512, Bands.octaves(3, scale=math.pi)
    x = torch.rand(12, 2) * 2 - 1
    kernels = []
    for _ in range(3):
        first = SPE(2, width, bands, bias=False, init="lecun")
        hidden, last = nn.Linear(width, width, bias=False), nn.Linear(width, 1, bias=False)
        for linear in (hidden, last):
            nn.init.normal_(linear.weight, std=width**-0.5)
        kernels.append(empirical_ntk(nn.Sequential(first, hidden, nn.ReLU(), last), x, x).double())
    e = positional_encoding(x.double(), bands)
    expected, _ = closed_form_ntk(e, e, ("sine", "relu"), width=width)
    found = torch.stack(kernels).mean(0)
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_sp11_empirical_kernel_equals_autograd():
    model = nn.Sequential(SPE(2, 5, 2), nn.Linear(5, 1))
    x = torch.rand(4, 2)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(model(p).squeeze(), list(model.parameters()))])
        for p in x
    ]
    jacobian = torch.stack(rows)
    torch.testing.assert_close(empirical_ntk(model, x, x[:2]), jacobian @ jacobian[:2].T)


def test_sp11_gradient_flow_is_the_limit_of_gradient_descent():
    torch.manual_seed(1)
    root = torch.randn(6, 6, dtype=torch.float64)
    kernel, y = root @ root.T, torch.randn(6, 2, dtype=torch.float64)
    f = torch.zeros_like(y)
    for _ in range(20000):
        f = f - 1e-5 * kernel @ (f - y)
    train, _ = gradient_flow(kernel, kernel, y, learning_rate=1e-5, steps=20000)
    torch.testing.assert_close(train, f, atol=1e-4, rtol=0)


def test_sp10_leave_one_out_equals_refitting():
    torch.manual_seed(2)
    root = torch.randn(8, 8, dtype=torch.float64)
    kernel, y = root @ root.T, torch.randn(8, dtype=torch.float64)
    y = y - y.mean()
    shift = 1e-2 * kernel.diagonal().mean()
    errors = []
    for i in range(8):
        rest = [j for j in range(8) if j != i]
        inner = kernel[rest][:, rest] + shift * torch.eye(7, dtype=torch.float64)
        errors.append((kernel[i, rest] @ torch.linalg.solve(inner, y[rest]) - y[i]).square().item())
    assert leave_one_out(kernel, y, ridge=1e-2) == pytest.approx(np.mean(errors), rel=1e-8)


def grid_points(side: int, extent: float = 2.0) -> torch.Tensor:
    axis = torch.linspace(-extent / 2, extent / 2, side, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


@pytest.mark.filterwarnings("ignore:select_bands")
@pytest.mark.parametrize("side", [8, 17, 33, 48])
def test_sp09_highest_frequency_is_below_nyquist_and_within_an_octave(side):
    x = grid_points(side)
    spacing = 2.0 / (side - 1)
    bands = select_bands(x)
    assert bands.max_frequency <= 1 / (2 * spacing) * (1 + 1e-9) < 2 * bands.max_frequency * (1 + 1e-8)
    assert bands.dyadic
    assert select_bands(x * 8).max_frequency == pytest.approx(bands.max_frequency / 8)
    assert bands.amplitudes[:2] == (1.0, 0.5)


@pytest.mark.filterwarnings("ignore:select_bands")
@given(st.integers(-6, 6), st.floats(-3, 3), st.randoms())
@settings(max_examples=20, deadline=None)
def test_sp09_scale_shifts_exponents_and_translation_and_order_change_nothing(power, shift, random):
    x = grid_points(9)
    plain = select_bands(x)
    scaled = select_bands(x * 2.0**power)
    assert [m * 2.0**power for m in scaled.multipliers] == list(plain.multipliers)
    order = list(range(len(x)))
    random.shuffle(order)
    moved = select_bands(x[order] + round(shift * 64) / 64)
    assert moved.multipliers == plain.multipliers


def test_sp09_spacing_alone_warns_and_says_what_to_do():
    with pytest.warns(UserWarning, match=r"1\.5 dB short; pass the training targets"):
        select_bands(grid_points(5))
    with pytest.warns(UserWarning, match="spacing alone"):
        layer = SPE.from_coordinates(grid_points(5), 8)
    assert layer.init == "calibrated"
    assert layer.in_features == 2


@pytest.mark.parametrize("image", ["camera", "astronaut", "brick", "text"])
def test_sp10_chosen_bands_are_within_half_a_decibel_of_the_best_of_the_grid(image):
    """Test error of kernel regression with each candidate; the choice sees the training half alone."""
    pytest.importorskip("skimage", reason="needs scikit-image's pictures")
    x, y, train = image_halves(image, 48)
    x, y = x.double(), y.double()
    chosen = select_bands(x[train], y[train])
    candidates = [
        Bands.octaves(n, scale=math.pi, decay=decay) for n in range(1, 7) for decay in (0.0, 0.5, 1.0, 1.5)
    ]

    def test_psnr(bands: Bands) -> float:
        e = positional_encoding(x, bands)
        gain = e.shape[1] / e.square().sum(1).mean().item()
        kernel, _ = closed_form_ntk(e, e, ("sine", "relu"), width=1024, first_gain=gain)
        inner = kernel[train][:, train]
        inner = inner + 1e-3 * inner.diagonal().mean() * torch.eye(len(inner), dtype=torch.float64)
        mean = y[train].mean()
        predicted = kernel[~train][:, train] @ torch.linalg.solve(inner, y[train] - mean) + mean
        return -10 * math.log10((predicted - y[~train]).square().mean().item() / 4)

    assert test_psnr(chosen) >= max(map(test_psnr, candidates)) - 0.5


def test_sp10_candidates_override_the_grid_and_equal_errors_go_to_fewer_bands():
    x = torch.linspace(0, 1, 40)
    y = torch.sin(2 * math.pi * 4 * x)
    fine, coarse = Bands((8.0,), math.pi, include_input=False), Bands((0.25,), math.pi, include_input=False)
    assert select_bands(x, y, candidates=[coarse, fine]) == fine
    twice = Bands((8.0, 8.0), math.pi, include_input=False)
    assert select_bands(x, y, candidates=[twice, fine]) == fine
    assert select_bands(x, y, seed=0, max_points=30) == select_bands(x, y, seed=0, max_points=30)


@pytest.mark.parametrize(
    ("coordinates", "options", "message"),
    [
        (torch.tensor([[0.0], [math.nan], [1.0]]), {}, "coordinates contain NaN or infinity at row 1"),
        (torch.zeros(5, 2), {}, "at least 2 distinct points"),
        (torch.rand(5, 2), {"targets": torch.rand(4)}, "one row a point: 5 points"),
        (
            torch.rand(5, 2),
            {"targets": torch.full((5,), math.inf)},
            "targets contain NaN or infinity at row 0",
        ),
        (torch.rand(5, 2), {"candidates": []}, "pass targets"),
        (torch.rand(5, 2), {"targets": torch.rand(5), "candidates": []}, "candidates is empty"),
        (torch.rand(5, 2, 2), {}, r"must be \[N, D\] or \[N\]"),
    ],
)
def test_sp09_bad_input_is_refused(coordinates, options, message):
    with pytest.raises(ValueError, match=message):
        select_bands(coordinates, **options)


def test_sp10_detail_that_only_all_samples_resolve_is_seen_from_few_of_them():
    x = torch.linspace(0, 1, 8192)[:, None]
    y = torch.sin(2 * math.pi * 3 * x) + 0.5 * torch.sin(2 * math.pi * 700 * x)
    bands = select_bands(x, y, max_points=256)
    # Twelve samples a period; 256 of them spread over the range could not tell 700 cycles from noise.
    assert 256 <= bands.max_frequency <= 2048
    assert bands == select_bands(x, y, max_points=256)


def test_sp09_other_types_are_refused():
    with pytest.raises(TypeError, match=r"coordinates must be a tensor, got list; pass torch\.as_tensor"):
        select_bands([[0.0], [1.0]])
    with pytest.raises(TypeError, match="targets must be a tensor, got ndarray"):
        select_bands(torch.rand(5, 2), torch.rand(5).numpy())


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'tanh', known: sine, relu, identity"):
        closed_form_ntk(torch.rand(2, 3), torch.rand(2, 3), ("tanh",), width=4)

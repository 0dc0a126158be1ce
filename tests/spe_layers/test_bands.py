"""Bands and the encoding against independent formulas (SP-02, SP-04, SP-14, SP-15)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spe_layers import Bands, FrequencyAnnealing, PositionalEncoding, phases, positional_encoding

PLAIN = Bands.octaves(4)


def reference_embedder(x: np.ndarray, bands: int) -> np.ndarray:
    """NeRF code: x, then for each octave sin of all coordinates and cos of all, no pi."""
    parts = [x]
    for octave in range(bands):
        parts += [np.sin(2.0**octave * x), np.cos(2.0**octave * x)]
    return np.concatenate(parts, -1)


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
@pytest.mark.parametrize("bands", [0, 1, 10])
def test_sp02_equals_the_reference_embedder(dims, bands):
    x = torch.rand(7, 4, dims, dtype=torch.float64) * 2 - 1
    found = positional_encoding(x.float(), bands)
    assert found.shape == (7, 4, Bands.octaves(bands).num_features(dims))
    np.testing.assert_allclose(
        found.numpy(), reference_embedder(x.float().double().numpy(), bands), atol=1e-5
    )


@pytest.mark.nerfstudio
@pytest.mark.parametrize(("count", "low", "high", "keep"), [(10, 0.0, 8.0, True), (16, 0.0, 16.0, False)])
def test_sp02_equals_nerfstudio(count, low, high, keep):
    from nerfstudio.field_components.encodings import NeRFEncoding

    theirs = NeRFEncoding(3, count, low, high, include_input=keep)
    bands = Bands.spaced(count, low, high, include_input=keep)
    x = torch.rand(50, 3, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(positional_encoding(x, bands), theirs(x), atol=1e-5, rtol=0)


def test_sp02_equals_the_formula_of_tiny_cuda_nn():
    x = torch.rand(9, 3, dtype=torch.float64)
    bands = Bands.octaves(5, scale=math.pi, include_input=False, layout="tcnn")
    expected = [
        f(2.0**band * math.pi * x[:, d])
        for d in range(3)
        for band in range(5)
        for f in (torch.sin, torch.cos)
    ]
    torch.testing.assert_close(positional_encoding(x, bands), torch.stack(expected, -1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["nerf", "nerfstudio", "tcnn"])
@pytest.mark.parametrize("keep", [True, False])
def test_sp02_layouts_are_permutations_of_each_other(layout, keep):
    bands = Bands.octaves(3, include_input=keep, layout=layout)
    order = bands.feature_order(2)
    assert sorted(order.tolist()) == list(range(bands.num_features(2)))
    x = torch.rand(5, 2)
    plain = positional_encoding(x, Bands.octaves(3, include_input=keep))
    torch.testing.assert_close(positional_encoding(x, bands), plain[:, order])


@pytest.mark.parametrize("scale", [math.pi, 2 * math.pi])
def test_sp04_sixteen_octaves_are_exact_to_1e6(scale):
    x = torch.rand(20000, 2) * 2 - 1
    bands = Bands.octaves(16, scale=scale)
    found = positional_encoding(x, bands).double()
    exact = positional_encoding(x.double(), bands)
    multiples = [2.0**band for band in range(16)]
    direct = torch.stack([torch.sin(scale * m * x.double()) for m in multiples], 1)
    torch.testing.assert_close(exact[:, 2:].reshape(-1, 16, 2, 2)[:, :, 0], direct, atol=1e-9, rtol=0)
    assert (found - exact).abs().max() <= 1e-6
    naive = torch.sin(x * (scale * multiples[-1])).double()
    assert (naive - direct[:, -1]).abs().max() > 1e-4, "the direct product should show the problem"


def test_sp04_multipliers_that_are_no_powers_of_two_are_exact_too():
    bands = Bands.spaced(10, 0.0, 8.0)
    x = torch.rand(1000, 3)
    error = positional_encoding(x, bands).double() - positional_encoding(x.double(), bands)
    assert error.abs().max() <= 1e-6


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5),
    st.integers(0, 15),
    st.sampled_from([math.pi, 2 * math.pi]),
)
@settings(max_examples=60, deadline=None)
def test_sp04_phases_are_reduced_and_congruent(values, band, scale):
    x = torch.tensor(values)[:, None]
    phase = phases(x, Bands((2.0**band,), scale))[:, 0, 0].double()
    assert phase.abs().max() <= math.pi + 1e-6
    turns = (scale * 2.0**band * x[:, 0].double() - phase) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-6, rtol=0)


def test_sp14_covariance_is_the_gaussian_expectation():
    """Gauss-Hermite quadrature of the encoding over N(mean, variance), one coordinate at a time."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = torch.tensor(weights / weights.sum())
    bands = Bands.octaves(5, scale=2 * math.pi, decay=0.5)
    mean = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    covariance = torch.tensor([[[1e-3, 2e-4], [2e-4, 5e-4]]], dtype=torch.float64)
    found = positional_encoding(mean, bands, covariance=covariance)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(positional_encoding(mean, bands, covariance=diagonal), found)
    points = mean + torch.tensor(nodes)[:, None] * diagonal.sqrt()
    expected = weights @ positional_encoding(points, bands)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    assert found[0, -1] < 0.2, "the highest band must be damped"


@pytest.mark.nerfstudio
def test_sp14_nerfstudio_damps_by_another_variance():
    """Its means are scaled by 2 pi, its variances are not: documented, and why ours differs."""
    from nerfstudio.field_components.encodings import NeRFEncoding

    theirs = NeRFEncoding(1, 4, 0.0, 3.0)(torch.full((1, 1), 0.0), covs=torch.full((1, 1, 1), 1e-3))
    ours = positional_encoding(
        torch.zeros(1, 1), Bands.spaced(4, 0.0, 3.0), covariance=torch.full((1, 1), 1e-3)
    )
    assert theirs[0, -1] > 0.9
    assert ours[0, -1].item() == pytest.approx(math.exp(-0.5 * (16 * math.pi) ** 2 * 1e-3), rel=1e-5)


def test_sp15_mask_equals_the_schedule_at_every_step():
    bands, end = Bands.octaves(4), 30
    annealing, groups = FrequencyAnnealing(bands, end), 9
    for step in range(40):
        pointer = min(groups * step / end + 1, groups)
        expected = (
            [min(max(pointer - g, 1e-8), 1 - 1e-8) for g in range(groups)] if step <= end else [1.0] * groups
        )
        np.testing.assert_allclose(annealing.mask(step).numpy(), expected, rtol=0, atol=1e-15)


def test_sp15_mask_multiplies_groups_in_every_layout():
    x = torch.rand(3, 2)
    mask = torch.tensor([0.5, 1.0, 0.0, 0.25, 0.0])
    for layout in ("nerf", "nerfstudio", "tcnn"):
        bands = Bands.octaves(2, layout=layout)
        found = positional_encoding(x, bands, mask=mask)
        plain = positional_encoding(x, Bands.octaves(2)) * mask.repeat_interleave(2)
        torch.testing.assert_close(found, plain[:, bands.feature_order(2)])


def test_bands_properties_and_round_trip():
    bands = Bands.octaves(5, scale=math.pi, decay=1.0)
    assert bands.amplitudes == (1.0, 0.5, 0.25, 0.125, 0.0625)
    assert bands.max_frequency == pytest.approx(8.0)
    assert bands.num_features(3) == 33
    assert Bands.from_dict(bands.to_dict()) == bands
    assert bands.mean_square(3) == pytest.approx(3 * (sum(a * a for a in bands.amplitudes) + 1 / 3))
    x = torch.rand(200000, 3, dtype=torch.float64) * 2 - 1
    assert positional_encoding(x, bands).square().sum(1).mean() == pytest.approx(
        bands.mean_square(3), rel=5e-3
    )
    harmonic = Bands.harmonics(16, power=1.0)
    assert sum(a * a for a in harmonic.amplitudes) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bands((), include_input=False), "Bands without bands needs include_input=True"),
        (lambda: Bands((1.0, -2.0)), "positive and finite"),
        (lambda: Bands((1.0,), amplitudes=(1.0, 2.0)), "1 bands, 2 amplitudes"),
        (lambda: Bands((1.0,), layout="other"), "one of nerf, nerfstudio, tcnn"),
        (lambda: Bands((1.0,), scale=0.0), "scale must be positive"),
        (lambda: positional_encoding(torch.rand(2, 3), 200), "float32 phases overflow"),
        (lambda: Bands.from_dict({"multiplier": [1.0]}), "unknown keys"),
        (lambda: positional_encoding(torch.rand(2, 3), PLAIN, mask=torch.ones(4)), "each of the 9 groups"),
        (
            lambda: positional_encoding(torch.rand(2, 3), PLAIN, covariance=torch.rand(2, 2)),
            "covariance must",
        ),
        (lambda: PositionalEncoding(3, 2)(torch.rand(2, 2)), "expects coordinates of size 3"),
        (lambda: FrequencyAnnealing(3, -1), "must not be negative"),
    ],
)
def test_bad_bands_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

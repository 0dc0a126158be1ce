"""Dropping bands after training: what stays equal, and that the bound holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spe_layers import SPE, Bands, prune_bands


def with_silent_bands(layer: SPE, silent: list[int], size: float) -> SPE:
    """The layer with the columns of these bands (in NeRF's order) drawn at this size."""
    dims, inputs = layer.in_features, layer.in_features * int(layer.bands.include_input)
    back = layer.bands.feature_order(dims).argsort()
    with torch.no_grad():
        for band in silent:
            block = back[inputs + 2 * dims * band : inputs + 2 * dims * (band + 1)]
            layer.weight[:, block] = size * torch.randn(layer.out_features, 2 * dims).to(layer.weight)
    return layer


@pytest.mark.parametrize("layout", ["nerf", "nerfstudio", "tcnn"])
@pytest.mark.parametrize("include_input", [True, False])
def test_sp23_bands_without_weight_go_and_the_output_stays(layout, include_input):
    torch.manual_seed(0)
    bands = Bands.octaves(6, scale=math.pi, decay=0.5, include_input=include_input, layout=layout)
    layer = with_silent_bands(SPE(2, 16, bands), [1, 4], 0.0)
    found = prune_bands(layer, 1e-6)
    assert found.dropped == (1, 4)
    assert found.bound == 0
    assert found.layer.bands.multipliers == (1.0, 4.0, 8.0, 32.0)
    x = torch.rand(50, 2) * 2 - 1
    torch.testing.assert_close(found.layer(x), layer(x), atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tolerance=st.floats(0, 2), scale=st.sampled_from([1.0, math.pi]))
def test_sp23_no_output_changes_by_more_than_the_bound(seed, tolerance, scale):
    torch.manual_seed(seed)
    bands = Bands.octaves(7, scale=scale, decay=float(seed % 3) / 2)
    layer = SPE(3, 8, bands, dtype=torch.float64)
    with_silent_bands(layer, [2, 5], 0.02)
    found = prune_bands(layer, tolerance)
    assert found.bound <= tolerance
    x = torch.rand(200, 3, dtype=torch.float64) * 2 - 1
    assert float((found.layer(x) - layer(x)).abs().max()) <= found.bound + 1e-12
    assert len(found.dropped) + found.layer.bands.num_bands == 7


def test_sp23_something_always_stays_and_the_old_layer_is_untouched():
    layer = SPE(2, 4, Bands.octaves(3, include_input=False))
    before = layer.weight.clone()
    found = prune_bands(layer, 1e6)
    assert found.layer.bands.num_bands == 1
    assert torch.equal(layer.weight, before)
    assert prune_bands(SPE(2, 4, 3), 1e6).layer.bands.num_bands == 0


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_sp23_bad_input_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be finite"):
        prune_bands(SPE(2, 4, 3), tolerance)
    layer = SPE(2, 4, 3)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        prune_bands(layer, 0.1)

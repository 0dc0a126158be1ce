"""Masks as pure functions of their names, and hooks that leave a network as they found it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nerfstudio_phdropout import drop_uniforms, maskable_layers, posthoc_dropout


class Field(nn.Module):
    """Two MLPs and a single linear head, as NeRF fields have."""

    def __init__(self, activation: nn.Module | None = None, out_activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = Stack(4, 32, 3, activation or nn.ReLU(), out_activation)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
        self.density = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)
        return torch.cat([self.head(h), self.density(h)], dim=-1)


class Stack(nn.Module):
    """The layout of nerfstudio's MLP: layers in a list, one activation object, a skip connection."""

    def __init__(self, width_in, width, depth, activation, out_activation):
        super().__init__()
        sizes = [width_in, *[width] * (depth - 1)]
        sizes[-1] += width_in
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.activation, self.out_activation = activation, out_activation

    def forward(self, x):
        h = x
        for i, layer in enumerate(self.layers):
            if i == len(self.layers) - 1:
                h = torch.cat([x, h], dim=-1)
            h = layer(h)
            if i < len(self.layers) - 1:
                h = self.activation(h)
        return self.out_activation(h) if self.out_activation else h


def test_ph05_zero_ratio_is_bitwise_the_plain_network():
    field, x = Field(), torch.rand(50, 4)
    plain = field(x)
    with posthoc_dropout(field, 0.0) as names:
        assert names == ["base.layers.0", "base.layers.1", "head.0"]
        assert torch.equal(field(x), plain)


def test_ph05_same_seed_and_trial_same_output_and_others_differ():
    field, x = Field(), torch.rand(50, 4)
    outputs = {}
    for key in ((0, 0), (0, 0), (0, 1), (1, 0)):
        with posthoc_dropout(field, 0.3, seed=key[0], trial=key[1]):
            output = field(x)
        assert key not in outputs or torch.equal(outputs[key], output)
        outputs[key] = output
    assert not torch.equal(outputs[0, 0], outputs[0, 1])
    assert not torch.equal(outputs[0, 0], outputs[1, 0])


def test_ph05_hooks_are_removed_after_an_exception():
    field, x = Field(nn.Softplus()), torch.rand(5, 4)
    plain = field(x)
    with pytest.raises(KeyError), posthoc_dropout(field, 0.5):
        raise KeyError
    assert torch.equal(field(x), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in field.modules())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus(), nn.Sigmoid()])
def test_ph05_masks_the_hidden_units_after_the_activation(activation):
    field, x, ratio = Field(activation), torch.rand(7, 4), 0.4
    with posthoc_dropout(field.base, ratio, seed=3, trial=2) as names:
        masked = field.base(x)
    assert names == ["layers.0", "layers.1"]
    masks = [
        (drop_uniforms(32, seed=3, trial=2, stream=stream) >= ratio).float() / (1 - ratio)
        for stream in range(2)
    ]
    h = activation(field.base.layers[0](x)) * masks[0]
    h = activation(field.base.layers[1](h)) * masks[1]
    torch.testing.assert_close(masked, field.base.layers[2](torch.cat([x, h], dim=-1)))


def test_ph05_relu_output_counts_as_hidden_and_first_is_first():
    field = Field(out_activation=nn.ReLU())
    assert "base.layers.2" in maskable_layers(field)
    assert list(maskable_layers(field, "first")) == ["base.layers.0", "head.0"]


def test_ph05_linear_head_variance_closed_form():
    """Var = p / (1 - p) sum (w_i h_i)^2 for a mask on the units a linear head reads."""
    torch.manual_seed(1)
    net, x, ratio = nn.Sequential(nn.Linear(3, 24), nn.Linear(24, 1)), torch.rand(1, 3), 0.25
    outputs = []
    with torch.no_grad():
        for trial in range(6000):
            with posthoc_dropout(net, ratio, trial=trial):
                outputs.append(float(net(x)))
        terms = (net[1].weight[0] * net[0](x)[0]) ** 2
    expected = ratio / (1 - ratio) * float(terms.sum())
    sample = torch.tensor(outputs, dtype=torch.float64)
    fourth = float(((sample - sample.mean()) ** 4).mean())
    error = math.sqrt((fourth - expected**2) / len(outputs))
    assert abs(float(sample.var()) - expected) < 5 * error


def test_ph05_mask_per_sample_does_not_depend_on_chunks():
    field, x = Field(), torch.rand(40, 4)
    with posthoc_dropout(field, 0.3, mask="sample"):
        whole = field(x)
    with posthoc_dropout(field, 0.3, mask="sample"):
        parts = torch.cat([field(x[:15]), field(x[15:])])
    torch.testing.assert_close(whole, parts)
    rows = torch.ones(40, 4)
    with posthoc_dropout(field, 0.3, mask="sample"):
        assert len(field(rows).unique(dim=0)) > 30
    with posthoc_dropout(field, 0.3):
        assert len(field(rows).unique(dim=0)) == 1


def test_ph06_drop_set_grows_with_the_ratio_and_is_uniform():
    u = drop_uniforms(200_000, seed=0, trial=0)
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert bool(((u < 0.3) <= (u < 0.31)).all())
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert 50 < chi_square < 160


def test_ph06_streams_are_independent_of_order_and_of_each_other():
    first = drop_uniforms(1000, seed=0, trial=1, stream=2)
    drop_uniforms(5, seed=9, trial=9)
    assert torch.equal(first, drop_uniforms(1000, seed=0, trial=1, stream=2))
    assert torch.equal(first[300:], drop_uniforms(700, seed=0, trial=1, stream=2, start=300))
    for other in (
        {"seed": 1, "trial": 1, "stream": 2},
        {"seed": 0, "trial": 2, "stream": 2},
        {"seed": 0, "trial": 1, "stream": 3},
    ):
        r = torch.corrcoef(torch.stack([first, drop_uniforms(1000, **other)]))[0, 1]
        assert abs(float(r)) < 0.16
    beyond = drop_uniforms(8, seed=0, trial=0, start=2**32)
    assert not torch.equal(beyond, drop_uniforms(8, seed=0, trial=0))


def test_ph06_known_values():
    """Fixed numbers: stored runs must give the same masks after an upgrade."""
    known = [0.8216091394424438, 0.9501676559448242, 0.3714604377746582]
    assert drop_uniforms(3, seed=0, trial=0).tolist() == known


def test_ph12_fused_network_is_refused():
    fused = type("NetworkWithInputEncoding", (nn.Module,), {"__module__": "tinycudann.modules"})
    field = Field()
    field.add_module("mlp_base", fused())
    with pytest.raises(RuntimeError, match=r"mlp_base is a fused tinycudann network.*implementation='torch'"):
        maskable_layers(field)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no MLP with two or more Linear layers in Linear"):
        maskable_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dropout_ratio must lie"), posthoc_dropout(Field(), 1.0):
        pass
    with pytest.raises(ValueError, match="mask must be"), posthoc_dropout(Field(), 0.1, mask="pixel"):
        pass
    with pytest.raises(ValueError, match="layers must be"):
        maskable_layers(Field(), "last")

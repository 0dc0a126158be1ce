"""The fused kernels in Triton's interpreter against the plain torch twin; run by test_kernels.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from spe_layers import SPE, Bands, spe, spe_linear_relu


def outputs_and_gradients(layer: SPE, x: torch.Tensor, backend: str) -> list[torch.Tensor]:
    layer.backend = backend
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    inputs = [x, layer.weight] + ([] if layer.bias is None else [layer.bias])
    ramp = torch.linspace(-1, 1, max(y.numel(), 1))[: y.numel()].reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * ramp).sum(), inputs)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(left / scale, right / scale, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("points", "dims", "bands", "units"),
    [
        *[(n, 3, 4, 31) for n in (0, 1, 63, 65)],
        (65, 1, 12, 16),
        (63, 5, 12, 31),
        (33, 2, 0, 7),
        (65, 3, 10, 256),
        (10, 16, 2, 5),
        (40, 2, 16, 130),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_sp06_fused_forward_and_gradients_equal_the_twin(points, dims, bands, units, bias):
    torch.manual_seed(points + dims)
    layer = SPE(dims, units, bands, bias=bias)
    x = torch.rand(points, dims) * 2 - 1
    assert_close(outputs_and_gradients(layer, x, "triton"), outputs_and_gradients(layer, x, "eager"))


@pytest.mark.parametrize(
    "bands",
    [
        Bands.octaves(16, scale=math.pi, decay=1.0),
        Bands.octaves(6, scale=2 * math.pi, include_input=False, layout="tcnn"),
        Bands.spaced(10, 0.0, 8.0, include_input=True),
        Bands.harmonics(7, power=1.0),
        Bands((0.7, 3.1, 40.0), scale=1.3),
    ],
    ids=["decay", "tcnn", "nerfstudio", "harmonics", "odd"],
)
def test_sp06_scales_layouts_and_amplitudes_equal_the_twin(bands):
    torch.manual_seed(1)
    layer = SPE(2, 24, bands)
    x = torch.rand(40, 2) * 2 - 1
    assert_close(outputs_and_gradients(layer, x, "triton"), outputs_and_gradients(layer, x, "eager"))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_sp06_gradients_of_any_size_keep_their_digits(size):
    torch.manual_seed(7)
    layer = SPE(3, 20, 4)
    x = torch.rand(90, 3) * 2 - 1
    grad = size * torch.randn(90, 20) * torch.logspace(-6, 0, 90)[:, None]
    results = []
    for backend in ("triton", "eager"):
        layer.backend = backend
        point = x.clone().requires_grad_()
        results.append(torch.autograd.grad(layer(point), [point, layer.weight, layer.bias], grad))
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("size", [1e-30, 1e-4, 300.0])
def test_sp06_weights_of_any_size_keep_their_digits(size):
    torch.manual_seed(8)
    layer = SPE(2, 20, 2, dtype=torch.float64)
    x = torch.rand(40, 2) * 2 - 1
    with torch.no_grad():
        layer.weight.mul_(size)
        layer.bias.mul_(size)
    exact = layer(x.double())
    found = spe(x, layer.weight.float(), layer.bias.float(), layer.bands, backend="triton")
    # A phase of some hundred radians has lost as many units in float32.
    assert float((found - exact).abs().max() / exact.abs().max()) < 3e-7 * max(1.0, size)


def test_sp06_large_coordinates_lose_no_more_than_float32_does():
    torch.manual_seed(9)
    layer = SPE(2, 20, Bands.octaves(1, scale=math.pi))
    x = (torch.rand(70, 2) * 2 - 1) * 1e5
    exact = torch.sin(layer.double().phase(x.double()))
    layer.float()
    errors = [
        float((spe(x, layer.weight, layer.bias, layer.bands, backend=b) - exact).abs().max())
        for b in ("triton", "eager")
    ]
    assert errors[0] <= 4 * errors[1]


def test_sp06_infinite_weights_give_nan_as_plain_torch_does():
    layer = SPE(2, 6, 2)
    with torch.no_grad():
        layer.weight[2, 1] = math.inf
    x = torch.rand(5, 2) + 0.1
    found = spe(x, layer.weight, layer.bias, layer.bands, backend="triton")
    assert found[:, 2].isnan().all()


def test_sp06_non_contiguous_and_batched_coordinates():
    torch.manual_seed(2)
    layer = SPE(3, 8, 5)
    base = torch.rand(3, 20, 2)
    x = base.permute(2, 1, 0)
    assert not x.is_contiguous()
    layer.backend = "triton"
    found = layer(x)
    layer.backend = "eager"
    assert found.shape == (2, 20, 8)
    torch.testing.assert_close(found, layer(x), atol=2e-6, rtol=0)
    row = torch.rand(1, 3).expand(70, 3)
    torch.testing.assert_close(
        spe(row, layer.weight, layer.bias, 5, backend="triton"), layer(row), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("needed", [s for s in itertools.product([True, False], repeat=3) if any(s)])
def test_sp06_each_subset_of_gradients(needed):
    torch.manual_seed(3)
    layer = SPE(2, 9, 3)
    x = torch.rand(21, 2)
    tensors = [x, layer.weight.detach(), layer.bias.detach()]
    results = []
    for backend in ("triton", "eager"):
        inputs = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        spe(*inputs, 3, backend=backend).square().sum().backward()
        results.append([t.grad for t in inputs])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_sp06_saves_coordinates_weight_and_bias_only():
    points, dims, units, bands = 500, 3, 64, 10
    layer = SPE(dims, units, bands, backend="triton")
    x = torch.rand(points, dims).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    features = layer.weight.shape[1]
    assert sorted(t.numel() for t in saved) == sorted([points * dims, units * features, units])
    assert all(t.numel() < points * units for t in saved)


def test_sp07_double_backward_through_the_fused_op():
    torch.manual_seed(4)
    layer = SPE(2, 6, 3, backend="triton")
    x = torch.rand(5, 2).requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    found = torch.autograd.grad(slope.square().sum(), [x, layer.weight])
    layer.backend = "eager"
    (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    expected = torch.autograd.grad(slope.square().sum(), [x, layer.weight])
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_sp07_gradients_of_torch_func_equal_the_twin():
    layer, x = SPE(2, 8, 3), torch.rand(5, 2)
    slopes = []
    for backend in ("eager", "triton"):
        layer.backend = backend
        slopes.append(torch.func.grad(lambda p: layer(p).square().sum())(x).detach())
    torch.testing.assert_close(*slopes)


def test_sp15_mask_reaches_the_kernel():
    layer = SPE(3, 8, 2, backend="triton")
    x = torch.rand(9, 3)
    mask = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0])
    expected = torch.sin(layer.encode(x, mask=mask) @ layer.weight.T + layer.bias)
    torch.testing.assert_close(layer(x, mask=mask), expected, atol=2e-6, rtol=0)


def test_sp14_covariance_takes_plain_torch_under_triton():
    layer = SPE(2, 8, 4, backend="triton")
    x, variance = torch.rand(6, 2), torch.rand(6, 2) * 0.1
    found = layer(x, covariance=variance)
    layer.backend = "eager"
    assert torch.equal(found, layer(x, covariance=variance))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sp05_sixteen_bit_products_stay_near_float32(dtype):
    torch.manual_seed(5)
    layer = SPE(3, 64, 10, backend="triton")
    x = torch.rand(200, 3) * 2 - 1
    exact = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        rounded = layer(x)
    assert rounded.dtype == dtype
    assert (rounded.float() - exact).square().mean().sqrt() <= 0.01


def test_sp08_compile_sees_one_node():
    layer = SPE(3, 16, 4, backend="triton")
    x = torch.rand(17, 3)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    assert "spe_layers.forward" in str([n.target for n in graphs[0].graph.nodes])


def test_sp21_gradients_are_bitwise_reproducible():
    torch.manual_seed(6)
    layer = SPE(3, 32, 6)
    x = torch.rand(300, 3)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [outputs_and_gradients(layer, x, "triton") for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(("units", "outputs", "bias"), [(64, 70, True), (40, 16, False), (130, 256, True)])
def test_sp24_stack_equals_the_two_layers(units, outputs, bias):
    torch.manual_seed(10)
    layer = SPE(3, units, 6, backend="triton")
    linear = torch.nn.Linear(units, outputs, bias=bias)
    x = torch.rand(3, 50, 3) * 2 - 1
    found = spe_linear_relu(x, layer, linear, torch.float16)
    layer.backend = "eager"
    expected = torch.relu(linear(layer(x)))
    assert found.dtype == torch.float16
    assert found.shape == expected.shape
    assert float((found.float() - expected).square().mean().sqrt()) < 2e-3
    assert not found.requires_grad


def test_sp24_stack_refuses_what_does_not_fit():
    layer, linear = SPE(3, 8, 2, backend="triton"), torch.nn.Linear(9, 4)
    with pytest.raises(ValueError, match="linear takes 9 features, layer gives 8"):
        spe_linear_relu(torch.rand(2, 3), layer, linear)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        spe_linear_relu(torch.rand(2, 3), layer, torch.nn.Linear(8, 4), torch.float32)
    with pytest.raises(ValueError, match="coordinates of size 3"):
        spe_linear_relu(torch.rand(2, 4), layer, torch.nn.Linear(8, 4))


def test_fused_backend_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="at most 16 coordinates"):
        SPE(17, 4, 1, backend="triton")(torch.rand(2, 17))
    with pytest.raises(ValueError, match="no float64"):
        SPE(2, 4, 1, backend="triton", dtype=torch.float64)(torch.rand(2, 2))

"""The layer against a float64 formula; initialisations, precision, derivatives, export."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spe_layers import SPE, Bands, encoding, spe, spe_linear_relu
from spe_layers.functional import nerf_order_weight


def formula(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, bands: int) -> np.ndarray:
    features = [x]
    for octave in range(bands):
        features += [np.sin(2.0**octave * x), np.cos(2.0**octave * x)]
    return np.sin(np.concatenate(features, -1) @ weight.T + bias)


@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bands", [0, 1, 5, 12])
def test_sp01_equals_the_float64_formula(dims, bands):
    torch.manual_seed(dims)
    layer = SPE(dims, 17, bands)
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    for shape in [(dims,), (6, dims), (2, 3, 4, dims), (0, dims)]:
        x = torch.rand(shape) * 2 - 1
        found = layer(x)
        assert found.shape == (*shape[:-1], 17)
        np.testing.assert_allclose(
            found.detach().numpy(), formula(x.double().numpy(), weight, bias, bands), atol=1e-5
        )


def test_sp01_is_sine_of_phase_of_encoding():
    layer = SPE(3, 8, 4, bias=False)
    x = torch.rand(5, 3)
    torch.testing.assert_close(layer.phase(x), layer.encode(x) @ layer.weight.T)
    torch.testing.assert_close(layer(x), layer.phase(x).sin())
    torch.testing.assert_close(spe(x, layer.weight, None, 4), layer(x))


def test_sp03_variances_equal_the_closed_forms():
    torch.manual_seed(0)
    dims, bands = 3, Bands.octaves(10, decay=0.5)
    features = bands.num_features(dims)
    expected = {
        "linear": 1 / (3 * features),
        "lecun": 1 / features,
        "uniform": 1 / 3,
        "calibrated": 1.5**2 / bands.mean_square(dims),
    }
    for name, variance in expected.items():
        layer = SPE(dims, 2000, bands, init=name, phase_std=1.5)
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.05), name
        assert (layer.bias == 0).all().item() == (name != "linear")
    torch.manual_seed(5)
    linear = nn.Linear(features, 20)
    torch.manual_seed(5)
    layer = SPE(dims, 20, bands, init="linear")
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("bands", [Bands.octaves(10), Bands.octaves(6, scale=math.pi, decay=1.0)])
def test_sp03_calibrated_phases_have_the_standard_deviation_asked_for(bands):
    torch.manual_seed(1)
    layer = SPE(3, 4000, bands, init="calibrated", phase_std=0.7)
    phase = layer.phase(torch.rand(500, 3) * 2 - 1)
    assert phase.std().item() == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sp05_phases_stay_float32_in_mixed_precision(dtype):
    torch.manual_seed(2)
    layer = SPE(3, 128, 10)
    x = torch.rand(500, 3) * 2 - 1
    exact = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = layer(x)
        assert layer.phase(x).dtype == torch.float32
    half = copy.deepcopy(layer).to(dtype)
    for found in (under_autocast, half(x)):
        assert found.dtype == dtype
        assert (found.float() - exact).square().mean().sqrt() <= 0.01


def test_sp05_sixteen_bit_coordinates_with_too_many_bands_are_refused():
    layer = SPE(3, 8, 10)
    with pytest.raises(
        ValueError, match=r"bfloat16 coordinates cannot carry 10 bands: one rounding step is 4 rad"
    ):
        layer(torch.rand(4, 3, dtype=torch.bfloat16))
    x = torch.rand(4, 3)
    few = SPE(3, 8, 3)
    torch.testing.assert_close(few(x.bfloat16()), few(x.bfloat16().float()))


def test_sp07_first_and_second_derivatives():
    torch.manual_seed(3)
    layer = SPE(2, 4, Bands.octaves(3, scale=math.pi, decay=0.5), dtype=torch.float64)
    x = (torch.rand(3, 2, dtype=torch.float64) * 2 - 1).requires_grad_()

    def run(x, weight, bias):
        return spe(x, weight, bias, layer.bands)

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_sp08_state_dict_holds_weight_and_bias_alone_and_copies_are_equal():
    layer = SPE(3, 16, Bands.octaves(5, decay=1.0), init="calibrated")
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.rand(7, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other = SPE(3, 16, Bands.octaves(5, decay=1.0))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_sp08_reference_checkpoint_loads_as_it_is():
    """The reference's first layer is an nn.Linear called pts_linears.0 over the encoding of 3 coordinates."""
    linear = nn.Linear(63, 256)
    checkpoint = {"pts_linears.0.weight": linear.weight, "pts_linears.0.bias": linear.bias}
    layer = SPE(3, 256, 10)
    layer.load_state_dict({k.removeprefix("pts_linears.0."): v for k, v in checkpoint.items()})
    x = torch.rand(5, 3)
    expected = formula(x.double().numpy(), linear.weight.detach().numpy(), linear.bias.detach().numpy(), 10)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)


def test_sp08_load_error_names_both_band_counts():
    message = "checkpoint has 63 features (10 bands of 3 coordinates), layer has 33 features (5 bands of 3"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        nn.Sequential(SPE(3, 8, 5)).load_state_dict(nn.Sequential(SPE(3, 8, 10)).state_dict())


def test_sp08_compile_is_one_graph_and_export_is_equal():
    layer = SPE(3, 16, Bands.octaves(6, scale=math.pi, decay=1.0, layout="tcnn"))
    x = torch.rand(10, 3)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for n in (10, 23):
        torch.testing.assert_close(compiled(torch.rand(n, 3) * 0 + 0.3), layer(torch.full((n, 3), 0.3)))
    assert len(graphs) == 1
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("points", min=2)},))
    torch.testing.assert_close(exported.module()(torch.rand(4, 3) * 0 + 0.1), layer(torch.full((4, 3), 0.1)))


@pytest.mark.slow
def test_sp08_compiles_with_inductor_under_autocast():
    layer = SPE(3, 16, 6)
    x = torch.rand(40, 3)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(traced(x), layer(x))


def test_sp08_onnx_with_any_number_of_points(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx, onnxscript and onnxruntime are optional")
    pytest.importorskip("onnxscript", reason="onnx, onnxscript and onnxruntime are optional")
    model = nn.Sequential(SPE(3, 16, Bands.octaves(6, scale=math.pi)), nn.Linear(16, 1)).eval()
    points = torch.export.Dim("points", min=2, max=100000)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.rand(8, 3),), path, dynamo=True, dynamic_shapes=({0: points},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (8, 31):
        x = torch.rand(n, 3)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)


def test_bad_input_is_refused_with_what_to_do():
    layer = SPE(3, 8, 2)
    with pytest.raises(ValueError, match="SPE expects coordinates of size 3 in the last dimension, got 2"):
        layer(torch.rand(4, 2))
    with pytest.raises(TypeError, match=r"must be floating point, got torch.int64; pass x.float\(\)"):
        layer(torch.ones(4, 3, dtype=torch.int64))
    x = torch.rand(4, 3)
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity at row 2"):
        layer(x)
    with pytest.raises(ValueError, match=r"unknown init 'calibrate'.*did you mean 'calibrated'"):
        SPE(3, 8, 2, init="calibrate")
    with pytest.raises(ValueError, match="backend must be one of auto, eager, triton"):
        SPE(3, 8, 2, backend="cuda")
    with pytest.raises(ValueError, match=r"weight must be \[H, 15\]"):
        spe(torch.rand(2, 3), torch.rand(4, 9), None, 2)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        SPE(0, 8, 2)
    for bands in ("10", 2.5, True):
        with pytest.raises(TypeError, match="bands must be a Bands or a number of octaves"):
            SPE(3, 8, bands)


def test_unusual_range_warns_once():
    layer = SPE(2, 4, 3)
    with pytest.warns(UserWarning, match=r"from -9 to 9.*select_bands"):
        layer(torch.tensor([[-9.0, 9.0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.tensor([[-9.0, 9.0]]))


def test_torch_func_works():
    layer = SPE(2, 1, 3)
    x = torch.rand(5, 2)
    slopes = torch.func.vmap(torch.func.grad(lambda p: layer(p).sum()))(x)
    point = x.clone().requires_grad_()
    torch.testing.assert_close(slopes, torch.autograd.grad(layer(point).sum(), point)[0])


def test_sp24_stack_without_kernels_is_the_two_layers_under_autocast():
    layer, linear = SPE(2, 16, 3), torch.nn.Linear(16, 8)
    x = torch.rand(30, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.relu(linear(layer(x)))
    assert torch.equal(spe_linear_relu(x, layer, linear), expected)


class Devices(TorchDispatchMode):
    """The devices of all tensors that operators see and return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        self.seen |= {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize(
    "bands",
    [
        Bands.octaves(4, decay=1.0),
        Bands.octaves(4, scale=math.pi),
        Bands.harmonics(4, power=1.0),
        Bands.spaced(4, 0, 3),
        Bands.octaves(4, decay=0.5, layout="tcnn"),
    ],
)
def test_sp06_a_forward_copies_nothing_from_the_host(bands):
    layer = SPE(3, 8, bands, device="meta")
    x, mask = torch.empty(5, 3, device="meta"), torch.empty(bands.num_groups, device="meta")

    def forward():
        layer.encode(x, covariance=torch.empty(5, 3, device="meta"), mask=mask)
        nerf_order_weight(layer.weight, bands, 3, mask)

    forward()
    with Devices() as devices:
        forward()
    assert devices.seen == {"meta"}
    with Devices() as devices:
        x + torch.tensor([1.0], device="meta")
        torch.ones(3).to(x)
    assert "cpu" in devices.seen


def test_sp06_constants_of_inference_and_of_torch_func_serve_training():
    bands = Bands.octaves(3, scale=2.345, decay=0.75, layout="tcnn")
    layer, x = SPE(2, 4, bands), torch.rand(6, 2)
    encoding._kept.cache_clear()
    with torch.inference_mode():
        expected = layer(x).clone()
    found = layer(x.requires_grad_())
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected)
    encoding._kept.cache_clear()
    torch.func.vmap(torch.func.grad(lambda p: layer(p).sum()))(x.detach())
    torch.testing.assert_close(layer(x).detach(), expected)

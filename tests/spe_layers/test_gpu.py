"""The fused kernels on the device: the checks of the GPU benchmark, each named after what it looks at."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checks() -> list[dict]:
    from benchmarks.spe_layers_gpu import correctness

    return correctness(timed=True) + correctness(timed=False)


def test_sp04_sp05_sp06_sp07_sp08_sp21_kernels_equal_the_twin_on_the_device(checks):
    assert len(checks) > 15
    failed = [check for check in checks if not check["ok"]]
    assert not failed


def test_sp06_auto_takes_the_kernels_on_the_device():
    from spe_layers import SPE

    layer = SPE(3, 32, 4, device="cuda")
    y = layer(torch.rand(10, 3, device="cuda"))
    names, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(type(node).__name__)
        waiting += [following for following, _ in node.next_functions if following is not None]
    assert "_FusedBackward" in names
    assert not any("Sin" in name for name in names)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("layout", ["nerf", "nerfstudio"])
def test_sp06_a_cuda_graph_captures_forward_and_backward(backend, layout):
    from spe_layers import SPE, Bands

    bands = Bands.octaves(6, scale=torch.pi, decay=0.5, layout=layout)
    layer = SPE(3, 32, bands, backend=backend, device="cuda")
    x = torch.rand(100, 3, device="cuda")

    def step():
        return torch.autograd.grad(layer(x).square().sum(), [layer.weight, layer.bias])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    x.copy_(torch.rand(100, 3, device="cuda"))
    graph.replay()
    torch.testing.assert_close(found, step())

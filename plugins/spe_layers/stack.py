"""SPE and the layer after it in one pass: for rendering and other inference in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spe_layers.functional import nerf_order_weight, use_kernels
from spe_layers.layer import SPE

HALF_TYPES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def spe_linear_relu(x: Tensor, layer: SPE, linear: nn.Linear, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``relu(linear(layer(x)))`` without gradients, in 16 bits: [..., D] -> [..., linear.out_features].

    On a GPU the sines are multiplied where they are made, so the hidden layer is neither written nor read.
    Elsewhere, and where ``layer``'s kernels do not apply, the two layers run one after the other.

    Args:
        x: coordinates [..., D], floating point.
        layer: the first layer, D -> H.
        linear: the second, H -> H2.
        dtype: bfloat16 or float16, of the sines, the second weight and the result; sums are float32.

    Raises:
        ValueError: another dtype, a linear layer of another width.
    """
    if dtype not in HALF_TYPES:
        raise ValueError(f"spe_linear_relu computes in bfloat16 or float16, got {dtype}")
    if linear.in_features != layer.out_features:
        raise ValueError(f"linear takes {linear.in_features} features, layer gives {layer.out_features}")
    layer.check_coordinates(x)
    if not use_kernels(x, layer.weight, layer.bands, layer.backend):
        with torch.autocast(x.device.type, dtype=dtype):
            return torch.relu(linear(layer(x)))
    from spe_layers.kernels import launch_stack

    points = x.reshape(-1, x.shape[-1]).to(torch.float32)
    weight = nerf_order_weight(layer.weight, layer.bands, layer.in_features, None)
    following = (linear.weight, linear.bias)
    flat = launch_stack(points, weight, layer.bias, layer.bands, following, dtype)
    return flat.reshape(*x.shape[:-1], linear.out_features)

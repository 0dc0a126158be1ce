"""Put SPE into a network that exists already."""

from __future__ import annotations

from typing import Any

from torch import nn

from spe_layers.bands import Bands, as_bands
from spe_layers.layer import SPE


def insert_spe(model: nn.Module, path: str, bands: int | Bands = 5, **spe_options: Any) -> SPE:
    """Put ``SPE(in, in)`` before the ``nn.Linear`` at ``path``: it becomes ``Sequential(SPE, linear)``.

    This is how the paper's speech model has it: on hidden states, before the last Linear. The model gains the
    SPE's ``in * (bands.num_features(in) + 1)`` parameters; the Linear keeps its own.

    Args:
        model: changed in place.
        path: of the Linear, as in ``model.named_modules()``.
        bands: bands or their number.
        spe_options: further arguments of ``SPE``.

    Returns:
        The new layer.

    Raises:
        AttributeError: no module at this path.
        TypeError: it is not an ``nn.Linear``.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        linear = model.get_submodule(path)
    except AttributeError as error:
        raise AttributeError(f"insert_spe: {type(model).__name__} has no module {path!r} ({error})") from None
    if not isinstance(linear, nn.Linear) or not path:
        raise TypeError(f"insert_spe needs an nn.Linear at {path!r}, found {type(linear).__name__}")
    options = {"device": linear.weight.device, "dtype": linear.weight.dtype, **spe_options}
    layer = SPE(linear.in_features, linear.in_features, bands, **options)
    setattr(model.get_submodule(parent_path), name, nn.Sequential(layer, linear))
    return layer


def swap_first_layer(mlp: nn.Sequential, in_features: int, bands: int | Bands, **spe_options: Any) -> SPE:
    """Turn the first Linear and its activation into one SPE over raw coordinates.

    Modules before the Linear (an encoding) go too. The parameter count stays the same if the Linear read that
    encoding, ``Linear(bands.num_features(in_features), H)``; a ``Linear(in_features, H)`` over raw
    coordinates gains ``H * (F - in_features)``.

    Args:
        mlp: changed in place.
        in_features: number of raw coordinates.
        bands: bands or their number.
        spe_options: further arguments of ``SPE``.

    Returns:
        The new layer, ``mlp[0]``.

    Raises:
        ValueError: no Linear, a Linear of another width, no activation after it.
    """
    bands = as_bands(bands)
    linears = [(i, module) for i, module in enumerate(mlp) if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("swap_first_layer found no nn.Linear directly in the Sequential")
    position, linear = linears[0]
    width = bands.num_features(in_features)
    if linear.in_features not in (in_features, width):
        raise ValueError(
            f"the first Linear has {linear.in_features} inputs; expected {in_features} (raw coordinates) or "
            f"{width} (their encoding with {bands.num_bands} bands)"
        )
    activation = mlp[position + 1] if position + 1 < len(mlp) else None
    if activation is None or next(activation.parameters(), None) is not None:
        raise ValueError("swap_first_layer expects an activation without parameters after the first Linear")
    options = {
        "bias": linear.bias is not None,
        "device": linear.weight.device,
        "dtype": linear.weight.dtype,
        **spe_options,
    }
    layer = SPE(in_features, linear.out_features, bands, **options)
    for _ in range(position + 2):
        del mlp[0]
    mlp.insert(0, layer)
    return layer

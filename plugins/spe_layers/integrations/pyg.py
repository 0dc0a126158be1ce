"""SPE on the coordinates of graphs and point clouds: a layer chosen from ``data.pos``, and a transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from torch_geometric.data import Data
    from torch_geometric.data.datapipes import functional_transform
    from torch_geometric.transforms import BaseTransform
except ImportError as error:
    raise ImportError('SPE for graphs needs PyG: pip install "graft-plugins[pyg]"') from error

from spe_layers.bands import Bands, as_bands
from spe_layers.encoding import positional_encoding
from spe_layers.layer import SPE


class CoordinateSPE(nn.Module):
    """Node features with an SPE of their positions: ``[x | sin(W e(pos) + b)]``.

    Args:
        spatial_channels: coordinates of a position.
        out_channels: units of the SPE.
        bands, spe_options: see ``spe_layers.SPE``; ``from_data`` chooses the bands from a graph.
    """

    def __init__(
        self, spatial_channels: int, out_channels: int, bands: int | Bands = 10, **spe_options: Any
    ) -> None:
        super().__init__()
        self.spe = SPE(spatial_channels, out_channels, bands, **spe_options)

    @classmethod
    def from_data(
        cls, data: Data, out_channels: int, targets: Tensor | None = None, **options: Any
    ) -> CoordinateSPE:
        """Bands from ``data.pos`` [nodes, D] (and targets [nodes] or [nodes, C]), calibrated initialisation.

        Raises:
            ValueError: no positions.
        """
        position = _positions(data)
        layer = SPE.from_coordinates(position, out_channels, targets, **options)
        module = cls(layer.in_features, out_channels, layer.bands, **{"init": layer.init, **options})
        module.spe = layer
        return module

    def forward(self, pos: Tensor, x: Tensor | None = None) -> Tensor:
        """pos [nodes, D] and x [nodes, C] (or None) -> [nodes, C + out_channels]."""
        encoded = self.spe(pos)
        return encoded if x is None else torch.cat([x, encoded], dim=-1)


@functional_transform("add_positional_features")
class AddPositionalFeatures(BaseTransform):
    """Append the fixed encoding e(pos) to node features: the control for ``CoordinateSPE``.

    Args:
        bands: bands or their number.
        attr_name: where to store it; None appends to ``data.x``.
    """

    def __init__(self, bands: int | Bands = 4, attr_name: str | None = None) -> None:
        self.bands = as_bands(bands)
        self.attr_name = attr_name

    def forward(self, data: Data) -> Data:
        """Add the features to one graph."""
        features = positional_encoding(_positions(data), self.bands)
        if self.attr_name is not None:
            data[self.attr_name] = features
        else:
            data.x = features if data.x is None else torch.cat([data.x, features.to(data.x.dtype)], dim=-1)
        return data


def _positions(data: Data) -> Tensor:
    if data.pos is None:
        raise ValueError("the graph has no data.pos; set it to coordinates [nodes, D]")
    return data.pos

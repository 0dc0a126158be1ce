"""Fit a picture with SPE: bands from the data, then a report of the frequencies that were learned.

python examples/spe_layers_image.py
"""

from __future__ import annotations

import torch
from torch import nn

from spe_layers import SPE, spectrum_report
from spe_layers.signals import image_halves


def main() -> None:
    x, y, train = image_halves("camera", 48)
    torch.manual_seed(0)
    first = SPE.from_coordinates(x[train], 64, targets=y[train])
    print(first)
    network = nn.Sequential(first, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        (network(x[train]).squeeze(-1) - y[train]).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        error = (network(x[~train]).squeeze(-1) - y[~train]).square().mean() / 4
    print(f"test PSNR {-10 * error.log10():.1f} dB")
    print(spectrum_report(first, x[train], spacing=2 / 47, bins=8))


if __name__ == "__main__":
    main()

"""The paper's 1-D study in closed form: is SPE's gain the sine, or the scale of the first layer?

    python benchmarks/spe_layers_ntk.py

Gradient flow in the limit of wide networks on the paper's signal (32 training and 224 test points): encodings
with amplitudes j^-p, first layers by activation and gain. Deterministic, so one run is exact; takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import RESULTS, Headline, write_result
from spe_layers import Bands, closed_form_ntk, gradient_flow, positional_encoding
from spe_layers.signals import paper_signal

WIDTH, LEARNING_RATE, STEPS = 1024, 1e-5, (20_000, 40_000, 50_000)
POWERS = (0.0, 0.5, 1.0, 1.5, 2.0)
METHODS: dict[str, tuple[str, float]] = {
    "PE + ReLU": ("relu", 1.0),
    "PE + ReLU, He gain": ("relu", 2.0),
    "PE + identity": ("identity", 1.0),
    "SPE": ("sine", 1.0),
    **{f"SPE, gain {gain}": ("sine", float(gain)) for gain in (2, 4, 8, 16, 32, 64, 128)},
}


def random_fourier_features(x: torch.Tensor, sigma: float, count: int = 16) -> torch.Tensor:
    """``[sin, cos](2 pi b x) / sqrt(count)``, b from N(0, sigma^2): as many features as the encoding has."""
    frequencies = torch.randn(count, dtype=x.dtype, generator=torch.Generator().manual_seed(0)) * sigma
    phase = 2 * torch.pi * x * frequencies
    return torch.cat([phase.sin(), phase.cos()], -1) / count**0.5


def errors(
    features: torch.Tensor, y: torch.Tensor, activations: Sequence[str], gain: float
) -> list[list[float]]:
    """[train, test] mean squared error at each number of steps."""
    train = torch.arange(len(y)) % 8 == 0
    kernel, _ = closed_form_ntk(features, features, activations, width=WIDTH, first_gain=gain)
    found = []
    for steps in STEPS:
        fitted, predicted = gradient_flow(
            kernel[train][:, train],
            kernel[~train][:, train],
            y[train],
            learning_rate=LEARNING_RATE,
            steps=steps,
        )
        pairs = ((fitted, y[train]), (predicted, y[~train]))
        found.append([float((a - b).square().mean()) for a, b in pairs])
    return found


def draw(table: dict[str, list[list[float]]], path: Path) -> None:
    """Test error by first-layer gain at p = 1, with the ReLU network and the linear control as lines."""
    import matplotlib.pyplot as plt

    gains = [1, 2, 4, 8, 16, 32, 64, 128]
    names = ["p=1 SPE" if gain == 1 else f"p=1 SPE, gain {gain}" for gain in gains]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="tight")
    for index, steps in enumerate(STEPS):
        axes.plot(gains, [table[name][index][1] for name in names], "o-", label=f"SPE, {steps:,} steps")
    for name, style in (("PE + ReLU", "--"), ("PE + identity", ":")):
        axes.axhline(table[f"p=1 {name}"][0][1], ls=style, c="k", lw=1, label=f"{name}, {STEPS[0]:,} steps")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("first-layer gain (variance x F)")
    axes.set_ylabel("test MSE")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="file for a plot of test error by gain")
    arguments = parser.parse_args()
    x, y = paper_signal()
    table: dict[str, list[list[float]]] = {}
    for power in POWERS:
        features = positional_encoding(x, Bands.harmonics(16, power=power))
        for name, (activation, gain) in METHODS.items():
            table[f"p={power:g} {name}"] = errors(features, y, (activation, "relu", "relu"), gain)
    for sigma in (1.0, 3.0, 5.0, 10.0):
        table[f"RFF sigma={sigma:g} + ReLU"] = errors(
            random_fourier_features(x, sigma), y, ("relu",) * 3, 1.0
        )
    rows = [
        Headline(f"test error at 20,000 steps, p = 1: {name}", table[f"p=1 {name}"][0][1], "MSE")
        for name in METHODS
    ]
    rows.append(Headline("test error at 40,000 steps, p = 1: PE + ReLU", table["p=1 PE + ReLU"][1][1], "MSE",
                         target="about that of SPE at 20,000"))  # fmt: skip
    best = min(table, key=lambda name: table[name][2][1])
    rows.append(Headline(f"lowest test error at 50,000 steps: {best}", table[best][2][1], "MSE"))
    path = write_result(
        "spe_layers_ntk",
        question="In the paper's 1-D study, is SPE's gain the sine, or the scale of the first layer?",
        headline=rows,
        samples={},
        folder=arguments.out,
        steps=list(STEPS),
        train_and_test_error=table,
    )
    for name, values in table.items():
        if name.startswith(("p=1 ", "RFF")):
            print(f"{name:28s}", "  ".join(f"{a:9.2e} /{b:9.2e}" for a, b in values))
    if arguments.picture:
        draw(table, arguments.picture)
    print(path)


if __name__ == "__main__":
    main()

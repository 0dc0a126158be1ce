"""The paper's 1-D study with trained networks: does SPE need half of the steps, and does a linear layer too?

    python benchmarks/spe_layers_signal.py --device cuda                    the paper's network and steps
    python benchmarks/spe_layers_signal.py --width 512 --stride 20          ten minutes on one core
    python benchmarks/spe_layers_signal.py --draw docs/images/spe_layers_signal.png

The paper's signal, 32 training and 224 test points, amplitudes 1/j, three hidden layers of 1024, weights from
N(0, 1/fan_in), no bias, gradient descent on half the summed square error: 40,000 steps, 5 seeds, the same
learning rates for every method. All seeds and rates of a method step together. The closed form of the same
study in the limit of wide networks is spe_layers_ntk.py.

The paper's rate is far below what descent could bear (largest eigenvalue of the kernel times rate: 0.002 for
SPE, 0.02 at gain 16), so it follows the gradient flow, and so do --stride times as few steps that are as much
longer. Narrower networks have a kernel as much smaller and get a rate as much larger. Steps and rates are
stated as the paper's. Methods that the result file already holds are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Headline, write_result
from spe_layers import Bands, positional_encoding
from spe_layers.signals import paper_signal

PAPER_WIDTH, SEEDS, MARKS = 1024, 5, (20_000, 40_000)
RATES = (1e-5, 2e-5)
# First activation and gain of the first layer's variance.
METHODS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "PE + ReLU": (torch.relu, 1.0),
    "PE + ReLU, He gain": (torch.relu, 2.0),
    "PE + linear": (lambda z: z, 1.0),
    "SPE": (torch.sin, 1.0),
    "SPE, gain 4": (torch.sin, 4.0),
    "SPE, gain 16": (torch.sin, 16.0),
    "PE + linear, gain 4": (lambda z: z, 4.0),
}


def parameters(features: int, width: int, gain: float, device: str) -> list[Tensor]:
    """Weights of every (rate, seed), stacked: seed s starts the same at every rate."""
    layers = [(width, features), (width, width), (width, width), (1, width)]
    stacked = []
    for index, shape in enumerate(layers):
        drawn = []
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(100 * seed + index)
            std = math.sqrt((gain if index == 0 else 1.0) / shape[1])
            drawn.append(torch.randn(shape, generator=generator) * std)
        stacked.append(torch.stack(drawn * len(RATES)).to(device).requires_grad_())
    return stacked


def predict(weights: list[Tensor], features: Tensor, first: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs [models, points]."""
    h = first(features @ weights[0].transpose(1, 2))
    for w in weights[1:3]:
        h = torch.relu(h @ w.transpose(1, 2))
    return (h @ weights[3].transpose(1, 2)).squeeze(-1)


def stepper(
    weights: list[Tensor], loss: Callable[[], Tensor], device: str, scale: float
) -> Callable[[], None]:
    """One step of gradient descent, ``scale`` times the rates; on a GPU a graph, for it is many launches."""
    rate = scale * torch.tensor(RATES, device=device).repeat_interleave(SEEDS)[:, None, None]

    def step() -> None:
        gradients = torch.autograd.grad(loss(), weights)
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                w.sub_(g * rate)

    if device == "cpu":
        return step
    start = [w.detach().clone() for w in weights]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for w, first in zip(weights, start, strict=True):
            w.copy_(first)
    return graph.replay


def fit(
    name: str, marks: tuple[int, ...], device: str, *, width: int, stride: int
) -> list[list[list[float]]]:
    """Test error [rate][mark][seed]; infinity where training diverged."""
    x, y = paper_signal()
    train = torch.arange(len(y)) % 8 == 0
    features = positional_encoding(x, Bands.harmonics(16, power=1.0)).float()
    first, gain = METHODS[name]
    inside, outside = features[train].to(device), features[~train].to(device)
    target, truth = y[train].float().to(device), y[~train].float().to(device)
    weights = parameters(features.shape[1], width, gain, device)
    scale = stride * PAPER_WIDTH / width
    step = stepper(
        weights, lambda: 0.5 * (predict(weights, inside, first) - target).square().sum(), device, scale
    )
    errors, done = [], 0
    for mark in marks:
        for _ in range((mark - done) // stride):
            step()
        done = mark
        with torch.no_grad():
            error = (predict(weights, outside, first) - truth).square().mean(1)
        errors.append(error.nan_to_num(math.inf, math.inf).reshape(len(RATES), SEEDS).tolist())
    return [[errors[m][r] for m in range(len(marks))] for r in range(len(RATES))]


def headline(found: dict[str, list[list[list[float]]]], marks: tuple[int, ...]) -> list[Headline]:
    """Test error of each method at its better rate and at the paper's, by number of steps."""
    rows = []
    for name, by_rate in found.items():
        for index, mark in enumerate(marks):
            for rate, by_mark in zip(RATES, by_rate, strict=True):
                values = by_mark[index]
                if not all(map(math.isfinite, values)):
                    continue
                what = f"test error, {mark:,} steps, rate {rate:g}: {name}"
                rows.append(
                    Headline(what, statistics.mean(values), "MSE", min(values), max(values),
                             note=f"{SEEDS} seeds, lowest to highest")
                )  # fmt: skip
    return rows


def arm(name: str, rate: float, mark: int) -> str:
    """Key of the samples."""
    return f"{name}, rate {rate:g}, {mark} steps (MSE)"


def finished(result: Path, marks: tuple[int, ...], width: int, stride: int) -> dict[str, Any]:
    """Methods that a stored result of the same study holds."""
    stored = json.loads(result.read_text()) if result.exists() else {}
    if (stored.get("width"), stored.get("stride"), stored.get("steps")) != (width, stride, list(marks)):
        return {}
    samples = stored["samples"]
    return {
        name: [[samples[arm(name, rate, mark)] for mark in marks] for rate in RATES]
        for name in METHODS
        if all(len(samples.get(arm(name, rate, mark), [])) == SEEDS for rate in RATES for mark in marks)
    }


def draw(result: Path, path: Path) -> None:
    """Test error of every seed by method, at both numbers of steps and the paper's rate."""
    import matplotlib.pyplot as plt

    samples = json.loads(result.read_text())["samples"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="tight")
    names = [name for name in METHODS if arm(name, RATES[0], MARKS[0]) in samples]
    for mark, colour in zip(MARKS, ("tab:orange", "tab:blue"), strict=True):
        for row, name in enumerate(names):
            values = samples[arm(name, RATES[0], mark)]
            label = f"{mark:,} steps" if row == 0 else None
            axes.plot(values, [row] * len(values), "o", c=colour, ms=4, alpha=0.6, label=label)
            axes.plot(statistics.mean(values), row, "|", c=colour, ms=14)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean squared test error (one dot a seed, a line their mean)")
    axes.grid(lw=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=900, help="seconds, after which no method is started")
    parser.add_argument("--quick", action="store_true", help="4 and 8 steps")
    parser.add_argument("--width", type=int, default=PAPER_WIDTH, help="units of the hidden layers")
    parser.add_argument("--stride", type=int, default=1, help="as many of the paper's steps in one")
    parser.add_argument("--draw", type=Path, help="draw the stored result to this file and stop")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.out / "spe_layers_signal.json", arguments.draw)
        return
    width, stride = arguments.width, arguments.stride
    marks = (4 * stride, 8 * stride) if arguments.quick else MARKS
    start = time.time()
    found = finished(arguments.out / "spe_layers_signal.json", marks, width, stride)
    for name in [name for name in METHODS if name not in found]:
        if time.time() > start + arguments.budget:
            print("no time for", name)
            continue
        found[name] = fit(name, marks, arguments.device, width=width, stride=stride)
        samples: dict[str, Any] = {
            arm(method, rate, mark): [v for v in values if math.isfinite(v)]
            for method, by_rate in found.items()
            for rate, by_mark in zip(RATES, by_rate, strict=True)
            for mark, values in zip(marks, by_mark, strict=True)
        }
        write_result(
            "spe_layers_signal",
            question="In the paper's 1-D study with trained networks, does SPE need half of the steps?",
            headline=headline(found, marks),
            samples=samples,
            folder=arguments.out,
            learning_rates=list(RATES),
            seeds=SEEDS,
            steps=list(marks),
            width=width,
            stride=stride,
        )
    for row in headline(found, marks):
        print(f"{row.what:64s} {row.value:.3e} ({row.low:.3e} to {row.high:.3e})")


if __name__ == "__main__":
    main()

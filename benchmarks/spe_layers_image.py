"""Images: does SPE with automatic bands match the best of every peer's grid?

    python benchmarks/spe_layers_image.py --device cuda
    python benchmarks/spe_layers_image.py --quick            a small grid on a CPU

Half of the pixels (checkerboard) of 48 x 48 grey pictures of scikit-image train, the other half test. The
network has a first layer of 64 units, then two ReLU layers of 64; Adam, the same learning rates for EVERY
method. A method's figure is that of its best learning rate by mean TEST PSNR: an oracle choice that favours
peers with more variants. Seeds, learning rates and, for what does not depend on it, pictures train at once
as one batch. ``--save-data FILE`` and
``--data FILE`` carry the pictures to a machine without scikit-image.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from benchmarks.common import RESULTS, Headline, write_result
from spe_layers import (
    Bands,
    build_first_layer,
    closed_form_ntk,
    eager,
    encoding,
    leave_one_out,
    positional_encoding,
    select_bands,
)
from spe_layers.signals import image_halves

WIDTH, SIZE = 64, 48
Build = Callable[[], nn.Module]


def layer_of(name: str, bands: int | Bands = 8, **options: Any) -> Build:
    if name == "spe":
        options["backend"] = "eager"  # the fused kernels have no rule for vmap
    return partial(build_first_layer, name, 2, WIDTH, bands, **options)


def peers_of_goals(*, quick: bool) -> dict[str, Build]:
    """First layers that the goals speak of, whatever the picture."""
    named = {f"PE L={n}": layer_of("relu", n) for n in ((3, 4, 5, 8) if quick else range(3, 11))}
    for bands in (4, 5) if quick else (3, 4, 5, 8):
        named[f"identity L={bands}"] = layer_of("identity", bands)
        named[f"SPE L={bands}"] = layer_of("spe", bands)
    for sigma in (0.5, 1.0, 3.0) if quick else (0.25, 0.5, 1.0, 2.0, 3.0, 5.0):
        named[f"RFF sigma={sigma:g}"] = layer_of("rff", sigma=sigma)
    for decay in (0.0, 1.0):
        bands8 = Bands.octaves(8, scale=torch.pi, decay=decay)
        named[f"SPE calibrated L=8 decay={decay:g}"] = layer_of("spe", bands8, init="calibrated")
    return named


def other_peers(*, quick: bool) -> dict[str, Build]:
    """The rest of the grid."""
    named = {
        f"SIREN omega={w:g}": layer_of("siren", omega_0=w)
        for w in ((10.0,) if quick else (5.0, 10.0, 20.0, 30.0))
    }
    if quick:
        return named
    named |= {
        "PE He L=4": layer_of("relu_he", 4),
        "tiled L=4": layer_of("tiled", 4),
        "WIRE": layer_of("wire"),
    }
    named |= {f"LFF gamma={gamma:g}": layer_of("lff", gamma=gamma) for gamma in (0.1, 0.3)}
    named |= {f"FINER k={k:g}": layer_of("finer", omega_0=5.0, bias_scale=k) for k in (1.0, 5.0)}
    named |= {f"hash finest={n}": layer_of("hash", levels=5, log2_size=8, finest=n) for n in (16, 32)}
    return named | {f"Gaussian sigma={sigma:g}": layer_of("gauss", sigma=sigma) for sigma in (0.1, 0.3)}


def automatic(x: Tensor, y: Tensor) -> tuple[dict[str, Build], dict[str, Any]]:
    """Layers of automatic bands for one picture, and what the automatic choice chose and cost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spacing = select_bands(x)
    start = time.perf_counter()
    chosen = select_bands(x, y)
    seconds = time.perf_counter() - start
    named = {
        "SPE auto (spacing)": layer_of("spe", spacing, init="calibrated"),
        "SPE auto (targets)": layer_of("spe", chosen, init="calibrated"),
        # Which part of the automatic choice is the bands, which the sine, which the scale of the phases.
        "PE, auto bands": layer_of("relu", chosen),
        "identity, auto bands": layer_of("identity", chosen),
    }
    for std in (1.4, 2.0):
        named[f"SPE auto (targets), phase std {std:g}"] = layer_of(
            "spe", chosen, init="calibrated", phase_std=std
        )
    choice = {
        "bands": chosen.num_bands,
        "amplitudes": chosen.amplitudes,
        "max_frequency": chosen.max_frequency,
        "spacing_bands": spacing.num_bands,
        "seconds": seconds,
        "leave_one_out_by_phase_std": {std: phase_error(x, y, chosen, std) for std in (0.5, 1.0, 1.4, 2.0)},
    }
    return named, choice


def phase_error(x: Tensor, y: Tensor, bands: Bands, phase_std: float) -> float:
    """Leave-one-out error of the kernel of SPE and one ReLU layer at this standard deviation of phases."""
    features = positional_encoding(x.double(), bands)
    gain = phase_std**2 * features.shape[1] / float(features.square().sum(1).mean())
    kernel, _ = closed_form_ntk(features, features, ("sine", "relu"), width=1024, first_gain=gain)
    return leave_one_out(kernel, y.double())


def train(
    build: Build, data: list[Tensor], *, rates: tuple[float, ...], seeds: int, steps: int
) -> dict[str, Any]:
    """Test PSNR [learning rate][seed] of one method; a list of them where the values are those of several
    pictures, [picture, point]. All of them step together.
    """
    x, y, x_test, y_test = data
    pictures = len(y) if y.dim() == 2 else 1
    if y.dim() == 2:
        y, y_test = (values.repeat_interleave(len(rates) * seeds, 0) for values in (y, y_test))
    models = [
        network(build, seed).to(x.device) for _ in range(pictures) for _ in rates for seed in range(seeds)
    ]
    parameters, buffers = stack_module_state(models)
    template = copy.deepcopy(models[0])

    def one(p: dict[str, Tensor], b: dict[str, Tensor], points: Tensor) -> Tensor:
        return functional_call(template, (p, b), (points,)).squeeze(-1)

    predict = vmap(one, (0, 0, None))
    # Adam's step is linear in the rate, so each model's is scaled to its own.
    values = list(parameters.values())
    each = torch.tensor(rates, device=x.device).repeat_interleave(seeds).repeat(pictures)
    scales = [each.reshape(-1, *[1] * (p.dim() - 1)) for p in values]
    first, second = ([torch.zeros_like(p) for p in values] for _ in range(2))
    count = torch.zeros((), device=x.device)

    def step() -> None:
        loss = (predict(parameters, buffers, x) - y).square().mean(1).sum()
        grads = torch.autograd.grad(loss, values)
        with torch.no_grad():
            count.add_(1)
            torch._foreach_lerp_(first, grads, 0.1)
            torch._foreach_lerp_(second, torch._foreach_mul(grads, grads), 0.001)
            slope = torch._foreach_add(
                torch._foreach_sqrt(torch._foreach_div(second, 1 - 0.999**count)), 1e-8
            )
            update = torch._foreach_div(torch._foreach_div(first, 1 - 0.9**count), slope)
            torch._foreach_sub_(values, torch._foreach_mul(update, scales))

    repeat(step, steps, x.device)
    with torch.no_grad():
        # Pictures span 2, so the peak's square is 4.
        error = (predict(parameters, buffers, x_test) - y_test).square().mean(1) / 4
    psnr = (-10 * error.log10()).reshape(pictures, len(rates), seeds).tolist()
    return {
        "psnr": psnr if data[1].dim() == 2 else psnr[0],
        "parameters": sum(p.numel() for p in models[0].parameters()),
    }


def repeat(step: Callable[[], None], times: int, device: torch.device) -> None:
    """Call ``step`` so often; on a GPU as a graph, since it is many small launches."""
    if device.type == "cpu" or times < 4:
        for _ in range(times):
            step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(times - 3):
        graph.replay()


def encode_once() -> None:
    """Keep the encoding of each set of coordinates: they never change, and a graph may not make constants."""
    original = encoding.positional_encoding
    kept: dict[Any, tuple[Tensor, Tensor]] = {}  # with the coordinates, so that their address stays theirs

    def remembered(x: Tensor, bands: Bands, *, covariance: Any = None, mask: Any = None) -> Tensor:
        key = x.data_ptr(), tuple(x.shape), bands
        if key not in kept:
            kept[key] = x, original(x, bands, covariance=covariance, mask=mask)
        return kept[key][1]

    encoding.positional_encoding = eager.positional_encoding = remembered


def network(build: Build, seed: int) -> nn.Module:
    """The first layer, two hidden layers, one output."""
    torch.manual_seed(seed)
    hidden = [m for _ in range(2) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(build(), *hidden, nn.Linear(WIDTH, 1))


def family(name: str) -> str:
    """The method without its setting."""
    return (
        name
        if "auto" in name or "calibrated" in name
        else name.split(" L=", maxsplit=1)[0].split(" ", maxsplit=1)[0]
    )


def headline(found: dict[str, dict[str, Any]], seeds: int) -> list[Headline]:
    """Best of each family's grid a picture, and the goals."""
    rows: list[Headline] = []
    reached = 0
    means: dict[str, list[float]] = {}
    for image, results in found.items():
        best = {name: max(map(statistics.mean, r["psnr"])) for name, r in results.items()}
        grid = {f: max(v for n, v in best.items() if family(n) == f) for f in {family(n) for n in best}}
        for name, value in grid.items():
            means.setdefault(name, []).append(value)
        auto = grid["SPE auto (targets)"]
        reached += auto >= grid["PE"] - 0.2 and auto >= grid["RFF"] - 0.5
        rows.append(spread_row(f"{image}: SPE auto (targets)", results["SPE auto (targets)"], seeds))
        decayed = best["SPE calibrated L=8 decay=1"] - best["SPE calibrated L=8 decay=0"]
        comparisons = [
            ("auto (targets) - best PE of the grid", auto - grid["PE"], ">= -0.2"),
            ("auto (targets) - best RFF of the grid", auto - grid["RFF"], ">= -0.5"),
            ("auto (spacing) - best PE of the grid", grid["SPE auto (spacing)"] - grid["PE"], ">= -2"),
            ("best identity control - best SPE of fixed L", grid["identity"] - grid["SPE"], ""),
            ("SPE of 8 octaves: decay 1 - decay 0", decayed, ">= 3"),
        ]
        rows += [Headline(f"{image}: {what}", value, "dB", target=goal) for what, value, goal in comparisons]
    rows.insert(0, Headline("pictures on which auto (targets) meets both goals", reached, f"of {len(found)}"))
    for name, values in sorted(means.items(), key=lambda item: -statistics.mean(item[1])):
        rows.append(Headline(f"mean over pictures, best setting of {name}", statistics.mean(values), "dB"))
    return rows


def spread_row(what: str, result: dict[str, Any], seeds: int) -> Headline:
    best = max(result["psnr"], key=statistics.mean)
    return Headline(
        what, statistics.mean(best), "dB", min(best), max(best), note=f"{seeds} seeds, lowest to highest"
    )


def pictures(names: list[str], file: Path | None) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Coordinates, values and training mask a picture."""
    if file is not None:
        return torch.load(file, weights_only=True)
    return {name: image_halves(name, SIZE) for name in names}


PHASE_STDS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)


def phase_scales(data: dict[str, tuple[Tensor, Tensor, Tensor]], out: Path, device: str) -> None:
    """SPE with automatic bands at other scales of the phases: does 1 radian serve?"""
    rates, seeds, steps = (3e-3, 1e-2), 3, 300
    means: dict[float, list[float]] = {std: [] for std in PHASE_STDS}
    samples: dict[str, list[float]] = {}
    for image, (x, y, mask) in data.items():
        halves = [t.to(device) for t in (x[mask], y[mask], x[~mask], y[~mask])]
        bands = select_bands(*halves[:2])
        for std in PHASE_STDS:
            build = partial(
                build_first_layer, "spe", 2, WIDTH, bands, init="calibrated", phase_std=std, backend="eager"
            )
            psnr = train(build, halves, rates=rates, seeds=seeds, steps=steps)["psnr"]
            means[std].append(max(map(statistics.mean, psnr)))
            samples[f"{image} phase std {std:g} (dB)"] = list(chain(*psnr))
        print(image, {std: round(values[-1], 2) for std, values in means.items()}, flush=True)
        gaps = {std: [a - b for a, b in zip(v, means[1.0], strict=True)] for std, v in means.items()}
        write_result(
            "spe_layers_phase_std",
            question="At which standard deviation of the phases does SPE with automatic bands do best?",
            headline=[
                Headline(f"phase std {std:g} - phase std 1", statistics.mean(v), "dB", min(v), max(v),
                         note=f"{len(v)} pictures, lowest to highest")
                for std, v in gaps.items()
            ],
            samples=samples, folder=out, learning_rates=list(rates), seeds=seeds, steps=steps,
            pictures=list(data)[: len(means[1.0])],
        )  # fmt: skip


def draw(result: Path, path: Path) -> None:
    """Best setting of each family against the best fixed encoding, by picture."""
    import matplotlib.pyplot as plt

    content = json.loads(result.read_text())
    seeds, rates = content["seeds"], len(content["learning_rates"])
    best: dict[str, dict[str, float]] = {}
    for key, values in content["samples"].items():
        image, name = key.removesuffix(" (dB)").split(" ", 1)
        mean = max(statistics.mean(values[r * seeds : (r + 1) * seeds]) for r in range(rates))
        table = best.setdefault(image, {})
        table[family(name)] = max(mean, table.get(family(name), -math.inf))
    names = sorted(
        {n for table in best.values() for n in table} - {"PE"},
        key=lambda n: statistics.mean(table[n] - table["PE"] for table in best.values()),
    )
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(names) + 1.2), layout="tight")
    for image, table in best.items():
        axes.plot([max(table[n] - table["PE"], -6) for n in names], range(len(names)), "o", label=image, ms=5)
    axes.axvline(0, c="k", lw=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("SPE") else "normal")
    axes.set_xlabel("dB above the best fixed encoding (PE) of its grid; clipped at -6")
    axes.grid(axis="y", lw=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def compare(data: dict[str, tuple[Tensor, Tensor, Tensor]], out: Path, device: str, *, quick: bool) -> None:
    """Every method on every picture.

    The result is written once all that the goals need is there, and after each further method.
    """
    rates, seeds, steps = ((3e-3,), 3, 300) if quick else ((1e-3, 3e-3, 1e-2), 5, 600)
    encode_once()
    halves, start = {}, time.perf_counter()
    x, _, mask = next(iter(data.values()))
    points = [x[mask].to(device), x[~mask].to(device)]
    for image, (others, y, other_mask) in data.items():
        if not (torch.equal(others, x) and torch.equal(other_mask, mask)):
            raise ValueError(f"picture {image} has other coordinates than the first; all train as one batch")
        halves[image] = y[mask].to(device), y[~mask].to(device)
    found: dict[str, dict[str, Any]] = {image: {} for image in data}
    choices: dict[str, Any] = {}

    def save() -> None:
        write_result(
            "spe_layers_image_quick" if quick else "spe_layers_image",
            question="Does SPE with automatic bands match the best of every peer's grid on images?",
            headline=headline(found, seeds),
            samples={
                f"{picture} {name} (dB)": list(chain(*result["psnr"]))
                for picture, results in found.items()
                for name, result in results.items()
            },
            folder=out,
            learning_rates=list(rates),
            seeds=seeds,
            steps=steps,
            parameters={name: result["parameters"] for name, result in found[next(iter(data))].items()},
            chosen_bands=choices,
        )

    for image, (y, y_test) in halves.items():
        named, choices[image] = automatic(points[0], y)
        values = [points[0], y, points[1], y_test]
        for name, build in named.items():
            found[image][name] = train(build, values, rates=rates, seeds=seeds, steps=steps)
        print(f"{image}: {time.perf_counter() - start:.0f} s, chose {choices[image]}", flush=True)
    together = [points[0], torch.stack([y for y, _ in halves.values()]),
                points[1], torch.stack([y for _, y in halves.values()])]  # fmt: skip
    needed = peers_of_goals(quick=quick)
    for name, build in (needed | other_peers(quick=quick)).items():
        result = train(build, together, rates=rates, seeds=seeds, steps=steps)
        for image, psnr in zip(found, result["psnr"], strict=True):
            found[image][name] = {"psnr": psnr, "parameters": result["parameters"]}
        print(f"{time.perf_counter() - start:.0f} s {name}", flush=True)
        if needed.keys() <= found[image].keys():
            save()
    for row in headline(found, seeds):
        print(f"{row.what:70s} {row.value:8.3f} {row.unit} {row.target}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="few methods, one learning rate, 3 seeds, 300 steps"
    )
    parser.add_argument("--images", nargs="+", default=["camera", "astronaut", "brick", "text", "coffee"])
    parser.add_argument("--data", type=Path, help="pictures written by --save-data")
    parser.add_argument("--save-data", type=Path, help="write the pictures and stop")
    parser.add_argument("--phase-std", action="store_true", help="only SPE, at several scales of its phases")
    parser.add_argument("--draw", type=Path, help="draw the stored result to this file and stop")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.out / "spe_layers_image.json", arguments.draw)
        return
    data = pictures(arguments.images, arguments.data)
    if arguments.save_data:
        torch.save(data, arguments.save_data)
        return
    if arguments.phase_std:
        phase_scales(data, arguments.out, arguments.device)
        return
    compare(data, arguments.out, arguments.device, quick=arguments.quick)


if __name__ == "__main__":
    main()

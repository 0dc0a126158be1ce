"""Exact sigma of splats on a CPU beside trials: time, noise of trials, and evaluations of the ratio search.

python benchmarks/nerfstudio_phdropout_splat.py [--out DIR]
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from nerfstudio_phdropout import (  # noqa: E402
    drop_uniforms,
    max_dropout_ratio,
    monte_carlo_moments,
    rasterization,
    rasterization_moments,
)
from nerfstudio_phdropout.tiles import iterate_tiles, tile_alphas  # noqa: E402

RATIO, COUNT, SIZE = 0.05, 1500, 32


def scene() -> dict[str, Any]:
    """1500 Gaussians seen by one 32x32 camera."""
    generator = torch.Generator().manual_seed(0)
    view = torch.eye(4)[None]
    view[0, 2, 3] = 3.2
    return {
        "means": torch.randn(COUNT, 3, generator=generator) * 0.55,
        "quats": torch.randn(COUNT, 4, generator=generator),
        "scales": 0.05 * torch.exp(0.6 * torch.randn(COUNT, 3, generator=generator)),
        "opacities": torch.sigmoid(1.5 * torch.randn(COUNT, generator=generator)),
        "colors": torch.rand(COUNT, 3, generator=generator),
        "viewmats": view,
        "Ks": torch.tensor([[[35.0, 0, SIZE / 2], [0, 35.0, SIZE / 2], [0, 0, 1.0]]]),
        "width": SIZE,
        "height": SIZE,
    }


def masked(values: dict[str, Any], trial: int) -> Tensor:
    """One trial, all of it rendered again."""
    kept = drop_uniforms(COUNT, seed=0, trial=trial) >= RATIO
    return rasterization(**{**values, "opacities": values["opacities"] * kept})[0]


def by_png(values: dict[str, Any], trial: int) -> Tensor:
    """One trial written as PNG and read back, as the authors' code does."""
    pixels = (masked(values, trial)[0].clamp(0, 1) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).float()[None] / 255


class SharedGeometry:
    """Trials that project once and keep the opacity of every splat at every pixel: the best a loop can do."""

    def __init__(self, values: dict[str, Any]) -> None:
        _, _, info = rasterization(**values)
        flat = (info["means2d"][0], info["conics"][0], info["opacities"][0])
        self.tiles = []
        for tile in iterate_tiles(info["isect_offsets"], info["flatten_ids"].numel(), SIZE, SIZE, 16):
            ids = info["flatten_ids"][tile.start : tile.stop].long()
            self.tiles.append((ids, tile_alphas(tile, *(part[ids] for part in flat)), values["colors"][ids]))

    def render(self, trial: int) -> Tensor:
        """Pixels of all tiles, one tile after the other, ``[H * W, 3]``."""
        kept = (drop_uniforms(COUNT, seed=0, trial=trial) >= RATIO).float()
        parts = []
        for ids, alphas, colors in self.tiles:
            a = alphas * kept[ids]
            through = torch.cumprod(1 - a, dim=-1)
            front = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
            parts.append((a * front) @ colors)
        return torch.cat(parts)


def search_calls() -> dict[str, dict[str, int]]:
    """Quality calls of both searches on curves that fail at a known ratio."""
    calls: dict[str, dict[str, int]] = {}
    for limit in (0.03, 0.1, 0.2, 0.4, 0.6, 0.9):
        found = {
            method: max_dropout_ratio(lambda r, limit=limit: 1 - 0.05 * (r / limit) ** 2, method=method)
            for method in ("bisection", "linear")
        }
        assert found["bisection"].ratio == found["linear"].ratio
        calls[str(found["linear"].ratio)] = {name: len(result.evaluations) for name, result in found.items()}
    return calls


@torch.no_grad()
def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    values = scene()
    shared = SharedGeometry(values)
    samples = interleaved(
        {
            "plain rendering": lambda: rasterization(**values),
            "exact": lambda: rasterization_moments(**values, dropout_ratio=RATIO),
            "100 trials": lambda: monte_carlo_moments(lambda trial: masked(values, trial), 100),
            "100 trials by PNG files": lambda: monte_carlo_moments(lambda trial: by_png(values, trial), 100),
            "100 trials, shared geometry": lambda: monte_carlo_moments(shared.render, 100),
        },
        repeats=options.repeats,
    )
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()}
    exact64 = rasterization_moments(**double, dropout_ratio=RATIO)[0].std
    single = rasterization_moments(**values, dropout_ratio=RATIO)[0].std
    shown = exact64 > 1e-4
    errors = {"exact in float32": float(((single - exact64).abs() / exact64)[shown].mean())}
    for name, trial, number in (
        ("10 trials", masked, 10), ("30 trials", masked, 30), ("100 trials", masked, 100),
        ("100 trials by PNG files", by_png, 100), ("1000 trials", masked, 1000),
    ):  # fmt: skip
        sampled = monte_carlo_moments(lambda index, trial=trial: trial(values, index), number).std
        errors[name] = float(((sampled - exact64).abs() / exact64)[shown].mean())
    median = {arm: statistics.median(seconds) for arm, seconds in samples.items()}
    rows = [
        Headline("exact / plain rendering", median["exact"] / median["plain rendering"], "x"),
        *(
            Headline(
                f"{arm} / exact",
                median[arm] / median["exact"],
                "x",
                low=min(a / b for a, b in zip(samples[arm], samples["exact"], strict=True)),
                high=max(a / b for a, b in zip(samples[arm], samples["exact"], strict=True)),
                target=">= 20" if arm == "100 trials" else "",
            )
            for arm in ("100 trials", "100 trials by PNG files", "100 trials, shared geometry")
        ),
        *(Headline(f"mean relative error of sigma, {name}", value, "1") for name, value in errors.items()),
    ]
    calls = search_calls()
    for ratio, call in calls.items():
        what = f"search at ratio {ratio}: linear / bisection calls"
        rows.append(Headline(what, call["linear"] / call["bisection"], "x", note=str(call)))
    write_result(
        "nerfstudio_phdropout_splat",
        question="What do exact moments of splats cost on a CPU beside trials, and how noisy are trials?",
        headline=rows,
        samples=samples,
        folder=options.out,
        search_calls=calls,
    )
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit}")


if __name__ == "__main__":
    main()

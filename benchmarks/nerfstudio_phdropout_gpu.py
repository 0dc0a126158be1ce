"""Exact sigma of Gaussian splats on a GPU: is it right, and what does it cost beside renderings?

    python benchmarks/nerfstudio_phdropout_gpu.py --out DIR [--quick]

Needs CUDA, Triton and gsplat 1.5.3 (which compiles itself for about a minute, once). Every stage rewrites the
result, so a run that is cut off keeps what it has. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
os.environ.setdefault("MAX_JOBS", "16")

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from nerfstudio_phdropout import drop_uniforms, rasterization_moments, rasterize_moments  # noqa: E402
from nerfstudio_phdropout.kernels import rasterize_moments_torch  # noqa: E402
from nerfstudio_phdropout.triton_kernels import LAUNCH, LaunchShape, rasterize_moments_triton  # noqa: E402

RATIO = 0.05
SHAPES = [
    LaunchShape(*shape)
    for shape in (
        (8, 4, 2), (16, 4, 8), (16, 4, 4), (8, 4, 4), (4, 4, 1), (4, 4, 2),
        (4, 8, 1), (4, 2, 1), (2, 4, 1), (8, 2, 4), (8, 1, 4), (4, 1, 2),
    )
]  # fmt: skip


def scene(count: int, width: int, height: int, seed: int = 0) -> dict[str, Any]:
    """Gaussians as trained scenes have them: most small, opacities of all sizes, one camera in front."""
    generator = torch.Generator().manual_seed(seed)
    size = 1.6 * count ** (-1 / 3) * 0.35
    view = torch.eye(4)[None]
    view[0, 2, 3] = 3.2
    focal = 1.1 * min(width, height)
    values = {
        "means": torch.randn(count, 3, generator=generator) * 0.55,
        "quats": torch.randn(count, 4, generator=generator),
        "scales": size * torch.exp(0.6 * torch.randn(count, 3, generator=generator)),
        "opacities": torch.sigmoid(1.5 * torch.randn(count, generator=generator)),
        "colors": torch.rand(count, 3, generator=generator),
        "viewmats": view,
        "Ks": torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]]]),
    }
    return {**{name: value.cuda() for name, value in values.items()}, "width": width, "height": height}


def tile_arguments(scene_values: dict[str, Any], ratio: float | Tensor, covariance: bool) -> tuple[Any, ...]:
    """Arguments of the kernel for a scene, from gsplat's projection and tile lists."""
    _, info = rasterization_moments(**scene_values, dropout_ratio=RATIO)
    images, count = info["opacities"].shape
    colors = scene_values["colors"].expand(images, count, 3).contiguous()
    return (
        info["means2d"], info["conics"], colors, info["opacities"],
        scene_values["width"], scene_values["height"], 16, info["isect_offsets"], info["flatten_ids"],
        ratio, None, covariance,
    )  # fmt: skip


def check_twin() -> dict[str, float]:
    """Largest differences of the Triton kernel from its torch twin."""
    values = scene(20_000, 200, 152, seed=1)
    worst: dict[str, float] = {}
    ratios = torch.rand(20_000, device="cuda") * 0.5
    for ratio in (RATIO, ratios):
        arguments = tile_arguments(values, ratio, True)
        with torch.no_grad():
            ours, twin = rasterize_moments_triton(*arguments), rasterize_moments_torch(*arguments)
        for field in ("mean", "std", "accumulation", "accumulation_std", "covariance"):
            gap = float((getattr(ours, field) - getattr(twin, field)).abs().max())
            worst[field] = max(worst.get(field, 0.0), gap)
    return worst


def check_plain(values: dict[str, Any]) -> dict[str, float]:
    """Ratio 0 against gsplat itself."""
    import gsplat

    image, alphas, _ = gsplat.rasterization(**values, packed=False)
    moments, _ = rasterization_moments(**values, dropout_ratio=0.0)
    return {
        "mean": float((moments.mean - image).abs().max()),
        "accumulation": float((moments.accumulation - alphas[..., 0]).abs().max()),
        "largest_std": float(moments.std.max()),
    }


def masked_render(values: dict[str, Any], trial: int) -> Tensor:
    """One trial: gsplat with the opacities of dropped Gaussians set to 0."""
    import gsplat

    opacities = values["opacities"]
    kept = drop_uniforms(len(opacities), seed=0, trial=trial, device=opacities.device) >= RATIO
    return gsplat.rasterization(**{**values, "opacities": opacities * kept}, packed=False)[0]


def check_trials(values: dict[str, Any], trials: int) -> dict[str, Any]:
    """Exact moments against many gsplat renderings; also the noise of fewer trials."""
    exact, _ = rasterization_moments(**values, dropout_ratio=RATIO)
    variance, mean = exact.variance.double(), exact.mean.double()
    shown = exact.std > 1e-3
    first = second = third = fourth = torch.zeros_like(mean)
    noise = {}
    for trial in range(trials):
        centred = masked_render(values, trial).double() - mean
        first, second = first + centred, second + centred**2
        third, fourth = third + centred**3, fourth + centred**4
        done = trial + 1
        if done in (10, 30, 50, 100, 300, 1000, trials):
            sample = (second - first**2 / done) / (done - 1)
            relative = (sample.clamp(min=0).sqrt() / variance.sqrt() - 1).abs()[shown]
            noise[str(done)] = {"mean": float(relative.mean()), "max": float(relative.max())}
    sample = (second - first**2 / trials) / (trials - 1)
    spread = (fourth / trials - (second / trials) ** 2).clamp(min=0).sqrt() / math.sqrt(trials)
    z_mean = (first / trials / (variance.sqrt() / math.sqrt(trials)).clamp(min=1e-12))[shown]
    z_variance = ((sample - variance) / spread.clamp(min=1e-12))[shown]
    return {
        "trials": trials,
        "values": int(shown.sum()),
        "relative_error_of_trials": noise,
        "sum_of_sampled_variance_over_exact": float(sample[shown].sum() / variance[shown].sum()),
        "mean_z": float(z_mean.mean()),
        "mean_z_rms": float(z_mean.square().mean().sqrt()),
        "variance_z_median": float(z_variance.median()),
        "largest_gap_of_mean": float((first / trials).abs().max()),
    }


def check_masks() -> bool:
    """CPU and CUDA give bitwise equal uniforms."""
    for start, stream in ((0, 0), (2**32 - 500, 7)):
        names = {"seed": 3, "trial": 5, "stream": stream, "start": start}
        if not torch.equal(drop_uniforms(1000, **names), drop_uniforms(1000, device="cuda", **names).cpu()):
            return False
    return True


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory allocated while ``run`` works, above what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def sweep(arguments: tuple[Any, ...], repeats: int) -> tuple[LaunchShape, dict[str, float]]:
    """Median seconds of the kernel alone for every launch shape."""
    seconds: dict[str, float] = {}
    best, best_time = LAUNCH, math.inf
    for shape in SHAPES:
        try:
            samples = interleaved(
                {"kernel": lambda shape=shape: rasterize_moments_triton(*arguments, launch=shape)},
                repeats=repeats,
                warm_up=3,
                synchronize=torch.cuda.synchronize,
            )["kernel"]
        except Exception as error:  # a shape that does not compile must not end the run
            print(shape, repr(error)[:300])
            continue
        name = f"rows {shape.rows} unroll {shape.unroll} warps {shape.warps}"
        seconds[name] = statistics.median(samples)
        print(f"{name}: {1e3 * seconds[name]:.3f} ms", flush=True)
        if seconds[name] < best_time:
            best, best_time = shape, seconds[name]
    return best, seconds


@torch.no_grad()
def measure(
    values: dict[str, Any], best: LaunchShape, repeats: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Interleaved seconds of whole calls and of kernels alone, and peak bytes."""
    import gsplat

    arguments = tile_arguments(values, RATIO, False)
    means2d, conics, colors, opacities, width, height, tile, offsets, ids = arguments[:9]
    uniforms = [drop_uniforms(opacities.shape[1], seed=0, trial=t, device="cuda") for t in range(100)]

    def shared_geometry() -> None:
        for uniform in uniforms:
            masked = opacities * (uniform >= RATIO)
            gsplat.rasterize_to_pixels(means2d, conics, colors, masked, width, height, tile, offsets, ids)

    def trials() -> None:
        for trial in range(100):
            masked_render(values, trial)

    plain = lambda: gsplat.rasterization(**values, packed=False)  # noqa: E731
    exact = lambda: rasterization_moments(**values, dropout_ratio=RATIO)  # noqa: E731
    fast = {
        "plain gsplat": plain,
        "exact": exact,
        "exact with depth and covariance": lambda: rasterization_moments(
            **values, dropout_ratio=RATIO, render_mode="RGB+D"
        ),
        "gsplat pixels only": lambda: gsplat.rasterize_to_pixels(
            means2d, conics, colors, opacities, width, height, tile, offsets, ids
        ),
        "exact pixels only": lambda: rasterize_moments(*arguments[:11], covariance=False),
        "exact pixels only, best shape": lambda: rasterize_moments_triton(*arguments, launch=best),
    }
    slow = {"100 gsplat renderings": trials, "100 gsplat pixel passes, shared geometry": shared_geometry}
    samples = interleaved(fast, repeats=repeats, warm_up=3, synchronize=torch.cuda.synchronize)
    samples |= interleaved(slow, repeats=max(repeats // 10, 3), synchronize=torch.cuda.synchronize)
    return samples, {"plain gsplat": peak_bytes(plain), "exact": peak_bytes(exact)}


def headlines(name: str, samples: dict[str, list[float]], peak: dict[str, int]) -> list[Headline]:
    """Ratios of medians with the span of paired samples."""
    median = {arm: statistics.median(seconds) for arm, seconds in samples.items()}
    pairs = [a / b for a, b in zip(samples["exact"], samples["plain gsplat"], strict=True)]
    return [
        Headline(f"exact mean and sigma, {name}", 1e3 * median["exact"], "ms", target="<= 2.1 ms (100k)"),
        Headline(
            f"exact / one gsplat rendering, {name}",
            median["exact"] / median["plain gsplat"],
            "x",
            low=min(pairs),
            high=max(pairs),
            target="<= 3",
        ),
        Headline(
            f"100 gsplat renderings / exact, {name}",
            median["100 gsplat renderings"] / median["exact"],
            "x",
            target=">= 30",
        ),
        Headline(
            f"100 gsplat pixel passes with shared geometry / exact, {name}",
            median["100 gsplat pixel passes, shared geometry"] / median["exact"],
            "x",
        ),
        Headline(
            f"peak memory exact / one rendering, {name}",
            peak["exact"] / peak["plain gsplat"],
            "x",
            target="<= 2",
        ),
    ]


def main() -> int:
    """Run the stages; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and trials")
    options = parser.parse_args()
    repeats, trials = (10, 300) if options.quick else (40, 2000)
    more: dict[str, Any] = {"ratio": RATIO}
    samples: dict[str, list[float]] = {}
    rows: list[Headline] = []

    def save() -> None:
        write_result(
            "nerfstudio_phdropout_gpu",
            question="Is the one-pass sigma of Gaussian splats right on a GPU, and what does it cost?",
            headline=rows,
            samples=samples,
            folder=options.out,
            **more,
        )

    start = time.time()
    small = scene(100_000, 800, 800)
    more["ratio_0_against_gsplat"] = check_plain(small)
    print(f"first call, with compilation: {time.time() - start:.0f} s", flush=True)
    more["masks_equal_on_cpu_and_cuda"] = check_masks()
    more["triton_against_torch"] = check_twin()
    print(more, flush=True)
    save()
    more["against_trials"] = check_trials(small, trials)
    print(more["against_trials"], f"{time.time() - start:.0f} s", flush=True)
    save()
    best, more["launch_shapes_seconds"] = sweep(tile_arguments(small, RATIO, False), repeats=10)
    more["best_launch_shape"] = vars(best) if not hasattr(best, "__slots__") else repr(best)
    save()
    for name, values in (
        ("100k at 800x800", small),
        ("1M at 1920x1080", scene(1_000_000, 1920, 1080, seed=2)),
    ):
        measured, peak = measure(values, best, repeats)
        samples.update({f"{arm}, {name}": seconds for arm, seconds in measured.items()})
        rows += headlines(name, measured, peak)
        more[f"peak_bytes, {name}"] = peak
        more[f"tile_entries, {name}"] = int(tile_arguments(values, RATIO, False)[8].numel())
        for row in rows[-5:]:
            print(f"{row.what}: {row.value:.3f} {row.unit}", flush=True)
        save()
    twin = more["triton_against_torch"]
    ok = (
        more["masks_equal_on_cpu_and_cuda"]
        and more["ratio_0_against_gsplat"]["mean"] < 1e-3
        and more["ratio_0_against_gsplat"]["largest_std"] == 0
        and max(twin["mean"], twin["std"]) < 1e-4
        and abs(more["against_trials"]["sum_of_sampled_variance_over_exact"] - 1) < 0.02
    )
    print(f"checks {'passed' if ok else 'FAILED'}; {time.time() - start:.0f} s in all", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

"""Are the fused kernels right on a GPU, and how fast are they?

    python benchmarks/spe_layers_gpu.py --out DIR        (not installed: PYTHONPATH=plugins:. before it)

Needs torch and Triton only. Checks kernel against twin first (dtypes, shapes, scales, gradients, second
derivatives, compile), then tries tiles, then times forward and forward + backward of 2^20 points, 3 -> 256
with 10 bands, against the reference's loop, the vectorised twin and torch.compile of both: interleaved, each
sample the mean of four calls in a row, raw samples kept. Writes spe_layers_gpu.json after every stage; takes
about two minutes on an H100.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import RESULTS, Headline, write_result
from spe_layers import SPE, Bands, positional_encoding, spe, spe_linear_relu
from spe_layers import kernels as K
from spe_layers.tiles import TILES, Tiles

POINTS, DIMS, UNITS, BANDS = 2**20, 3, 256, 10
DEVICE = "cuda"
HALF_TYPES = (torch.bfloat16, torch.float16)
# What is timed, against whom, and by how much the fused layer should be faster.
GOALS = [
    ("forward", "reference loop", "3"),
    ("forward", "vectorised", ""),
    ("forward", "compile(reference loop)", ""),
    ("forward", "compile(vectorised)", "1.4"),
    ("forward+backward", "reference loop", "2"),
    ("forward+backward", "vectorised", "2"),
    ("forward+backward", "compile(vectorised)", ""),
    ("forward+backward+dx", "reference loop", "2"),
    ("forward+backward+dx", "vectorised", "2"),
    ("forward+backward+dx", "compile(vectorised)", ""),
]

CANDIDATES = {
    ("forward", 3): [
        Tiles(64, 128, 4, 3, 168), Tiles(64, 128, 4, 2), Tiles(64, 256, 8, 1), Tiles(64, 64, 4, 3),
        Tiles(64, 128, 8, 2, 128), Tiles(128, 128, 8, 1), Tiles(32, 128, 8, 2),
    ],
    ("forward", 1): [
        Tiles(64, 128, 4, 4, 128), Tiles(64, 128, 4, 3, 168), Tiles(64, 256, 8, 1), Tiles(64, 64, 4, 4),
        Tiles(64, 128, 8, 2, 128), Tiles(32, 128, 4, 4), Tiles(32, 128, 8, 3),
    ],
    ("weight_grad", 3): [
        Tiles(64, 128, 8, 1), Tiles(64, 256, 8, 1), Tiles(32, 128, 4, 2), Tiles(32, 128, 8, 2),
        Tiles(32, 256, 8, 1), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3), Tiles(64, 128, 8, 2, 128),
    ],
    ("weight_grad", 1): [
        Tiles(64, 128, 8, 2, 128), Tiles(64, 128, 8, 1), Tiles(64, 256, 8, 1), Tiles(32, 128, 4, 2),
        Tiles(32, 128, 8, 2), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 4),
    ],
    ("coordinate_grad", 3): [Tiles(64, 64, 4), Tiles(128, 64, 8), Tiles(64, 32, 4), Tiles(128, 128, 8)],
    ("coordinate_grad", 1): [
        Tiles(64, 64, 4), Tiles(64, 64, 4, registers=168), Tiles(128, 64, 8), Tiles(64, 32, 4),
    ],
}  # fmt: skip
# Timed modes: products a float is made of, and the dtype of outputs and their gradients.
MODES = {"float32": (3, torch.float32), "bfloat16": (1, torch.bfloat16), "tf32": (1, torch.float32)}
CALLS = 4  # in a row for one sample, so that launches overlap the device's work, as in training
SMALL = 2**16
TIMED = (
    "float32 uniform init",
    "float32 2^20",
    "autocast torch.bfloat16",
    "feature error",
)  # checks made first


def reference_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The encoding as a Python loop over bands, as in NeRF code everywhere; then Linear; then sine."""
    features = [x]
    for band in range(BANDS):
        features += [torch.sin(x * 2.0**band), torch.cos(x * 2.0**band)]
    return torch.sin(F.linear(torch.cat(features, -1), weight, bias))


def check(results: list[dict[str, Any]], name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Record what ``run`` found; a crash is a result too, and the others still run."""
    try:
        found = run()
    except Exception as error:
        found = {"ok": False, "error": "".join(traceback.format_exception_only(error))[-600:]}
    results.append({"check": name, **found})
    print("ok  " if found["ok"] else "FAIL", name, {k: v for k, v in found.items() if k != "ok"}, flush=True)


def layer_outputs(
    layer: SPE, x: torch.Tensor, backend: str, autocast: torch.dtype | None
) -> list[torch.Tensor]:
    layer.backend = backend  # type: ignore[assignment]
    x = x.detach().clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    if y.numel() == 0:
        return [y.detach()]
    generator = torch.Generator(y.device).manual_seed(1)
    grad = torch.randn(y.shape, device=y.device, generator=generator)
    inputs = [x, layer.weight] + ([] if layer.bias is None else [layer.bias])
    return [y.detach(), *torch.autograd.grad((y * grad.to(y.dtype)).sum(), inputs)]


def compare(
    layer: SPE, x: torch.Tensor, tolerance: float, autocast: torch.dtype | None = None
) -> dict[str, Any]:
    """Largest differences from the float64 twin, relative to the largest value (at least 1)."""
    found = layer_outputs(layer, x, "triton", autocast)
    exact = SPE(
        layer.in_features, layer.out_features, layer.bands, bias=layer.bias is not None, dtype=torch.float64
    ).to(x.device)
    exact.load_state_dict(layer.state_dict())
    expected = layer_outputs(exact, x.double(), "eager", None)
    errors = [
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1)) if b.numel() else 0.0
        for a, b in zip(found, expected, strict=True)
    ]
    return {
        "ok": all(error <= tolerance for error in errors),
        "errors_y_dx_dw_db": errors,
        "limit": tolerance,
    }


def correctness(*, timed: bool) -> list[dict[str, Any]]:
    """The checks of the timed layer, or all others; at once where they set nothing global: they compile."""
    results: list[dict[str, Any]] = []
    torch.manual_seed(0)
    waiting: list[tuple[str, Callable[[], dict[str, Any]]]] = []

    def points(n: int, d: int) -> torch.Tensor:
        return torch.rand(n, d, device=DEVICE) * 2 - 1

    shapes = [
        (0, 3, 10, 31),
        (1, 3, 10, 31),
        (63, 3, 10, 31),
        (65, 5, 12, 31),
        (257, 1, 0, 16),
        (1000, 3, 10, 256),
    ]
    for n, d, bands, units in shapes:
        layer = SPE(d, units, bands, device=DEVICE)
        waiting.append(
            (f"float32 N={n} D={d} L={bands} H={units}",
             lambda layer=layer, n=n, d=d: compare(layer, points(n, d), 2e-5))
        )  # fmt: skip
    variants = {
        "pi, 16 octaves, decay": Bands.octaves(16, scale=math.pi, decay=1.0),
        "2 pi, nerfstudio spacing": Bands.spaced(10, 0.0, 8.0, include_input=True),
        "tcnn layout": Bands.octaves(6, scale=math.pi, layout="tcnn"),
        "no input, 64 features": Bands.octaves(8, scale=math.pi, include_input=False),
    }
    for name, variant in variants.items():
        dims = 4 if name.startswith("no input") else 3
        layer = SPE(dims, 64, variant, device=DEVICE)
        waiting.append((f"float32 {name}", lambda layer=layer, d=dims: compare(layer, points(500, d), 2e-5)))
    uniform = SPE(3, 256, BANDS, init="uniform", device=DEVICE)
    plain = SPE(3, 256, BANDS, init="uniform", bias=False, device=DEVICE)
    rounded_layer = SPE(3, 256, BANDS, device=DEVICE, dtype=torch.bfloat16)
    few = SPE(3, 64, 2, device=DEVICE)
    waiting += [
        ("float32 uniform init, no bias", lambda: compare(plain, points(4096, 3), 2e-5)),
        ("float32 2^20 points", lambda: compare(uniform, points(POINTS, 3), 2e-5)),
        ("float32, coordinates of 10^5", lambda: compare_to_float32(few, points(1000, 3) * 1e5)),
        *[(f"autocast {t}", lambda t=t: rounded(uniform, points(4096, 3), t)) for t in HALF_TYPES],
        ("bfloat16 parameters", lambda: rounded(rounded_layer, points(4096, 3), None)),
        ("gradient subsets", lambda: gradient_subsets(points(100, 3))),
        ("second derivatives", lambda: second_derivatives(points(64, 3))),
        ("non-contiguous coordinates", lambda: non_contiguous(SPE(3, 256, BANDS, device=DEVICE))),
        ("feature error at 16 octaves", feature_error),
    ]
    waiting = [item for item in waiting if item[0].startswith(TIMED) == timed]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda item: check(results, *item), waiting))
    if timed:
        return results
    check(results, "bitwise equal gradients, 5 runs", lambda: reproducible(uniform, points(20000, 3)))
    check(results, "compile, one graph", lambda: compiled_once(uniform, points(999, 3)))
    return results


def compare_to_float32(layer: SPE, x: torch.Tensor) -> dict[str, Any]:
    """Where float32 itself has lost digits: no further from float64 than four times the float32 twin is."""
    exact = SPE(layer.in_features, layer.out_features, layer.bands, dtype=torch.float64).to(x.device)
    exact.load_state_dict(layer.state_dict())
    expected = layer_outputs(exact, x.double(), "eager", None)
    errors = {}
    for backend in ("triton", "eager"):
        found = layer_outputs(layer, x, backend, None)
        errors[backend] = [
            float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
        ]
    pairs = zip(errors["triton"], errors["eager"], strict=True)
    return {"ok": all(mine <= 4 * theirs for mine, theirs in pairs), "errors_y_dx_dw_db": errors}


def rounded(layer: SPE, x: torch.Tensor, autocast: torch.dtype | None) -> dict[str, Any]:
    """Root mean square against the same layer in float64: outputs absolute, gradients relative."""
    found = layer_outputs(layer, x, "triton", autocast)
    exact = SPE(3, layer.out_features, layer.bands, dtype=torch.float64).to(x.device)
    exact.load_state_dict(layer.state_dict())
    expected = layer_outputs(exact, x.double(), "eager", None)
    rms = [
        float((a.double() - b).square().mean().sqrt() / (1 if i == 0 else b.square().mean().sqrt()))
        for i, (a, b) in enumerate(zip(found, expected, strict=True))
    ]
    return {
        "ok": rms[0] <= 0.01 and max(rms[1:]) <= 0.05,
        "rms_y_dx_dw_db": rms,
        "dtype": str(found[0].dtype),
    }


def gradient_subsets(x: torch.Tensor) -> dict[str, Any]:
    layer = SPE(3, 40, 5, device=DEVICE)
    tensors, worst = [x, layer.weight.detach(), layer.bias.detach()], 0.0
    for needed in itertools.product([True, False], repeat=3):
        if not any(needed):
            continue
        grads = []
        for backend in ("triton", "eager"):
            inputs = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
            spe(*inputs, 5, backend=backend).square().sum().backward()
            grads.append([t.grad for t in inputs])
        for found, expected in zip(*grads, strict=True):
            if (found is None) != (expected is None):
                return {"ok": False, "needed": needed}
            if expected is not None:
                worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1)))
    return {"ok": worst <= 2e-5, "error": worst}


def second_derivatives(x: torch.Tensor) -> dict[str, Any]:
    layer = SPE(3, 32, 4, device=DEVICE)
    results = []
    for backend in ("triton", "eager"):
        layer.backend = backend  # type: ignore[assignment]
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(point).sum(), point, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), [point, layer.weight]))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    return {"ok": error <= 1e-4, "error": error}


def non_contiguous(layer: SPE) -> dict[str, Any]:
    x = torch.rand(3, 50, 4, device=DEVICE).permute(2, 1, 0)
    layer.backend = "triton"
    found = layer(x)
    layer.backend = "eager"
    error = float((found - layer(x)).detach().abs().max())
    return {"ok": error <= 2e-5, "error": error}


def reproducible(layer: SPE, x: torch.Tensor) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    try:
        runs = [layer_outputs(layer, x, "triton", None) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    return {"ok": all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))}


def compiled_once(layer: SPE, x: torch.Tensor) -> dict[str, Any]:
    layer.backend = "auto"
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    compiled(x).sum().backward()
    error = float((compiled(x) - layer(x)).detach().abs().max())
    return {"ok": error <= 1e-5, "error": error}


def feature_error() -> dict[str, Any]:
    """Scale pi, |x| <= 1: the twin's features, and sin(e) of the kernel with identity weight, to float64."""
    bands = Bands.octaves(16, scale=math.pi)
    x = torch.rand(20000, 3, device=DEVICE) * 2 - 1
    exact = positional_encoding(x.double(), bands)
    twin = float((positional_encoding(x, bands).double() - exact).abs().max())
    identity = torch.eye(bands.num_features(3), device=DEVICE)
    y = K.launch_forward(x, identity, None, bands, torch.float32, terms=3)
    kernel = float((y.double() - exact.sin()).abs().max())
    return {"ok": max(twin, kernel) <= 1e-6, "twin": twin, "kernel": kernel}


def time_ms(run: Callable[[], Any], repeats: int = 1) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def sweep(deadline: float) -> dict[str, Any]:
    """Median milliseconds of each tile choice, all compiled by threads first."""
    x = torch.rand(POINTS, DIMS, device=DEVICE) * 2 - 1
    layer = SPE(DIMS, UNITS, BANDS, init="uniform", device=DEVICE)
    assert layer.bias is not None
    weight, bias, bands = layer.weight.detach(), layer.bias.detach(), layer.bands
    grads = {t: torch.randn(POINTS, UNITS, device=DEVICE, dtype=t) for t in (torch.float32, torch.bfloat16)}
    needs = {"weight_grad": [False, True, True], "coordinate_grad": [True, False, False]}
    runs: dict[str, Callable[[torch.Tensor], Any]] = {}

    def run(kind: str, terms: int, tiles: Tiles, p: torch.Tensor) -> None:
        dtype = torch.float32 if terms == 3 else torch.bfloat16
        if kind == "forward":
            K.launch_forward(p, weight, bias, bands, dtype, tiles=tiles, terms=terms)
        else:
            grad = grads[dtype][: len(p)]
            K.launch_backward(grad, p, weight, bias, bands, needs[kind], tiles=tiles, terms=terms)

    for (kind, terms), choices in CANDIDATES.items():
        for tiles in choices:
            runs[f"{kind} {terms} {astuple(tiles)}"] = partial(run, kind, terms, tiles)
    few, failed = x[:256], {}

    def build(name: str) -> None:
        if time.time() > deadline:
            failed[name] = "not compiled: out of time"
            return
        try:
            runs[name](few)
            torch.cuda.synchronize()
        except Exception as error:
            failed[name] = str(error)[-200:]

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(build, runs))
    samples: dict[str, list[float]] = {name: [] for name in runs if name not in failed}
    for _ in range(6):
        for name, values in samples.items():
            values.append(time_ms(partial(runs[name], x), CALLS))
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    for name, value in sorted(medians.items(), key=lambda item: (item[0].split(" (")[0], item[1])):
        print(f"{value:8.3f} ms  {name}", flush=True)
    if failed:
        print("failed:", failed, flush=True)
    return {"median_ms": medians, "failed": failed, "samples_ms": samples}


def use_best(medians: dict[str, float]) -> dict[str, str]:
    """Set the kernels' tiles to the fastest of the sweep, for the measurements after it."""
    chosen = {}
    for kind, terms in CANDIDATES:
        found = {n: v for n, v in medians.items() if n.startswith(f"{kind} {terms} (")}
        if found:
            best = min(found, key=found.__getitem__)
            values = best.split(" ", 2)[2]
            TILES[kind, terms] = Tiles(*ast.literal_eval(values))
            chosen[f"{kind} {terms}"] = values
    print("tiles", chosen, flush=True)
    return chosen


def speed(mode: str, deadline: float, rounds: int, points: int) -> dict[str, Any]:
    """Forward, forward + backward (parameters), forward + backward with dx; every method in every round."""
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    autocast = MODES[mode][1] == torch.bfloat16
    layer = SPE(DIMS, UNITS, BANDS, init="uniform", device=DEVICE)
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    x = torch.rand(points, DIMS, device=DEVICE) * 2 - 1
    x_grad = x.clone().requires_grad_()
    grad = torch.randn(points, UNITS, device=DEVICE, dtype=MODES[mode][1])

    def twin(p: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.sin(F.linear(positional_encoding(p, BANDS), w, b))

    methods: dict[str, Callable[..., torch.Tensor]] = {
        "reference loop": reference_layer,
        "vectorised": twin,
        "compile(reference loop)": torch.compile(reference_layer),
        "compile(vectorised)": torch.compile(twin),
        "fused": lambda p, w, b: spe(p, w, b, BANDS, backend="triton"),
    }

    def call(method: Callable[..., torch.Tensor], kind: str) -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            if kind == "forward":
                with torch.no_grad():
                    method(x, weight, bias)
                return
            point = x_grad if kind.endswith("dx") else x
            y = method(point, weight, bias)
        torch.autograd.grad(y, [weight, bias] + ([point] if kind.endswith("dx") else []), grad)

    kinds = ["forward", "forward+backward", "forward+backward+dx"]
    samples: dict[str, dict[str, list[float]]] = {}
    for kind in kinds:
        ready = {}
        for name, method in methods.items():
            if time.time() > deadline and name.startswith("compile"):
                continue
            if kind != "forward" and name == "compile(reference loop)":
                continue  # its encoding compiles to the same code as the vectorised one's
            try:
                for _ in range(3):
                    call(method, kind)
                ready[name] = method
            except Exception as error:
                print("failed", kind, name, str(error)[-300:], flush=True)
        torch.cuda.synchronize()
        samples[kind] = {name: [] for name in ready}
        for _ in range(rounds):
            for name, method in ready.items():
                samples[kind][name].append(time_ms(lambda m=method, k=kind: call(m, k), CALLS))
    tables = {kind: summarise(values) for kind, values in samples.items()}
    for kind, table in tables.items():
        print(f"--- {mode} {kind}", *[f"\n  {name:26s} {row}" for name, row in table.items()], flush=True)
    memory = {name: saved_bytes(method, x, weight, bias, autocast) for name, method in methods.items()
              if not name.startswith("compile")}  # fmt: skip
    written = points * UNITS * (2 if autocast else 4)
    fused = tables["forward"].get("fused", {}).get("median_ms", math.nan)
    print("memory", memory, "write GB/s of fused forward", written / fused / 1e6, flush=True)
    return {"tables": tables, "memory": memory, "output_bytes": written, "samples_ms": samples}


def small_batches(rounds: int, folder: Path) -> None:
    """Forward, and forward + backward, of small batches: called from Python, and replayed as a CUDA graph.

    The result is written after each case.
    """
    torch.compiler.reset()
    torch.set_float32_matmul_precision("highest")
    layer = SPE(DIMS, UNITS, BANDS, init="uniform", device=DEVICE)
    weight, bias = layer.weight, layer.bias
    assert bias is not None

    def twin(p: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.sin(F.linear(positional_encoding(p, BANDS), w, b))

    methods: dict[str, Callable[..., torch.Tensor]] = {
        "reference loop": reference_layer,
        "vectorised": twin,
        "compile(vectorised)": torch.compile(twin),
        "fused": lambda p, w, b: spe(p, w, b, BANDS, backend="triton"),
    }
    found: dict[str, Any] = {}
    for points in (SMALL, 4096):
        x = torch.rand(points, DIMS, device=DEVICE) * 2 - 1
        grad = torch.randn(points, UNITS, device=DEVICE)

        def forward(method: Callable[..., torch.Tensor], x: torch.Tensor = x) -> Any:
            with torch.no_grad():
                return method(x, weight, bias)

        def both(method: Callable[..., torch.Tensor], x: torch.Tensor = x, g: torch.Tensor = grad) -> Any:
            return torch.autograd.grad(method(x, weight, bias), [weight, bias], g)

        for kind, call in {"forward": forward, "forward+backward": both}.items():
            arms = {name: partial(call, method) for name, method in methods.items()}
            replayed = {}
            for name, arm in arms.items():
                try:
                    replayed[name] = as_graph(arm)
                except Exception as error:
                    print("no graph of", name, str(error)[-200:], flush=True)
            for how, ready in {"called": arms, "as a CUDA graph": replayed}.items():
                samples: dict[str, list[float]] = {name: [] for name in ready}
                for _ in range(rounds):
                    for name, arm in ready.items():
                        samples[name].append(time_ms(arm, 4 * CALLS))
                table = summarise(samples)
                found[f"{points:,} points, {kind}, {how}"] = {"table": table, "samples_ms": samples}
                print(points, kind, how, {n: row["median_ms"] for n, row in table.items()}, flush=True)
                write_small(found, folder)


def as_graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def stack(rounds: int) -> dict[str, Any]:
    """SPE, Linear 256 x 256 and ReLU in bfloat16 without gradients: one pass against two layers."""
    torch.compiler.reset()
    layer = SPE(DIMS, UNITS, BANDS, init="uniform", device=DEVICE)
    linear = torch.nn.Linear(UNITS, UNITS, device=DEVICE)
    x = torch.rand(POINTS, DIMS, device=DEVICE) * 2 - 1

    def two_layers(p: torch.Tensor) -> torch.Tensor:
        return torch.relu(linear(layer(p)))

    def plain(p: torch.Tensor) -> torch.Tensor:
        return torch.relu(linear(reference_layer(p, layer.weight, layer.bias)))

    arms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fused SPE, cuBLAS": two_layers,
        "compile(fused SPE, cuBLAS)": torch.compile(two_layers),
        "reference loop": plain,
    }
    for tiles in (Tiles(128, 256, 8), Tiles(64, 256, 8), Tiles(64, 256, 4)):
        arms[f"stack {tiles.points} {tiles.warps}"] = partial(one_pass, layer, linear, tiles)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        exact = torch.relu(torch.nn.functional.linear(
            SPE.forward(layer, x[:4096]).double(), linear.weight.double(), linear.bias.double()))  # fmt: skip
        errors = {
            name: float((arm(x[:4096]).double() - exact).square().mean().sqrt())
            for name, arm in arms.items() if name.startswith("stack")
        }  # fmt: skip
        for arm in arms.values():
            arm(x)
        samples: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, arm in arms.items():
                samples[name].append(time_ms(partial(arm, x), CALLS))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    print("stack", {n: round(v, 3) for n, v in medians.items()}, errors, flush=True)
    return {"median_ms": medians, "samples_ms": samples, "rms_error": errors}


def one_pass(layer: SPE, linear: torch.nn.Linear, tiles: Tiles, x: torch.Tensor) -> torch.Tensor:
    TILES["stack", 1] = tiles
    return spe_linear_relu(x, layer, linear)


def summarise(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians, quartiles, and the ratio to the fused median."""
    fused = statistics.median(samples.get("fused", [math.nan]))
    table = {}
    for name, values in samples.items():
        low, mid, high = statistics.quantiles(values, n=4)
        row = {"median_ms": mid, "q1_ms": low, "q3_ms": high, "times_fused": mid / fused}
        table[name] = {k: round(v, 4) for k, v in row.items()}
    return table


def saved_bytes(
    method: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    autocast: bool,
) -> dict[str, int]:
    """Bytes of distinct storages kept for backward (parameters left out), and the peak during forward."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in (weight.data_ptr(), bias.data_ptr()):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast),
    ):
        y = method(x, weight, bias)
    peak = torch.cuda.max_memory_allocated() - before
    del y
    return {"saved_bytes": sum(kept.values()), "peak_forward_bytes": peak}


def write_bandwidth() -> float:
    """GB/s of filling 1 GiB: the limit of a layer that has to write its output."""
    out = torch.empty(2**28, device=DEVICE)
    values = [time_ms(lambda: out.fill_(1.0)) for _ in range(20)]
    return out.nbytes / statistics.median(values[5:]) / 1e6


def headline(report: dict[str, Any]) -> list[Headline]:
    """The goals and what became of them."""
    checks = report["correctness"]
    rows = [
        Headline("checks of kernel against twin that hold", sum(c["ok"] for c in checks), f"of {len(checks)}")
    ]
    feature = next(c for c in checks if c["check"].startswith("feature error"))
    if "kernel" in feature:
        worst = max(feature["twin"], feature["kernel"])
        rows.append(Headline("largest feature error, 16 octaves, scale pi", worst, "", target="1e-6"))
    small = {"float32, 65,536 points,": report["small"]} if "small" in report else {}
    for mode, found in {**report.get("speed", {}), **small}.items():
        for kind, peer, target in GOALS:
            table = found["tables"].get(kind, {})
            if peer in table and "fused" in table:
                goal = "" if mode in small else target
                rows.append(ratio_row(f"{mode} {kind}: {peer} / fused", table, peer, goal))
        if mode in small:
            continue
        fused = found["tables"]["forward"].get("fused")
        if fused:
            share = found["output_bytes"] / fused["median_ms"] / 1e6 / report["fill_gb_per_s"]
            rows.append(Headline(f"{mode} forward: share of the fill bandwidth", share, "", target="0.6"))
        memory = found["memory"]
        kept = memory["fused"]["saved_bytes"] / memory["vectorised"]["saved_bytes"]
        rows.append(Headline(f"{mode}: bytes kept for backward, fused / eager", kept, "", target="0.1"))
    return rows + (stack_rows(report["stack"]) if "stack" in report else [])


def stack_rows(found: dict[str, Any]) -> list[Headline]:
    """The best tiles of the one-pass layer against the two layers."""
    medians = found["median_ms"]
    mine = min((n for n in medians if n.startswith("stack")), key=medians.__getitem__)
    return [
        Headline(f"SPE + Linear + ReLU, bfloat16: {peer} / one pass", medians[peer] / medians[mine], "x",
                 target="1.3" if peer == "fused SPE, cuBLAS" else "",
                 note=f"one pass {medians[mine]:.3f} ms ({mine}), rms error {found['rms_error'][mine]:.1e}")
        for peer in medians if not peer.startswith("stack")
    ]  # fmt: skip


def ratio_row(what: str, table: dict[str, dict[str, float]], peer: str, target: str) -> Headline:
    """Ratio of medians; the interval divides opposite quartiles."""
    mine, theirs = table["fused"], table[peer]
    return Headline(
        what,
        theirs["median_ms"] / mine["median_ms"],
        "x",
        theirs["q1_ms"] / mine["q3_ms"],
        theirs["q3_ms"] / mine["q1_ms"],
        target,
        f"fused {mine['median_ms']:.3f} ms, peer {theirs['median_ms']:.3f} ms; interval from quartiles",
    )


def write_small(found: dict[str, Any], folder: Path) -> None:
    """The times of small batches as a result of their own."""
    peers = ("reference loop", "vectorised", "compile(vectorised)")
    write_result(
        "spe_layers_gpu_small",
        question="Where the host's time counts: how fast are the fused kernels on small batches?",
        headline=[
            ratio_row(what, case["table"], peer, "")
            for what, case in found.items()
            for peer in peers
            if peer in case["table"]
        ],
        samples={
            f"{what}: {name} (ms)": values
            for what, case in found.items()
            for name, values in case["samples_ms"].items()
        },
        folder=folder,
        workload={"coordinates": DIMS, "units": UNITS, "bands": BANDS, "calls_a_sample": 4 * CALLS},
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for spe_layers_gpu.json")
    parser.add_argument("--budget", type=float, default=120, help="seconds after which no more is compiled")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--small", action="store_true", help="only small batches -> spe_layers_gpu_small.json"
    )
    arguments = parser.parse_args()
    if arguments.small:
        small_batches(arguments.rounds, arguments.out)
        return 0
    start = time.time()
    report: dict[str, Any] = {
        "workload": {"points": POINTS, "coordinates": DIMS, "units": UNITS, "bands": BANDS},
        "fill_gb_per_s": write_bandwidth(),
        "correctness": correctness(timed=True),
    }

    def save() -> None:
        report["seconds"] = round(time.time() - start, 1)
        samples = {
            f"{mode} {kind} {name} (ms)": values
            for mode, found in report.get("speed", {}).items()
            for kind, arms in found["samples_ms"].items()
            for name, values in arms.items()
        }
        write_result(
            "spe_layers_gpu",
            question="Are the fused kernels right on a GPU, and how fast are they?",
            headline=headline(report),
            samples=samples,
            folder=arguments.out,
            **report,
        )
        print(f"[{report['seconds']} s]", flush=True)

    save()
    report["sweep"] = sweep(start + 0.5 * arguments.budget)
    report["tiles"] = use_best(report["sweep"]["median_ms"])
    save()
    for mode in MODES:
        report.setdefault("speed", {})[mode] = speed(mode, start + arguments.budget, arguments.rounds, POINTS)
        save()
    try:
        report["stack"] = stack(arguments.rounds)
        save()
    except Exception as error:
        print("failed stack", str(error)[-300:], flush=True)
    if time.time() < start + arguments.budget:
        report["small"] = speed("float32", start + arguments.budget, arguments.rounds, SMALL)
        save()
    report["correctness"] += correctness(timed=False)
    save()
    failed = [c["check"] for c in report["correctness"] if not c["ok"]]
    print("failed checks:", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

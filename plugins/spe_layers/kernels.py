"""The fused layer on a GPU: launches of the Triton kernels, and the operator that autograd and compilers see.

Forward (N points, D coordinates, F features, H units):    y = sin(e(x) W^T + b)
Backward, with z = e(x) W^T + b recomputed:                g = dY cos(z)
    dW = g^T e(x),   db = sum_n g,   dx = sum over features f of coordinate d of (g W)_f  d e_f / d x_d

Only x, W and b are kept for backward: 4 D bytes a point. Nothing of size N x F or N x H is ever stored, and
no sum is made by atomics, so gradients are bitwise reproducible. The plain torch twin is ``eager.spe_eager``.
"""

# Operators take every argument by position.
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spe_layers.bands import Bands
from spe_layers.eager import spe_eager
from spe_layers.encoding import turn_period
from spe_layers.tiles import LARGE_SHARED_MEMORY, SMALL_TILES, TILES, Tiles
from spe_layers.triton_kernels import (
    INTERPRETED,
    coordinate_grad_kernel,
    forward_kernel,
    pack_kernel,
    stack_kernel,
    weight_grad_kernel,
)

# Beyond these sizes the features of a point no longer fit in one tile; the caller takes the eager path.
MAX_FEATURES = 127
MAX_COORDINATES = 16
PACK_UNITS = 32
STACK_UNITS = 64


def default_terms(dtype: torch.dtype) -> int:
    """Products a float is made of: 1 for 16-bit results or where the user allows TF32, else 3."""
    if dtype in (torch.bfloat16, torch.float16):
        return 1
    return 3 if torch.get_float32_matmul_precision() == "highest" else 1


def supports(in_features: int, bands: Bands) -> bool:
    """Whether one tile holds the features of a point."""
    return in_features <= MAX_COORDINATES and bands.num_features(in_features) <= MAX_FEATURES


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    out_dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
    terms: int | None = None,
) -> Tensor:
    """y [N, H] in ``out_dtype``: x [N, D] float32 of any strides, weight [H, F] in ``nerf`` order, bias [H].

    ``terms`` is 3 (float32 products) or 1 (11 bits of each factor); sums, phases and sines are float32 in
    both. Amplitudes and layout of ``bands`` are not looked at: the caller folds them into the weight.
    """
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    if out.numel():
        launch = _Launch(x, weight, bias, bands, terms or default_terms(out_dtype))
        tiles = launch.fit(tiles, "forward")
        launch.run(forward_kernel, launch.walk(tiles), tiles, x, out)
    return out


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    needs: Sequence[bool],
    *,
    tiles: Tiles | None = None,
    terms: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [N, D], dW [H, F], db [H]) for grad [N, H]; ``needs`` says which, the others are empty."""
    # Outputs of an operator may not share storage, so each absent one is a tensor of its own.
    dx, dw, db = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    needs_weight = needs[1] or needs[2]
    if not grad.numel():
        return (
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needs[0] else dx,
            weight.new_zeros(weight.shape) if needs_weight else dw,
            db if bias is None or not needs_weight else bias.new_zeros(bias.shape),
        )
    grad = grad.contiguous()
    launch = _Launch(x, weight, bias, bands, terms or default_terms(grad.dtype))
    if needs[0]:
        dx = x.new_empty(x.shape)
        shape = launch.fit(tiles, "coordinate_grad")
        launch.run(coordinate_grad_kernel, (triton.cdiv(len(x), shape.points),), shape, grad, x, dx)
    if needs_weight:
        shape = launch.fit(tiles, "weight_grad")
        grid = launch.walk(shape)
        features = weight.shape[1]
        parts = x.new_empty((grid[0], len(weight), features + launch.has_bias))
        launch.run(weight_grad_kernel, grid, shape, grad, x, parts)
        total = parts.sum(0)
        dw = total[:, :features].to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
        if bias is not None:
            db = total[:, features].to(bias.dtype, copy=True, memory_format=torch.contiguous_format)
    return dx, dw, db


def launch_stack(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    following: tuple[Tensor, Tensor | None],
    out_dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """relu(spe(x) W2^T + b2) [N, H2] in 16-bit ``out_dtype``; ``following``: W2 [H2, H], b2 [H2] or None."""
    second, shift = following
    out = x.new_empty((x.shape[0], second.shape[0]), dtype=out_dtype)
    if not out.numel():
        return out
    launch = _Launch(x, weight, bias, bands, 1)
    tiles = launch.fit(tiles, "stack")
    tiles = replace(tiles, units=min(tiles.units, max(16, triton.next_power_of_2(len(second)))))
    shift = x.new_zeros(len(second)) if shift is None else shift
    # The interpreter keeps bfloat16 as integers and multiplies those.
    bfloat = out_dtype == torch.bfloat16 and not INTERPRETED
    with torch.cuda.device_of(x):
        stack_kernel[(triton.cdiv(len(x), tiles.points), triton.cdiv(len(second), tiles.units))](
            x, launch.packed, launch.unscale, launch.rates, second.to(out_dtype).contiguous(), shift, out,
            len(x), len(weight), len(second), *x.stride(),
            **launch.constants, PERIOD=launch.period, DOT=tl.bfloat16 if bfloat else tl.float16,
            BN=tiles.points, BK=STACK_UNITS, BH=tiles.units,
            num_warps=tiles.warps, num_stages=2, maxnreg=tiles.registers,
        )  # fmt: skip
    return out


class _Launch:
    """What the kernels of one call share: the packed weight, constants, and the choice of tiles."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, bands: Bands, terms: int) -> None:
        units, features = weight.shape
        self.has_bias, self.terms, self.rates = bias is not None, terms, _rates(bands, x.device)
        self.points, self.units, self.device = len(x), units, x.device
        self.half = max(16, triton.next_power_of_2(features + self.has_bias) // 2)
        self.wide = self.half > 32
        self.constants = {
            "P": bands.num_bands * x.shape[1],
            "D": x.shape[1],
            "INPUT": bands.include_input,
            "BIAS": self.has_bias,
            "BP": self.half,
        }
        self.period = turn_period(bands)
        # Every tile of units is full, so that kernels load weights without a mask.
        largest = max(t.units for t in (*TILES.values(), SMALL_TILES))
        rows = triton.cdiv(units, largest) * largest
        self.packed = torch.empty((2, rows, 2 * self.half), dtype=torch.float16, device=x.device)
        self.unscale = torch.empty(1, dtype=torch.float32, device=x.device)
        weight = weight.contiguous()
        with torch.cuda.device_of(x):
            pack_kernel[(rows // PACK_UNITS,)](
                weight, weight if bias is None else bias, self.packed, self.unscale,
                units, features, self.packed[0].numel(),
                **self.constants, BH=PACK_UNITS, BLOCK=4096, num_warps=8,
            )  # fmt: skip

    def fit(self, tiles: Tiles | None, kind: str) -> Tiles:
        """These tiles, or those of the kernel; not wider than the layer."""
        if tiles is None:
            tiles = TILES[kind, self.terms]
            if self.wide or (
                self.device.type == "cuda" and _shared_memory(self.device) < LARGE_SHARED_MEMORY
            ):
                tiles = SMALL_TILES
        return replace(tiles, units=min(tiles.units, max(16, triton.next_power_of_2(self.units))))

    def walk(self, tiles: Tiles) -> tuple[int, int]:
        """Programs that walk over the points, and tiles of units: as many as the device holds at once."""
        unit_tiles = triton.cdiv(self.units, tiles.units)
        resident = tiles.programs * _multiprocessors(self.device) // unit_tiles
        return min(triton.cdiv(self.points, tiles.points), max(1, resident)), unit_tiles

    def run(self, kernel: Any, grid: tuple[int, ...], tiles: Tiles, *tensors: Tensor) -> None:
        """Launch on (gradient,) x, output."""
        *grad, x, out = tensors
        with torch.cuda.device_of(x):
            kernel[grid](
                *grad, x, self.packed, self.unscale, self.rates, out,
                self.points, self.units, self.packed[0].numel(), *x.stride(),
                **self.constants, PERIOD=self.period, TERMS=self.terms, BN=tiles.points, BH=tiles.units,
                num_warps=tiles.warps, num_stages=1, maxnreg=tiles.registers,
            )  # fmt: skip


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    # HIP does not say; it then gets the small tiles.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: enough to have parts that must be added
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def _rates(bands: Bands, device: torch.device) -> Tensor:
    """One factor a band on the device; kept, because a copy to the device in every call would stall it."""
    if not turn_period(bands):
        values, dtype = [bands.scale * m for m in bands.multipliers], torch.float32
    else:
        values, dtype = list(bands.multipliers), torch.float32 if bands.dyadic else torch.float64
    return torch.tensor(values or [0.0], dtype=dtype, device=device)


@torch.library.custom_op("spe_layers::forward", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multipliers: Sequence[float],
    scale: float,
    include_input: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return launch_forward(x, weight, bias, _plain(multipliers, scale, include_input), out_dtype)


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multipliers: Sequence[float],
    scale: float,
    include_input: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.custom_op("spe_layers::backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multipliers: Sequence[float],
    scale: float,
    include_input: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad, x, weight, bias, _plain(multipliers, scale, include_input), needs)


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multipliers: Sequence[float],
    scale: float,
    include_input: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    needs_weight = needs[1] or needs[2]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        x.new_empty(0) if bias is None or not needs_weight else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *options = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    multipliers, scale, include_input, out_dtype = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():
        # create_graph: the gradient must be differentiable itself, so it is that of the plain torch twin.
        inputs = [t for t, needed in zip((x, weight, bias), needs, strict=True) if needed]
        y = spe_eager(x, weight, bias, _plain(multipliers, scale, include_input), out_dtype=out_dtype)
        found: list[Tensor | None] = list(torch.autograd.grad(y, inputs, grad, create_graph=True))
        grads = [found.pop(0) if needed else None for needed in needs]
    else:
        results = torch.ops.spe_layers.backward(
            grad, x, weight, bias, multipliers, scale, include_input, needs
        )
        grads = [result if needed else None for result, needed in zip(results, needs, strict=True)]
    return (*grads, None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _plain(multipliers: Sequence[float], scale: float, include_input: bool) -> Bands:
    return Bands(tuple(multipliers), scale, None, include_input)


fused_forward: Callable[..., Tensor] = _forward_op

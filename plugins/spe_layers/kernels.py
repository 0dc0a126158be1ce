"""Fused Triton kernels: encoding, matrix product and sine in one pass, backward by recomputation.

Forward (N points, D coordinates, F features, H units):    y = sin(e(x) W^T + b)
Backward, with z = e(x) W^T + b recomputed:                g = dY cos(z)
    dW = g^T e(x),   db = sum_n g,   dx = sum over features f of coordinate d of (g W)_f  d e_f / d x_d

Only x, W and b are kept for backward: 4 D bytes a point. Nothing of size N x F or N x H is ever stored, and
no sum is made by atomics, so gradients are bitwise reproducible. The plain torch twin is ``eager.spe_eager``.
"""

# Jitted functions take no annotations but constexpr, and every argument by position.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from spe_layers.bands import Bands
from spe_layers.eager import spe_eager
from spe_layers.encoding import turn_period

# Beyond these sizes the features of a point no longer fit in one tile; the caller takes the eager path.
MAX_FEATURES = 128
MAX_COORDINATES = 16
# The partial sums of dW are this many, spread over the units' tiles: four a multiprocessor of an H100.
BACKWARD_PROGRAMS = 528

# pi in three parts, the first two short enough that their products with the number of half turns are exact.
_INV_PI = tl.constexpr(0.3183098861837907)
_PI_A = tl.constexpr(3.140625)
_PI_B = tl.constexpr(0.0009675025939941406)
_PI_C = tl.constexpr(1.5099580252808664e-07)
# 1.5 * 2^23: adding it rounds a float32 to an integer, whose parity is then the lowest bit.
_ROUND = tl.constexpr(12582912.0)
# sin(r) = r + r^3 q(r^2) on [-pi/2, pi/2]; largest error 1.2e-7 in float32 (weighted Chebyshev fit).
_Q0 = tl.constexpr(-0.16666656732559204)
_Q1 = tl.constexpr(0.008332996629178524)
_Q2 = tl.constexpr(-0.00019805050396826118)
_Q3 = tl.constexpr(2.596526201159577e-06)


@triton.jit
def _sine(z, shift):
    """sin(z + shift * pi) for shift in {0, 1/2, 1}, without the compiler's fast approximation."""
    rounded = (z * _INV_PI + shift) + _ROUND
    half_turns = (rounded - _ROUND) - shift
    r = z - half_turns * _PI_A
    r = r - half_turns * _PI_B
    r = r - half_turns * _PI_C
    square = r * r
    series = ((_Q3 * square + _Q2) * square + _Q1) * square + _Q0
    sine = r + r * square * series
    sign = rounded.to(tl.int32, bitcast=True) << 31
    return (sine.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _column_roles(cols, D: tl.constexpr, INPUT: tl.constexpr):
    """Band, coordinate and shift (0 sine, 1/2 cosine) of each feature; band -1 is the coordinate itself."""
    offset = cols - (D if INPUT else 0)
    wave = tl.maximum(offset, 0)
    band = tl.where(offset < 0, -1, wave // (2 * D))
    coordinate = tl.where(offset < 0, cols, wave % D)
    shift = ((wave // D) % 2).to(tl.float32) * 0.5
    return band, coordinate, shift


@triton.jit
def _load_coordinates(x_ptr, rows, row_ok, coordinate, col_ok, stride_n, stride_d):
    return tl.load(
        x_ptr + rows.to(tl.int64)[:, None] * stride_n + coordinate[None, :] * stride_d,
        mask=row_ok[:, None] & col_ok[None, :],
        other=0.0,
    )


@triton.jit
def _phases(x, rate, SCALE: tl.constexpr, PERIOD: tl.constexpr):
    """Phase in radians, whole turns removed. ``rate`` is float64 where float32 products are not exact."""
    phase = x.to(rate.dtype) * rate
    if PERIOD > 0:
        turns = phase - PERIOD * tl.floor(phase / PERIOD + 0.5)
        phase = turns.to(tl.float32) * SCALE
    return phase


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, b_ptr, rate_ptr, y_ptr, N, H, F, stride_n, stride_d,
    D: tl.constexpr, SCALE: tl.constexpr, PERIOD: tl.constexpr, INPUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BF)
    row_ok, col_ok = rows < N, cols < F
    band, coordinate, shift = _column_roles(cols, D, INPUT)
    rate = tl.load(rate_ptr + band, mask=col_ok & (band >= 0), other=0.0)
    x = _load_coordinates(x_ptr, rows, row_ok, coordinate, col_ok, stride_n, stride_d)
    waves = _sine(_phases(x, rate[None, :], SCALE, PERIOD), shift[None, :])
    e = tl.where((band >= 0)[None, :] & col_ok[None, :], waves, x).to(DOT)
    for start in range(0, H, BH):
        units = start + tl.arange(0, BH)
        unit_ok = units < H
        w = tl.load(
            w_ptr + units[None, :] * F + cols[:, None], mask=unit_ok[None, :] & col_ok[:, None], other=0.0
        )
        z = tl.dot(e, w.to(DOT), input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(b_ptr + units, mask=unit_ok, other=0.0).to(tl.float32)[None, :]
        out = y_ptr + rows.to(tl.int64)[:, None] * H + units[None, :]
        tl.store(out, _sine(z, 0.0).to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & unit_ok[None, :])


@triton.jit
def _coordinate_grad_kernel(
    g_ptr, x_ptr, w_ptr, b_ptr, rate_ptr, dx_ptr, N, H, F, stride_n, stride_d,
    D: tl.constexpr, SCALE: tl.constexpr, PERIOD: tl.constexpr, INPUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BF)
    row_ok, col_ok = rows < N, cols < F
    band, coordinate, shift = _column_roles(cols, D, INPUT)
    is_wave = (band >= 0) & col_ok
    rate = tl.load(rate_ptr + band, mask=is_wave, other=0.0)
    x = _load_coordinates(x_ptr, rows, row_ok, coordinate, col_ok, stride_n, stride_d)
    phase = _phases(x, rate[None, :], SCALE, PERIOD)
    e = tl.where(is_wave[None, :], _sine(phase, shift[None, :]), x).to(DOT)
    de = tl.zeros((BN, BF), dtype=tl.float32)
    for start in range(0, H, BH):
        units = start + tl.arange(0, BH)
        unit_ok = units < H
        w = tl.load(
            w_ptr + units[None, :] * F + cols[:, None], mask=unit_ok[None, :] & col_ok[:, None], other=0.0
        ).to(DOT)
        z = tl.dot(e, w, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(b_ptr + units, mask=unit_ok, other=0.0).to(tl.float32)[None, :]
        g = tl.load(
            g_ptr + rows.to(tl.int64)[:, None] * H + units[None, :],
            mask=row_ok[:, None] & unit_ok[None, :],
            other=0.0,
        ).to(tl.float32) * _sine(z, 0.5)
        de += tl.dot(g.to(DOT), tl.trans(w), input_precision=PRECISION)
    # d/dx sin(s m x + shift pi) = s m sin(s m x + (shift + 1/2) pi); with PERIOD s is not in ``rate``.
    slope = rate.to(tl.float32)[None, :] * _sine(phase, shift[None, :] + 0.5)
    if PERIOD > 0:
        slope = slope * SCALE
    contribution = tl.where(is_wave[None, :], de * slope, tl.where(col_ok[None, :], de, 0.0))
    for d in tl.static_range(D):
        dx = tl.sum(tl.where(coordinate[None, :] == d, contribution, 0.0), axis=1)
        tl.store(dx_ptr + rows.to(tl.int64) * D + d, dx, mask=row_ok)


@triton.jit
def _weight_grad_kernel(
    g_ptr, x_ptr, w_ptr, b_ptr, rate_ptr, dw_ptr, db_ptr, N, H, F, stride_n, stride_d, rows_per_program,
    D: tl.constexpr, SCALE: tl.constexpr, PERIOD: tl.constexpr, INPUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    units = tl.program_id(1) * BH + tl.arange(0, BH)
    cols = tl.arange(0, BF)
    unit_ok, col_ok = units < H, cols < F
    band, coordinate, shift = _column_roles(cols, D, INPUT)
    is_wave = (band >= 0) & col_ok
    rate = tl.load(rate_ptr + band, mask=is_wave, other=0.0)
    w = tl.load(
        w_ptr + units[None, :] * F + cols[:, None], mask=unit_ok[None, :] & col_ok[:, None], other=0.0
    ).to(DOT)
    dw = tl.zeros((BH, BF), dtype=tl.float32)
    db = tl.zeros((BH,), dtype=tl.float32)
    first = part * rows_per_program
    for start in range(first, first + rows_per_program, BN):
        rows = start + tl.arange(0, BN)
        row_ok = rows < N
        x = _load_coordinates(x_ptr, rows, row_ok, coordinate, col_ok, stride_n, stride_d)
        waves = _sine(_phases(x, rate[None, :], SCALE, PERIOD), shift[None, :])
        e = tl.where(is_wave[None, :], waves, x).to(DOT)
        z = tl.dot(e, w, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(b_ptr + units, mask=unit_ok, other=0.0).to(tl.float32)[None, :]
        g = tl.load(
            g_ptr + rows.to(tl.int64)[:, None] * H + units[None, :],
            mask=row_ok[:, None] & unit_ok[None, :],
            other=0.0,
        ).to(tl.float32) * _sine(z, 0.5)
        dw += tl.dot(tl.trans(g.to(DOT)), e, input_precision=PRECISION)
        db += tl.sum(g, axis=0)
    unit_row = part.to(tl.int64) * H + units
    tl.store(dw_ptr + unit_row[:, None] * F + cols[None, :], dw, mask=unit_ok[:, None] & col_ok[None, :])
    if HAS_BIAS:
        tl.store(db_ptr + unit_row, db, mask=unit_ok)


INTERPRETED = isinstance(_forward_kernel, InterpretedFunction)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel: points, units; warps and pipeline stages of its programs."""

    points: int
    units: int
    warps: int = 4
    stages: int = 2


# By kernel and bits of the product's inputs, for up to 64 features and the shared memory of a large GPU.
TILES = {
    ("forward", 32): Tiles(points=128, units=64, warps=8),
    ("forward", 16): Tiles(points=128, units=64, warps=8),
    ("coordinate_grad", 32): Tiles(points=64, units=64),
    ("coordinate_grad", 16): Tiles(points=64, units=64),
    ("weight_grad", 32): Tiles(points=64, units=64),
    ("weight_grad", 16): Tiles(points=64, units=64),
}


# For more features, or less shared memory: no kernel needs more than 96 KiB with these.
SMALL_TILES = Tiles(points=32, units=32, stages=1)
LARGE_SHARED_MEMORY = 200 * 2**10


def float32_precision() -> str:
    """How ``tl.dot`` multiplies float32: three TF32 products, or one if the user allowed TF32."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


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
    precision: str | None = None,
) -> Tensor:
    """y [N, H] in ``out_dtype``: x [N, D] float32 of any strides, weight [H, F] in ``nerf`` order, bias [H].

    16-bit ``out_dtype`` rounds the features and weights to it for the product; sums, phases and sines stay
    float32. Amplitudes and layout of ``bands`` are not looked at: the caller folds them into the weight.
    """
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    if out.numel() == 0:
        return out
    tiles = _fit(tiles, "forward", out_dtype, weight)
    grid = (triton.cdiv(x.shape[0], tiles.points),)
    weight = weight.contiguous()
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x, weight, weight if bias is None else bias, _rates(bands, x.device), out,
            x.shape[0], *weight.shape, *x.stride(),
            **_constants(x, weight, bias, bands, out_dtype, tiles, precision),
        )  # fmt: skip
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
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [N, D], dW [H, F], db [H]) for grad [N, H]; ``needs`` says which, the others are empty."""
    grad, weight = grad.contiguous(), weight.contiguous()
    # Outputs of an operator may not share storage, so each absent one is a tensor of its own.
    dx, dw, db = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    if needs[0]:
        dx = _coordinate_grad(grad, x, weight, bias, bands, tiles, precision)
    if needs[1] or needs[2]:
        dw, sums = _weight_grad(grad, x, weight, bias, bands, tiles, precision)
        dw = dw.to(weight.dtype)
        if bias is not None:
            db = sums.to(bias.dtype)
    return dx, dw, db


def _coordinate_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    tiles: Tiles | None,
    precision: str | None,
) -> Tensor:
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if grad.numel() == 0:
        return dx
    tiles = _fit(tiles, "coordinate_grad", grad.dtype, weight)
    with torch.cuda.device_of(x):
        _coordinate_grad_kernel[(triton.cdiv(x.shape[0], tiles.points),)](
            grad, x, weight, weight if bias is None else bias, _rates(bands, x.device), dx,
            x.shape[0], *weight.shape, *x.stride(),
            **_constants(x, weight, bias, bands, grad.dtype, tiles, precision),
        )  # fmt: skip
    return dx


def _weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    tiles: Tiles | None,
    precision: str | None,
) -> tuple[Tensor, Tensor]:
    units, features = weight.shape
    if grad.numel() == 0:
        return weight.new_zeros(weight.shape), weight.new_zeros(units)
    tiles = _fit(tiles, "weight_grad", grad.dtype, weight)
    unit_tiles = triton.cdiv(units, tiles.units)
    point_tiles = triton.cdiv(x.shape[0], tiles.points)
    tiles_each = triton.cdiv(point_tiles, max(1, BACKWARD_PROGRAMS // unit_tiles))
    parts = triton.cdiv(point_tiles, tiles_each)
    dw = x.new_empty((parts, units, features))
    db = x.new_empty((parts, units))
    with torch.cuda.device_of(x):
        _weight_grad_kernel[(parts, unit_tiles)](
            grad, x, weight, weight if bias is None else bias, _rates(bands, x.device), dw, db,
            x.shape[0], units, features, *x.stride(), tiles_each * tiles.points,
            **_constants(x, weight, bias, bands, grad.dtype, tiles, precision),
        )  # fmt: skip
    return dw.sum(0), db.sum(0)


def _bits(dtype: torch.dtype) -> int:
    return 16 if dtype in (torch.bfloat16, torch.float16) else 32


def _fit(tiles: Tiles | None, kind: str, dtype: torch.dtype, weight: Tensor) -> Tiles:
    """These tiles, or those of the kernel; not wider than the layer."""
    units, features = weight.shape
    if tiles is None:
        tiles = TILES[kind, _bits(dtype)]
        if features > 64 or (weight.is_cuda and _shared_memory(weight.device) < LARGE_SHARED_MEMORY):
            tiles = SMALL_TILES
    return replace(tiles, units=min(tiles.units, max(16, triton.next_power_of_2(units))))


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    # HIP does not say; it then gets the small tiles.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def _constants(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    dtype: torch.dtype,
    tiles: Tiles,
    precision: str | None,
) -> dict[str, Any]:
    dot_types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if INTERPRETED:
        # The interpreter keeps bfloat16 as integers and multiplies those.
        dot_types.pop(torch.bfloat16)
    return {
        "D": x.shape[1],
        "SCALE": bands.scale,
        "PERIOD": turn_period(bands),
        "INPUT": bands.include_input,
        "HAS_BIAS": bias is not None,
        "DOT": dot_types.get(dtype, tl.float32),
        "PRECISION": "ieee" if _bits(dtype) == 16 else precision or float32_precision(),
        "BN": tiles.points,
        "BH": tiles.units,
        "BF": max(16, triton.next_power_of_2(weight.shape[1])),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


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

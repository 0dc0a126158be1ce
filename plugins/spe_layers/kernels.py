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
LARGEST_UNITS = 256  # of any tile
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
        launch.run(coordinate_grad_kernel, (_ceil_div(len(x), shape.points),), shape, grad, x, dx)
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
    tiles = replace(tiles, units=min(tiles.units, max(16, _next_power(len(second)))))
    shift = x.new_zeros(len(second)) if shift is None else shift
    # The interpreter keeps bfloat16 as integers and multiplies those.
    bfloat = out_dtype == torch.bfloat16 and not INTERPRETED
    with torch.cuda.device_of(x):
        stack_kernel[(_ceil_div(len(x), tiles.points), _ceil_div(len(second), tiles.units))](
            x, launch.packed, launch.unscale, launch.rates, second.to(out_dtype).contiguous(), shift, out,
            len(x), len(weight), len(second), *x.stride(),
            **launch.constants, PERIOD=launch.period, DOT=tl.bfloat16 if bfloat else tl.float16,
            BN=tiles.points, BK=STACK_UNITS, BH=tiles.units,
            num_warps=tiles.warps, num_stages=2, maxnreg=tiles.registers,
        )  # fmt: skip
    return out


def _ceil_div(a: int, b: int) -> int:
    # triton.cdiv asks at every call whether it is inside a kernel.
    return -(-a // b)


def _next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class _Launch:
    """What the kernels of one call share: the packed weight, constants, and the choice of tiles."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, bands: Bands, terms: int) -> None:
        units, features = weight.shape
        self.has_bias, self.terms, self.rates = bias is not None, terms, _rates(bands, x.device)
        self.points, self.units, self.device = len(x), units, x.device
        self.half = max(16, _next_power(features + self.has_bias) // 2)
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
        rows = _ceil_div(units, LARGEST_UNITS) * LARGEST_UNITS
        self.packed = torch.empty((2, rows, 2 * self.half), dtype=torch.float16, device=x.device)
        self.unscale = torch.empty(1, dtype=torch.float32, device=x.device)
        self.padded = rows * 2 * self.half
        weight = weight.contiguous()
        with torch.cuda.device_of(x):
            pack_kernel[(rows // PACK_UNITS,)](
                weight, weight if bias is None else bias, self.packed, self.unscale,
                units, features, self.padded,
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
        units = min(tiles.units, max(16, _next_power(self.units)))
        return tiles if units == tiles.units else replace(tiles, units=units)

    def walk(self, tiles: Tiles) -> tuple[int, int]:
        """Programs that walk over the points, and tiles of units: as many as the device holds at once."""
        unit_tiles = _ceil_div(self.units, tiles.units)
        resident = tiles.programs * _multiprocessors(self.device) // unit_tiles
        return min(_ceil_div(self.points, tiles.points), max(1, resident)), unit_tiles

    def run(self, kernel: Any, grid: tuple[int, ...], tiles: Tiles, *tensors: Tensor) -> None:
        """Launch on (gradient,) x, output."""
        *grad, x, out = tensors
        with torch.cuda.device_of(x):
            kernel[grid](
                *grad, x, self.packed, self.unscale, self.rates, out,
                self.points, self.units, self.padded, *x.stride(),
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


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *plain, out_dtype = ctx.options

    def launch(needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.spe_layers.backward(grad, *ctx.saved_tensors, *plain, needs)

    return (*_gradients(ctx, grad, _plain(*plain), out_dtype, launch), None, None, None, None)


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)


class _Fused(torch.autograd.Function):
    """The operator for calls outside of compilers, where each would pay for its dispatch."""

    # With a ``setup_context`` of its own, ``apply`` would bind a signature in every call: half of the time of
    # the host.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bands: Bands, out_dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.options = bands, out_dtype
        return launch_forward(x, weight, bias, bands, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bands, out_dtype = ctx.options
        x, weight, bias = ctx.saved_tensors

        def launch(needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
            return launch_backward(grad, x, weight, bias, bands, needs)

        return (*_gradients(ctx, grad, bands, out_dtype, launch), None, None)


class _Transformed(_Fused):
    """The same inside of torch.func, which asks for a ``setup_context``."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, weight: Tensor, bias: Tensor | None, bands: Bands, out_dtype: torch.dtype
    ) -> Tensor:
        return launch_forward(x, weight, bias, bands, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)


def _gradients(
    ctx: Any,
    grad: Tensor,
    bands: Bands,
    out_dtype: torch.dtype,
    launch: Callable[[list[bool]], tuple[Tensor, Tensor, Tensor]],
) -> list[Tensor | None]:
    """Gradients of x, weight and bias, None for those that are not needed."""
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if not torch.is_grad_enabled():
        return [found if needed else None for found, needed in zip(launch(needs), needs, strict=True)]
    # create_graph: the gradient must be differentiable itself, so it is that of the plain torch twin.
    inputs = [t for t, needed in zip((x, weight, bias), needs, strict=True) if needed]
    plain = replace(bands, amplitudes=None, layout="nerf")
    y = spe_eager(x, weight, bias, plain, out_dtype=out_dtype)
    found = list(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return [found.pop(0) if needed else None for needed in needs]


def _plain(multipliers: Sequence[float], scale: float, include_input: bool) -> Bands:
    return Bands(tuple(multipliers), scale, None, include_input)


def fused_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, bands: Bands, out_dtype: torch.dtype
) -> Tensor:
    """``sin(W e(x) + b)`` [N, H] by the kernels, differentiable; x [N, D] float32, W in ``nerf`` order.

    Amplitudes and layout of ``bands`` are not looked at.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        plain = list(bands.multipliers), bands.scale, bands.include_input
        return _forward_op(x, weight, bias, *plain, out_dtype)
    # There is no public question for it.
    function = _Transformed if torch._C._are_functorch_transforms_active() else _Fused
    return function.apply(x, weight, bias, bands, out_dtype)

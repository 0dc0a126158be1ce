"""The fused kernels themselves: encoding, matrix product and sine in one pass, backward by recomputation.

Every product is one of float16 halves on the tensor cores: v = high + low with 11 bits each. With three TERMS
(high low + low high + high high, the small ones first, summed in float32) that is as exact as a float32
product; with one it is as exact as TF32. Sines fit float16 as they are; the weight is packed with a power of
two that brings its largest entry to 2^13, gradients get a running power of two a row, coordinates beyond 2^14
one a tile.

Packed features come in two halves of BP columns, so that a sine and its cosine share a phase:
    sines of P = D L waves (band 0 of every coordinate, band 1, ...), spare columns; cosines, spare columns.
The coordinates and the 1 that multiplies the bias stand in the spare columns.
"""

# Jitted functions take no annotations but constexpr, and every argument by position.
# ruff: noqa: ANN001, ANN201, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

_INV_TURN = tl.constexpr(0.15915494309189535)
_TURN = tl.constexpr(6.283185307179586)
# 2 pi in three parts, the first two short enough that their products with the number of turns are exact.
_TURN_A = tl.constexpr(6.28125)
_TURN_B = tl.constexpr(0.0019350051879882812)
_TURN_C = tl.constexpr(3.0199160505617e-07)
_SIGN = tl.constexpr(-(2**31))
# Exponents (biased by 127, as stored): of 2^14, up to which features are used as they are; of the largest
# weight and gradient after scaling; and the least from which scales are taken, so that they stay finite.
_FEATURE_LIMIT = tl.constexpr(141)
_TARGET = tl.constexpr(13)
_LEAST_WEIGHT = tl.constexpr(14)
_LEAST_GRADIENT = tl.constexpr(50)


@triton.jit
def _sine_quarter(v):
    """sin(2 pi v) for \\|v\\| <= 1/4: weighted Chebyshev fit, error 3e-9 before rounding."""
    s = v * v
    p = tl.fma(s, 39.5367060193769, -76.549782287112)
    p = tl.fma(s, p, 81.60100407295971)
    p = tl.fma(s, p, -41.34165503141113)
    return v * tl.fma(s, p, 6.283185160089452)


@triton.jit
def _with_sign(v, of):
    bits = v.to(tl.int32, bitcast=True) ^ (of.to(tl.int32, bitcast=True) & _SIGN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sine(t):
    """sin(2 pi t) for t in [-1/2, 1/2]; as exact for small t as for large."""
    a = tl.abs(t)
    return _with_sign(_sine_quarter(tl.minimum(a, 0.5 - a)), t)


@triton.jit
def _cosine(t):
    """cos(2 pi t) for t in [-1/2, 1/2]."""
    return _sine_quarter(0.25 - tl.abs(t))


@triton.jit
def _fraction_of_turn(product, scale):
    """product * scale less the nearest whole number, rounded once; bounded however large the product is."""
    return tl.fma(product, scale, -tl.floor(tl.fma(product, scale, 0.5)))


@triton.jit
def _exponent(v):
    """Biased exponent of positive numbers."""
    return v.to(tl.int32, bitcast=True) >> 23


@triton.jit
def _power(biased):
    """The power of two with this biased exponent."""
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse_power(biased):
    """One over the power of two with this biased exponent."""
    return ((254 - biased) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(v):
    high = v.to(tl.float16)
    return high, (v - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _spare(
    half: tl.constexpr, P: tl.constexpr, D: tl.constexpr, INPUT: tl.constexpr, BIAS: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """What each column of a half holds: a coordinate's index, D for the bias, -1 for a wave or nothing."""
    cols = tl.arange(0, BP)
    inputs: tl.constexpr = D if INPUT else 0
    at = cols - P + half * (BP - P)
    held = tl.where(at < inputs, at, tl.where((at == inputs) & BIAS, D, -1))
    return tl.where(cols < P, -1, held)


@triton.jit
def _columns(
    half: tl.constexpr, P: tl.constexpr, D: tl.constexpr, INPUT: tl.constexpr, BIAS: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Column of the weight [H, F] in ``nerf`` order that each column of a half holds; F is the bias."""
    cols = tl.arange(0, BP)
    inputs: tl.constexpr = D if INPUT else 0
    wave = inputs + (cols // D) * (2 * D) + half * D + cols % D
    held = _spare(half, P, D, INPUT, BIAS, BP)
    return tl.where(cols < P, wave, tl.where(held == D, inputs + 2 * P, held))


@triton.jit
def _turns(x_ptr, rate, rows, N, stride_n, stride_d, P: tl.constexpr, D: tl.constexpr, PERIOD: tl.constexpr,
           BP: tl.constexpr):  # fmt: skip
    """Phase of every wave in turns, whole turns removed. ``rate`` is float64 where float32 is not exact."""
    cols = tl.arange(0, BP)
    at = x_ptr + rows.to(tl.int64)[:, None] * stride_n + (cols % D * stride_d)[None, :]
    phase = tl.load(at, mask=(rows < N)[:, None] & (cols < P)[None, :], other=0.0).to(rate.dtype) * rate
    if PERIOD > 0:
        phase = phase / PERIOD
        return (phase - tl.floor(phase + 0.5)).to(tl.float32)
    else:
        turns = tl.floor(tl.fma(phase, _INV_TURN, 0.5))
        phase = tl.fma(turns, -_TURN_A, phase)
        phase = tl.fma(turns, -_TURN_B, phase)
        return tl.fma(turns, -_TURN_C, phase) * _INV_TURN


@triton.jit
def _fill_spare(
    wave, x_ptr, rows, N, stride_n, stride_d, half: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    INPUT: tl.constexpr, BIAS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    held = _spare(half, P, D, INPUT, BIAS, BP)[None, :]
    features = tl.where(tl.arange(0, BP)[None, :] < P, wave, tl.where(held == D, 1.0, 0.0))
    if INPUT:
        is_input = (held >= 0) & (held < D)
        at = x_ptr + rows.to(tl.int64)[:, None] * stride_n + held * stride_d
        features = tl.where(is_input, tl.load(at, mask=is_input & (rows < N)[:, None], other=0.0), features)
    return features


@triton.jit
def _features(
    t, x_ptr, rows, N, stride_n, stride_d, P: tl.constexpr, D: tl.constexpr, INPUT: tl.constexpr,
    BIAS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Both halves of a tile's features, divided by the power of two that is returned last (usually 1)."""
    sines = _fill_spare(_sine(t), x_ptr, rows, N, stride_n, stride_d, 0, P, D, INPUT, BIAS, BP)
    cosines = _fill_spare(_cosine(t), x_ptr, rows, N, stride_n, stride_d, 1, P, D, INPUT, BIAS, BP)
    restore = 1.0
    if INPUT:
        largest = tl.max(tl.maximum(tl.abs(sines), tl.abs(cosines)))
        excess = tl.maximum(_exponent(largest) - _FEATURE_LIMIT, 0)
        restore = _power(127 + excess)
        sines *= _power(127 - excess)
        cosines *= _power(127 - excess)
    return sines, cosines, restore


@triton.jit
def pack_kernel(
    w_ptr, b_ptr, packed_ptr, unscale_ptr, H, F, padded,
    P: tl.constexpr, D: tl.constexpr, INPUT: tl.constexpr, BIAS: tl.constexpr,
    BH: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[W b] as float16 halves [2, units, 2 BP] over its scale; ``unscale`` gets scale / (2 pi) back."""
    largest = 0.0
    for start in range(0, H * F, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + at, mask=at < H * F, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(w)))
    if BIAS:
        for start in range(0, H, BLOCK):
            at = start + tl.arange(0, BLOCK)
            b = tl.load(b_ptr + at, mask=at < H, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(b)))
    exponent = tl.minimum(tl.maximum(_exponent(largest), _LEAST_WEIGHT), 254)
    tl.store(unscale_ptr, _power(exponent - _TARGET) * _INV_TURN)
    units = (tl.program_id(0) * BH + tl.arange(0, BH))[:, None]
    for half in tl.static_range(2):
        column = _columns(half, P, D, INPUT, BIAS, BP)[None, :]
        used = (units < H) & (column >= 0)
        w = tl.load(w_ptr + units * F + column, mask=used & (column < F), other=0.0).to(tl.float32)
        if BIAS:
            w += tl.load(b_ptr + units, mask=used & (column == F), other=0.0).to(tl.float32)
        high, low = _halves(w * _inverse_power(exponent - _TARGET))
        at = packed_ptr + units * (2 * BP) + half * BP + tl.arange(0, BP)[None, :]
        tl.store(at, high)
        tl.store(at + padded, low)


@triton.jit
def forward_kernel(
    x_ptr, packed_ptr, unscale_ptr, rate_ptr, y_ptr, N, H, padded, stride_n, stride_d,
    P: tl.constexpr, D: tl.constexpr, PERIOD: tl.constexpr, INPUT: tl.constexpr, BIAS: tl.constexpr,
    TERMS: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y = sin(e W^T + b). A program keeps its weights and walks over tiles of points."""
    cols = tl.arange(0, BP)
    units = tl.program_id(1) * BH + tl.arange(0, BH)
    at = packed_ptr + units[:, None] * (2 * BP) + cols[None, :]
    ws, wc = tl.load(at), tl.load(at + BP)
    if TERMS == 3:
        ws_low, wc_low = tl.load(at + padded), tl.load(at + padded + BP)
    unscale = tl.load(unscale_ptr)
    rate = tl.load(rate_ptr + cols // D, mask=cols < P, other=0.0)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        rows = tile * BN + tl.arange(0, BN)
        t = _turns(x_ptr, rate, rows, N, stride_n, stride_d, P, D, PERIOD, BP)
        sines, cosines, restore = _features(t, x_ptr, rows, N, stride_n, stride_d, P, D, INPUT, BIAS, BP)
        s, s_low = _halves(sines)
        c, c_low = _halves(cosines)
        z = tl.zeros((BN, BH), dtype=tl.float32)
        if TERMS == 3:
            z = tl.dot(c, wc_low.T, tl.dot(s, ws_low.T, z))
            z = tl.dot(c_low, wc.T, tl.dot(s_low, ws.T, z))
        z = tl.dot(c, wc.T, tl.dot(s, ws.T, z))
        y = _sine(_fraction_of_turn(z, unscale * restore))
        out = y_ptr + rows.to(tl.int64)[:, None] * H + units[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (units < H)[None, :])


@triton.jit
def weight_grad_kernel(
    g_ptr, x_ptr, packed_ptr, unscale_ptr, rate_ptr, dw_ptr, N, H, padded, stride_n, stride_d,
    P: tl.constexpr, D: tl.constexpr, PERIOD: tl.constexpr, INPUT: tl.constexpr, BIAS: tl.constexpr,
    TERMS: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """One part [H, F + bias] of [dW db] = (dY cos z)^T [e 1], from the tiles of points of this program."""
    cols = tl.arange(0, BP)
    units = tl.program_id(1) * BH + tl.arange(0, BH)
    at = packed_ptr + units[:, None] * (2 * BP) + cols[None, :]
    ws, wc = tl.load(at), tl.load(at + BP)
    if TERMS == 3:
        ws_low, wc_low = tl.load(at + padded), tl.load(at + padded + BP)
    unscale = tl.load(unscale_ptr)
    rate = tl.load(rate_ptr + cols // D, mask=cols < P, other=0.0)[None, :]
    unit_ok = (units < H)[:, None]
    ds = tl.zeros((BH, BP), dtype=tl.float32)
    dc = tl.zeros((BH, BP), dtype=tl.float32)
    top = tl.full((BH,), _LEAST_GRADIENT, dtype=tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        rows = tile * BN + tl.arange(0, BN)
        from_above = g_ptr + rows.to(tl.int64)[None, :] * H + units[:, None]
        grad = tl.load(from_above, mask=unit_ok & (rows < N)[None, :], other=0.0).to(tl.float32)
        t = _turns(x_ptr, rate, rows, N, stride_n, stride_d, P, D, PERIOD, BP)
        sines, cosines, restore = _features(t, x_ptr, rows, N, stride_n, stride_d, P, D, INPUT, BIAS, BP)
        s, s_low = _halves(sines)
        c, c_low = _halves(cosines)
        z = tl.zeros((BH, BN), dtype=tl.float32)
        if TERMS == 3:
            z = tl.dot(wc_low, c.T, tl.dot(ws_low, s.T, z))
            z = tl.dot(wc, c_low.T, tl.dot(ws, s_low.T, z))
        z = tl.dot(wc, c.T, tl.dot(ws, s.T, z))
        g = grad * _cosine(_fraction_of_turn(z, unscale * restore))
        # Sums stand relative to the largest gradient so far of their unit, as in a running softmax.
        peak = tl.maximum(top, _exponent(tl.max(tl.abs(g), axis=1) * restore))
        shrink = _power(tl.maximum(127 + top - peak, 0))[:, None]
        top = peak
        g, g_low = _halves(g * (_inverse_power(peak - _TARGET) * restore)[:, None])
        if TERMS == 3:
            # Tensor cores cut sums off instead of rounding: over many tiles that must not be the running sum.
            ds = ds * shrink + tl.dot(g, s, tl.dot(g_low, s, tl.dot(g, s_low)))
            dc = dc * shrink + tl.dot(g, c, tl.dot(g_low, c, tl.dot(g, c_low)))
        else:
            ds = tl.dot(g, s, ds * shrink)
            dc = tl.dot(g, c, dc * shrink)
    width: tl.constexpr = 2 * P + (D if INPUT else 0) + (1 if BIAS else 0)
    out = dw_ptr + (tl.program_id(0).to(tl.int64) * H + units)[:, None] * width
    column = _columns(0, P, D, INPUT, BIAS, BP)[None, :]
    tl.store(out + column, ds * _power(top - _TARGET)[:, None], mask=unit_ok & (column >= 0))
    column = _columns(1, P, D, INPUT, BIAS, BP)[None, :]
    tl.store(out + column, dc * _power(top - _TARGET)[:, None], mask=unit_ok & (column >= 0))


@triton.jit
def coordinate_grad_kernel(
    g_ptr, x_ptr, packed_ptr, unscale_ptr, rate_ptr, dx_ptr, N, H, padded, stride_n, stride_d,
    P: tl.constexpr, D: tl.constexpr, PERIOD: tl.constexpr, INPUT: tl.constexpr, BIAS: tl.constexpr,
    TERMS: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """dx [N, D]: dE = (dY cos z) W, then through the sines and cosines of one tile of points."""
    cols = tl.arange(0, BP)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    unscale = tl.load(unscale_ptr)
    rate = tl.load(rate_ptr + cols // D, mask=cols < P, other=0.0)[None, :]
    t = _turns(x_ptr, rate, rows, N, stride_n, stride_d, P, D, PERIOD, BP)
    sines, cosines, restore = _features(t, x_ptr, rows, N, stride_n, stride_d, P, D, INPUT, BIAS, BP)
    s, s_low = _halves(sines)
    c, c_low = _halves(cosines)
    ds = tl.zeros((BN, BP), dtype=tl.float32)
    dc = tl.zeros((BN, BP), dtype=tl.float32)
    top = tl.full((BN,), _LEAST_GRADIENT, dtype=tl.int32)
    for start in range(0, H, BH):
        units = start + tl.arange(0, BH)
        from_above = g_ptr + rows.to(tl.int64)[:, None] * H + units[None, :]
        grad = tl.load(from_above, mask=(rows < N)[:, None] & (units < H)[None, :], other=0.0).to(tl.float32)
        at = packed_ptr + units[:, None] * (2 * BP) + cols[None, :]
        ws, wc = tl.load(at), tl.load(at + BP)
        z = tl.zeros((BN, BH), dtype=tl.float32)
        if TERMS == 3:
            ws_low, wc_low = tl.load(at + padded), tl.load(at + padded + BP)
            z = tl.dot(c, wc_low.T, tl.dot(s, ws_low.T, z))
            z = tl.dot(c_low, wc.T, tl.dot(s_low, ws.T, z))
        z = tl.dot(c, wc.T, tl.dot(s, ws.T, z))
        g = grad * _cosine(_fraction_of_turn(z, unscale * restore))
        peak = tl.maximum(top, _exponent(tl.max(tl.abs(g), axis=1)))
        shrink = _power(tl.maximum(127 + top - peak, 0))[:, None]
        top = peak
        g, g_low = _halves(g * _inverse_power(peak - _TARGET)[:, None])
        if TERMS == 3:
            ds = ds * shrink + tl.dot(g, ws, tl.dot(g_low, ws, tl.dot(g, ws_low)))
            dc = dc * shrink + tl.dot(g, wc, tl.dot(g_low, wc, tl.dot(g, wc_low)))
        else:
            ds = tl.dot(g, ws, ds * shrink)
            dc = tl.dot(g, wc, dc * shrink)
    scale = (_power(top - _TARGET) * (unscale * _TURN))[:, None]
    ds *= scale
    dc *= scale
    speed = rate.to(tl.float32)
    if PERIOD > 0:
        speed = speed * (_TURN / PERIOD)
    share = (ds * _cosine(t) - dc * _sine(t)) * speed
    for d in tl.static_range(D):
        dx = tl.sum(tl.where(((cols % D == d) & (cols < P))[None, :], share, 0.0), axis=1)
        if INPUT:
            dx += tl.sum(tl.where((_spare(0, P, D, INPUT, BIAS, BP) == d)[None, :], ds, 0.0), axis=1)
            dx += tl.sum(tl.where((_spare(1, P, D, INPUT, BIAS, BP) == d)[None, :], dc, 0.0), axis=1)
        tl.store(dx_ptr + rows.to(tl.int64) * D + d, dx, mask=rows < N)


@triton.jit
def stack_kernel(
    x_ptr, packed_ptr, unscale_ptr, rate_ptr, w_ptr, b_ptr, y_ptr, N, H, H2, stride_n, stride_d,
    P: tl.constexpr, D: tl.constexpr, PERIOD: tl.constexpr, INPUT: tl.constexpr, BIAS: tl.constexpr,
    DOT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y = relu(sin(e W^T + b) W2^T + b2) in 16 bits; the sines of a tile never leave the multiprocessor."""
    cols = tl.arange(0, BP)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    outputs = tl.program_id(1) * BH + tl.arange(0, BH)
    unscale = tl.load(unscale_ptr)
    rate = tl.load(rate_ptr + cols // D, mask=cols < P, other=0.0)[None, :]
    t = _turns(x_ptr, rate, rows, N, stride_n, stride_d, P, D, PERIOD, BP)
    sines, cosines, restore = _features(t, x_ptr, rows, N, stride_n, stride_d, P, D, INPUT, BIAS, BP)
    s, c = sines.to(tl.float16), cosines.to(tl.float16)
    total = tl.zeros((BN, BH), dtype=tl.float32)
    for start in range(0, H, BK):
        units = start + tl.arange(0, BK)
        at = packed_ptr + units[:, None] * (2 * BP) + cols[None, :]
        z = tl.dot(c, tl.load(at + BP).T, tl.dot(s, tl.load(at).T))
        hidden = _sine(_fraction_of_turn(z, unscale * restore)).to(DOT)
        # Rows of W2 beyond H2 are cut off at the store, its columns beyond H meet the sine of 0.
        used = (outputs < H2)[:, None] & (units < H)[None, :]
        w = tl.load(w_ptr + outputs[:, None] * H + units[None, :], mask=used, other=0.0).to(DOT)
        total = tl.dot(hidden, w.T, total)
    total += tl.load(b_ptr + outputs, mask=outputs < H2, other=0.0).to(tl.float32)[None, :]
    out = y_ptr + rows.to(tl.int64)[:, None] * H2 + outputs[None, :]
    y = tl.maximum(total, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(out, y, mask=(rows < N)[:, None] & (outputs < H2)[None, :])


INTERPRETED = isinstance(forward_kernel, InterpretedFunction)

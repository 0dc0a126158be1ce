"""Triton kernels of the gather: one thread a 16-byte unit of the output, whatever the row width.

The output is cut into equal blocks of units, so that small rows share a program and long rows are spread
over several. Source addresses are passed as integers: a kernel reads device, peer
and pinned host memory alike. The twins are in ``gather.py``.

Random rows of a large pinned table are slow for another reason than bandwidth: nearly each of them needs a
translation that the GPU has not at hand. Such rows are read in the order of their addresses, by few
programs, so that those in flight lie close together.
"""

# Jitted functions take no annotations but constexpr, and every argument by position.
# ruff: noqa: ANN001, ANN202, PLR0917
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class LaunchShape:
    """How a gather is cut: units of a block, warps of a program, most programs (0: one for each block)."""

    block_units: int = 512
    num_warps: int = 4
    programs: int = 0


# By where the rows lie and, for device memory, the bytes of a row from which a shape holds.
DEVICE_SHAPES = ((0, LaunchShape()),)
HOST_SHAPE = LaunchShape()
ORDERED_HOST_SHAPE = LaunchShape(programs=264)
# Sorting (about 0.1 ms) pays from these sizes on: bytes asked for, and bytes of the host tables they lie in.
ORDERED_REQUEST_BYTES = 32 << 20
ORDERED_TABLE_BYTES = 256 << 20

_SOURCE_SHIFT = tl.constexpr(48)
_ROW_MASK = tl.constexpr((1 << 48) - 1)


@triton.jit
def _row_address(
    code, b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7, N_SOURCES: tl.constexpr
):
    """Address in bytes of the row that each code names; base b_s, row stride t_s of source s."""
    source = code >> _SOURCE_SHIFT
    row = code & _ROW_MASK
    base = b0
    stride = t0
    if N_SOURCES > 1:
        base = tl.where(source == 1, b1, base)
        stride = tl.where(source == 1, t1, stride)
    if N_SOURCES > 2:
        base = tl.where(source == 2, b2, base)
        stride = tl.where(source == 2, t2, stride)
    if N_SOURCES > 3:
        base = tl.where(source == 3, b3, base)
        stride = tl.where(source == 3, t3, stride)
    if N_SOURCES > 4:
        base = tl.where(source == 4, b4, base)
        stride = tl.where(source == 4, t4, stride)
    if N_SOURCES > 5:
        base = tl.where(source == 5, b5, base)
        stride = tl.where(source == 5, t5, stride)
    if N_SOURCES > 6:
        base = tl.where(source == 6, b6, base)
        stride = tl.where(source == 6, t6, stride)
    if N_SOURCES > 7:
        base = tl.where(source == 7, b7, base)
        stride = tl.where(source == 7, t7, stride)
    return base + row * stride


@triton.jit
def _not_skipped(code, SKIPPED: tl.constexpr):
    """False for rows of a source whose bit is set in SKIPPED: the caller fetches those."""
    return ((SKIPPED >> (code >> _SOURCE_SHIFT)) & 1) == 0


@triton.jit
def _load_units(address, keep, out_ptr, LANES: tl.constexpr, ITEM: tl.constexpr):
    """Units at ``address`` (bytes), ``[BLOCK, LANES]`` items of the output's dtype."""
    lane = tl.arange(0, LANES)
    pointer = (address[:, None] + lane[None, :] * ITEM).to(tl.pointer_type(out_ptr.dtype.element_ty))
    pointer = tl.max_contiguous(tl.multiple_of(pointer, (ITEM, LANES * ITEM)), (1, LANES))
    return tl.load(pointer, mask=keep[:, None], other=0)


@triton.jit
def _copy_block(
    block, out_ptr, code_ptr, index_ptr, order_ptr, total_units,
    b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7,
    N_SOURCES: tl.constexpr, ROW_UNITS: tl.constexpr, LANES: tl.constexpr, ITEM: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_ORDER: tl.constexpr, SKIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, c] = unit c of the row code[index[r]], for the BLOCK units u = position(r) * ROW_UNITS + c."""
    start = tl.cast(block, tl.int64) * BLOCK
    first_row = start // ROW_UNITS
    local = (start - first_row * ROW_UNITS).to(tl.int32) + tl.arange(0, BLOCK)
    row = first_row + local // ROW_UNITS
    column = (local % ROW_UNITS).to(tl.int64)
    unit = start + tl.arange(0, BLOCK)
    live = unit < total_units
    if HAS_ORDER:
        row = tl.load(order_ptr + row, mask=live, other=0)
        unit = row * ROW_UNITS + column
    if HAS_INDEX:
        row = tl.load(index_ptr + row, mask=live, other=0)
    code = tl.load(code_ptr + row, mask=live, other=0)
    keep = live
    if SKIPPED != 0:
        keep = live & _not_skipped(code, SKIPPED)
    address = _row_address(
        code, b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7, N_SOURCES
    )  # fmt: skip
    values = _load_units(address + column * (LANES * ITEM), keep, out_ptr, LANES, ITEM)
    target = unit[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tl.store(out_ptr + target, values, mask=keep[:, None])


@triton.jit(do_not_specialize=["total_units", "blocks"])
def _gather_rows_kernel(
    out_ptr, code_ptr, index_ptr, order_ptr, total_units, blocks,
    b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7,
    N_SOURCES: tl.constexpr, ROW_UNITS: tl.constexpr, LANES: tl.constexpr, ITEM: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_ORDER: tl.constexpr, SKIPPED: tl.constexpr, MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block a program, or with MANY as many as there are programs too few."""
    if MANY:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            _copy_block(
                block, out_ptr, code_ptr, index_ptr, order_ptr, total_units,
                b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7,
                N_SOURCES, ROW_UNITS, LANES, ITEM, HAS_INDEX, HAS_ORDER, SKIPPED, BLOCK,
            )  # fmt: skip
    else:
        _copy_block(
            tl.program_id(0), out_ptr, code_ptr, index_ptr, order_ptr, total_units,
            b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7,
            N_SOURCES, ROW_UNITS, LANES, ITEM, HAS_INDEX, HAS_ORDER, SKIPPED, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "total_units"])
def _gather_segments_kernel(
    out_ptr, first_ptr, count_ptr, shift_ptr, fill_ptr, length, total_units,
    b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7,
    N_SOURCES: tl.constexpr, ROW_UNITS: tl.constexpr, LANES: tl.constexpr, ITEM: tl.constexpr,
    HAS_FILL: tl.constexpr, SKIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Position p = u // ROW_UNITS of the windows: row p % length - shift of its segment, or the fill."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_position = start // ROW_UNITS
    local = (start - first_position * ROW_UNITS).to(tl.int32) + tl.arange(0, BLOCK)
    position = first_position + local // ROW_UNITS
    column = (local % ROW_UNITS).to(tl.int64)
    unit = start + tl.arange(0, BLOCK)
    live = unit < total_units
    segment = position // length
    count = tl.load(count_ptr + segment, mask=live, other=0)
    within = position - segment * length - tl.load(shift_ptr + segment, mask=live, other=0)
    inside = live & (within >= 0) & (within < count)
    code = tl.load(first_ptr + segment, mask=inside, other=0) + tl.where(inside, within, 0)
    keep = inside
    if SKIPPED != 0:
        keep = inside & _not_skipped(code, SKIPPED)
    address = _row_address(
        code, b0, b1, b2, b3, b4, b5, b6, b7, t0, t1, t2, t3, t4, t5, t6, t7, N_SOURCES
    )  # fmt: skip
    values = _load_units(address + column * (LANES * ITEM), keep, out_ptr, LANES, ITEM)
    lanes = tl.arange(0, LANES)[None, :]
    if HAS_FILL:
        outside = live & (inside == 0)
        fill = tl.load(fill_ptr + column[:, None] * LANES + lanes, mask=outside[:, None], other=0)
        values = tl.where(inside[:, None], values, fill)
    tl.store(out_ptr + unit[:, None] * LANES + lanes, values, mask=live[:, None])


def gather_rows(
    sources: list[Tensor],
    code: Tensor,
    index: Tensor | None,
    out: Tensor,
    *,
    skipped: list[int],
    unit_bytes: int,
    order: Tensor | None = None,
    shape: LaunchShape | None = None,
) -> None:
    """Launch the row gather on checked arguments.

    Args:
        sources: views ``[rows_s, n]`` of one integer dtype that ``out.device`` can address.
        code: int64 ``[M]`` or the table that ``index`` reads.
        index: int64 ``[M]`` or None.
        out: contiguous ``[M, n]`` of the sources' dtype.
        skipped: sources to leave out (their rows of ``out`` are not written).
        unit_bytes: bytes a thread moves at once: 16 or the item size.
        order: int64 ``[M]``, a permutation: in which order rows are copied.
        shape: chosen by row width and place when absent.
    """
    lanes, row_units = _unit_shape(out, unit_bytes)
    total = out.shape[0] * row_units
    shape = shape or shape_for(sources, row_units * unit_bytes, ordered=order is not None)
    blocks = triton.cdiv(total, shape.block_units)
    programs = min(blocks, shape.programs or blocks)
    _launch(
        _gather_rows_kernel, programs, shape, out,
        (out, code, index, order, total, blocks, *_addresses(sources, out.element_size())),
        N_SOURCES=len(sources), ROW_UNITS=row_units, LANES=lanes, ITEM=out.element_size(),
        HAS_INDEX=index is not None, HAS_ORDER=order is not None, SKIPPED=sum(1 << s for s in skipped),
        MANY=programs < blocks,
    )  # fmt: skip


def shape_for(sources: list[Tensor], row_bytes: int, *, ordered: bool) -> LaunchShape:
    """The launch shape for rows of this width that lie where ``sources`` do."""
    if any(source.device.type == "cpu" for source in sources):
        return ORDERED_HOST_SHAPE if ordered else HOST_SHAPE
    return next(shape for least, shape in reversed(DEVICE_SHAPES) if row_bytes >= least)


def copy_order(sources: list[Tensor], code: Tensor, index: Tensor | None, out: Tensor) -> Tensor | None:
    """The order by address in which rows should be copied, or None where sorting does not pay."""
    host_bytes = sum(source.nbytes for source in sources if source.device.type == "cpu")
    if host_bytes < ORDERED_TABLE_BYTES or out.nbytes < ORDERED_REQUEST_BYTES or out.device.type == "cpu":
        return None
    return torch.argsort(code if index is None else code[index])


def gather_segments(
    sources: list[Tensor],
    first: Tensor,
    count: Tensor,
    shift: Tensor,
    length: int,
    fill: Tensor | None,
    out: Tensor,
    *,
    skipped: list[int],
    unit_bytes: int,
    shape: LaunchShape = HOST_SHAPE,
) -> None:
    """Launch the segment gather on checked arguments.

    ``out`` is ``[B * length, n]``, ``fill`` ``[1, n]`` or None; the rest as in :func:`gather_rows`.
    Positions of skipped sources are set to zero.
    """
    lanes, row_units = _unit_shape(out, unit_bytes)
    total = out.shape[0] * row_units
    _launch(
        _gather_segments_kernel, triton.cdiv(total, shape.block_units), shape, out,
        (out, first, count, shift, out if fill is None else fill, length, total,
         *_addresses(sources, out.element_size())),
        N_SOURCES=len(sources), ROW_UNITS=row_units, LANES=lanes, ITEM=out.element_size(),
        HAS_FILL=fill is not None, SKIPPED=sum(1 << s for s in skipped),
    )  # fmt: skip


def _unit_shape(out: Tensor, unit_bytes: int) -> tuple[int, int]:
    lanes = unit_bytes // out.element_size()
    return lanes, out.shape[1] // lanes


def _addresses(sources: list[Tensor], item: int) -> list[int | None]:
    unused: list[int | None] = [None] * (8 - len(sources))
    bases = [source.data_ptr() for source in sources]
    return [*bases, *unused, *(source.stride(0) * item for source in sources), *unused]


def _launch(
    kernel: Any, programs: int, shape: LaunchShape, out: Tensor, arguments: tuple[Any, ...], **constants: Any
) -> None:
    if out.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "backend='triton' on the CPU needs TRITON_INTERPRET=1 before Triton is imported"
            )
        kernel[(programs,)](*arguments, **constants, BLOCK=shape.block_units)
        return
    with torch.cuda.device(out.device):
        kernel[(programs,)](*arguments, **constants, BLOCK=shape.block_units, num_warps=shape.num_warps)

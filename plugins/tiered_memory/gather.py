"""Gather rows and segments that lie in several memory tiers, in request order.

A row is named by a code: ``source * 2**48 + row``. A source is a tensor of rows; it may lie on the
destination device, a peer device, in pinned or pageable host memory, or in a mapped file. The functions
here check their arguments, run the torch twin or call the Triton kernels of ``kernels.py``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

MAX_SOURCES = 8
SOURCE_SHIFT = 48
ROW_MASK = (1 << SOURCE_SHIFT) - 1

_UNITS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def row_code(source: Tensor | int, row: Tensor) -> Tensor:
    """Name rows for :func:`gather_rows`.

    Args:
        source: number of the source, 0..7; an int or int64 of ``row``'s shape.
        row: int64 row numbers inside the source.

    Returns:
        ``source * 2**48 + row``, int64 of ``row``'s shape. A plain row number thus names source 0.
    """
    return row + (source << SOURCE_SHIFT)


def gather_rows(
    sources: Tensor | Sequence[Tensor],
    code: Tensor,
    index: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Copy the rows that ``code`` names, bit for bit, in request order.

    Args:
        sources: 1..8 tensors ``[rows_s, *row]`` of equal ``*row`` and dtype; each row is contiguous, the
            stride between rows is free.
        code: int64 ``[M]`` (see :func:`row_code`), or with ``index`` the table ``[N]`` it reads.
        index: int64 ``[M]``; row ``i`` of the result is then the row ``code[index[i]]`` names.
        out: contiguous ``[M, *row]`` on the device of the index tensors; allocated when absent.
        backend: "auto" is Triton for a CUDA destination and torch otherwise. "triton" on the CPU needs
            ``TRITON_INTERPRET=1`` in the environment before Triton is imported.

    Returns:
        ``out``, ``[M, *row]``.

    Raises:
        ValueError: no source or more than 8, sources that differ, a wrong ``out``, index tensors on
            several devices.
        IndexError: a code or index out of range (on the CPU; on CUDA bounds are the caller's duty).
    """
    tables = _check_sources(sources)
    requests = code if index is None else index
    device = requests.device
    _check_index("code", code, device)
    if index is not None:
        _check_index("index", index, device)
    row = tables[0].shape[1:]
    out = _check_out(out, (requests.numel(), *row), tables[0].dtype, device)
    views, unit = _unit_views([*tables, out])
    if backend == "auto" and device.type == "cpu" and (len(tables) > 1 or index is not None) and _numba():
        from tiered_memory import cpu_loops

        if cpu_loops.gather_rows(views[:-1], code, index, views[-1]) < 0:
            return out
    if device.type == "cpu":
        if index is not None:
            _check_range("index", index, code.numel(), "code")
        _check_codes(tables, code if index is None else code[index])
    if out.numel() == 0:
        return out
    if _use_triton(backend, device):
        from tiered_memory import kernels

        host = [s for s, table in enumerate(tables) if not addressable(table, device)]
        order = kernels.copy_order(views[:-1], code, index, views[-1])
        kernels.gather_rows(views[:-1], code, index, views[-1], skipped=host, unit_bytes=unit, order=order)
        if host:
            wanted = code if index is None else code[index]
            _rows_by_source(views[:-1], wanted, views[-1], only=host)
        return out
    _rows_by_source(views[:-1], code if index is None else code[index], views[-1])
    return out


def gather_segments(
    sources: Tensor | Sequence[Tensor],
    first: Tensor,
    count: Tensor,
    shift: Tensor,
    length: int,
    *,
    fill: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Copy runs of consecutive rows into equally long, filled windows.

    ``out[b, shift[b] : shift[b] + count[b]]`` are the rows ``first[b] ..``; every other position is ``fill``.

    Args:
        sources: as for :func:`gather_rows`.
        first: int64 ``[B]``, the code of each segment's first row; a segment lies in one source. Ignored
            where ``count`` is 0.
        count: int64 ``[B]``, rows in each segment.
        shift: int64 ``[B]``, position of the first row in its window; ``0 <= shift`` and
            ``shift + count <= length``.
        length: positions in a window.
        fill: one row ``[*row]`` of the sources' dtype on the destination device; None fills with zeros.
        out: contiguous ``[B, length, *row]``; allocated when absent.
        backend: as for :func:`gather_rows`.

    Returns:
        ``out``, ``[B, length, *row]``.

    Raises:
        ValueError: as for :func:`gather_rows`, and on the CPU for a count or shift out of range.
        IndexError: a segment that leaves its source (on the CPU).
    """
    tables = _check_sources(sources)
    device = first.device
    for name, tensor in (("first", first), ("count", count), ("shift", shift)):
        _check_index(name, tensor, device)
        if tensor.numel() != first.numel():
            raise ValueError(
                f"{name} has {tensor.numel()} entries, first has {first.numel()}: one per segment"
            )
    if length < 0:
        raise ValueError(f"length is {length}; it must not be negative")
    row, dtype = tables[0].shape[1:], tables[0].dtype
    if fill is not None and (fill.shape != row or fill.dtype != dtype or fill.device != device):
        raise ValueError(
            f"fill is {tuple(fill.shape)} {fill.dtype} on {fill.device}; "
            f"needed: one row, {tuple(row)} {dtype} on {device}"
        )
    out = _check_out(out, (first.numel(), length, *row), dtype, device)
    flat_out = out.view(first.numel() * length, *row)
    windows = [*tables, flat_out] if fill is None else [*tables, flat_out, fill.contiguous().unsqueeze(0)]
    views, unit = _unit_views(windows)
    source_views, out_view = views[: len(tables)], views[len(tables)]
    fill_view = None if fill is None else views[-1]
    if backend == "auto" and device.type == "cpu" and _numba():
        from tiered_memory import cpu_loops

        if cpu_loops.gather_segments(source_views, first, count, shift, length, fill_view, out_view) < 0:
            return out
    if device.type == "cpu":
        _check_segments(tables, first, count, shift, length)
    if out.numel() == 0:
        return out
    if _use_triton(backend, device):
        from tiered_memory import kernels

        host = [s for s, table in enumerate(tables) if not addressable(table, device)]
        kernels.gather_segments(
            source_views, first, count, shift, length, fill_view, out_view, skipped=host, unit_bytes=unit
        )
        if host:
            at, wanted = _segment_positions(first, count, shift, length)
            _rows_by_source(source_views, wanted, out_view, at=at, only=host)
        return out
    if fill_view is None:
        out_view.zero_()
    else:
        out_view.copy_(fill_view.expand_as(out_view))
    at, wanted = _segment_positions(first, count, shift, length)
    _rows_by_source(source_views, wanted, out_view, at=at)
    return out


@cache
def peer_access(reader: int, owner: int) -> bool:
    """Whether kernels on CUDA device ``reader`` can read the memory of ``owner``; enabled on the first call.

    False where the hardware has no peer access or there are no such devices, True for a device itself.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not (0 <= reader < count and 0 <= owner < count):
        return False
    if reader == owner:
        return True
    if not torch.cuda.can_device_access_peer(reader, owner):
        return False
    # PyTorch enables access when it first copies between two devices, and only from the source to the
    # destination: the reader must be the one that copies.
    torch.zeros(1, device=f"cuda:{reader}").to(f"cuda:{owner}")
    return True


def addressable(source: Tensor, device: torch.device) -> bool:
    """Whether a kernel on ``device`` can read ``source`` in place."""
    if device.type == "cpu":
        return source.device.type == "cpu"
    if source.device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return peer_access(index, source.device.index)
    return source.is_pinned()


@cache
def _numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _use_triton(backend: Backend, device: torch.device) -> bool:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; it must be 'auto', 'torch' or 'triton'")
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _check_sources(sources: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tables = [sources] if isinstance(sources, Tensor) else list(sources)
    if not 1 <= len(tables) <= MAX_SOURCES:
        raise ValueError(f"sources has {len(tables)} tensors; it must have 1 to {MAX_SOURCES}")
    row, dtype = tables[0].shape[1:], tables[0].dtype
    for s, table in enumerate(tables):
        if table.dim() == 0:
            raise ValueError(f"sources[{s}] is a scalar; it must be [rows, *row]")
        if table.shape[1:] != row:
            raise ValueError(f"sources[{s}] has rows {tuple(table.shape[1:])}, sources[0] has {tuple(row)}")
        if table.dtype != dtype:
            raise ValueError(f"sources[{s}] is {table.dtype}, sources[0] is {dtype}")
        if not table.is_contiguous() and not _rows_contiguous(table):
            raise ValueError(
                f"sources[{s}] has strides {table.stride()}: each row must be contiguous (call .contiguous())"
            )
    return tables


def _rows_contiguous(table: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(table.shape[1:]), reversed(table.stride()[1:]), strict=True):
        if size != 1 and stride != expected and table.numel():
            return False
        expected *= size
    return True


def _check_index(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be int64 with one dimension"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other index tensors are on {device}")


def _check_out(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, contiguous={out.is_contiguous()}; "
            f"needed: {tuple(shape)} {dtype} on {device}, contiguous"
        )
    return out


def _check_range(name: str, values: Tensor, limit: int, of: str) -> None:
    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)
    if int(low) >= 0 and int(high) < limit:
        return
    i = int(((values < 0) | (values >= limit)).nonzero()[0, 0])
    raise IndexError(f"{name}[{i}] is {int(values[i])}, but {of} has {limit} entries")


def _check_codes(tables: list[Tensor], code: Tensor, name: str = "code", extra: Tensor | None = None) -> None:
    """Refuse codes whose row (or the row ``extra`` rows on) is not there."""
    if code.numel() == 0:
        return
    if len(tables) == 1 and extra is None:
        low, high = torch.aminmax(code)
        if int(low) >= 0 and int(high) < tables[0].shape[0]:
            return
    source, row = code >> SOURCE_SHIFT, code & ROW_MASK
    last = row if extra is None else row + extra
    rows = torch.tensor([table.shape[0] for table in tables], dtype=torch.int64)
    bad_source = (source < 0) | (source >= len(tables))
    bad = (bad_source | (last >= rows[source.clamp(0, len(tables) - 1)])).nonzero()
    if not bad.numel():
        return
    i = int(bad[0, 0])
    if bad_source[i]:
        raise IndexError(f"{name}[{i}] names source {int(source[i])}, but there are {len(tables)} sources")
    what = f"row {int(row[i])}" if extra is None else f"rows {int(row[i])} to {int(last[i])}"
    raise IndexError(
        f"{name}[{i}] names {what} of source {int(source[i])}, which has {int(rows[source[i]])} rows"
    )


def _check_segments(tables: list[Tensor], first: Tensor, count: Tensor, shift: Tensor, length: int) -> None:
    bad = ((count < 0) | (shift < 0) | (shift + count > length)).nonzero()
    if bad.numel():
        b = int(bad[0, 0])
        raise ValueError(
            f"segment {b} has count {int(count[b])} at shift {int(shift[b])}: "
            f"neither may be negative, nor their sum exceed length {length}"
        )
    some = count > 0
    if not bool(some.all()):
        first, count = first[some], count[some]
    _check_codes(tables, first, "first", count - 1)


def _unit_views(tensors: list[Tensor]) -> tuple[list[Tensor], int]:
    """View ``[rows, *row]`` tensors as ``[rows, n]`` of the widest integer that all rows and bases allow.

    Returns the views and the unit in bytes: 16 where two int64 may be moved at once.
    """
    row_items = math.prod(tensors[0].shape[1:])
    item = tensors[0].element_size()
    strides = [tensor.stride(0) if tensor.shape[0] > 1 else row_items for tensor in tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]
    common = math.gcd(row_items * item, *(stride * item for stride in strides), *addresses, 16)
    width, unit = next((w, d) for w, d in _UNITS if common % w == 0)
    views = []
    for tensor, stride in zip(tensors, strides, strict=True):
        flat = tensor
        if tensor.dim() != 2 or tensor.stride() != (stride, 1):
            flat = tensor.as_strided((tensor.shape[0], row_items), (stride, 1))
        if tensor.dtype != unit:
            flat = flat.view(unit) if item == width else flat.view(torch.uint8).view(unit)
        views.append(flat)
    return views, 16 if common == 16 else width


def _segment_positions(first: Tensor, count: Tensor, shift: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Flat window positions that hold a row, and the codes of those rows."""
    within = torch.arange(length, device=first.device).unsqueeze(0) - shift.unsqueeze(1)
    inside = (within >= 0) & (within < count.unsqueeze(1))
    at = inside.flatten().nonzero().squeeze(1)
    return at, (first.unsqueeze(1) + within).flatten()[at]


def _rows_by_source(
    sources: list[Tensor],
    code: Tensor,
    out: Tensor,
    *,
    at: Tensor | None = None,
    only: list[int] | None = None,
) -> None:
    """``out[at[i]]`` (``out[i]`` without ``at``) = the row ``code[i]`` names, one source after the other."""
    if only is None and len(sources) == 1 and at is None and sources[0].device == out.device:
        torch.index_select(sources[0], 0, code, out=out)
        return
    which, row = code >> SOURCE_SHIFT, code & ROW_MASK
    for s, source in enumerate(sources):
        if only is not None and s not in only:
            continue
        if len(sources) == 1:
            here, wanted = None, row
        else:
            here = (which == s).nonzero().squeeze(1)
            if here.numel() == 0:
                continue
            wanted = row[here]
        target = here if at is None else (at if here is None else at[here])
        rows = _select(source, wanted, out.device)
        if target is None:
            out.copy_(rows)
        else:
            out.index_copy_(0, target, rows)


def _select(source: Tensor, row: Tensor, device: torch.device) -> Tensor:
    """``source[row]`` on ``device``; host rows travel to CUDA through pinned staging."""
    if source.device == device:
        return source.index_select(0, row)
    row = row.to(source.device)
    if source.device.type != "cpu":
        return source.index_select(0, row).to(device)
    staging = torch.empty((row.numel(), source.shape[1]), dtype=source.dtype, pin_memory=True)
    torch.index_select(source, 0, row, out=staging)
    return staging.to(device, non_blocking=True)

"""Copies from one process's page-locked memory into GPU memory of another, through CUDA's IPC handles.

The engine exports the allocations that hold its parameters; the store opens them and copies into them. So an
engine gets a model at the speed of the link without page-locking anything itself. Plain calls of the driver:
nothing that is received is unpickled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class DriverError(RuntimeError):
    """The driver refused a call, e.g. for expandable segments, or containers that share no IPC."""


def _call(name: str, *arguments: Any) -> None:
    code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if code != 0:
        raise DriverError(f"{name} failed with CUDA error {code}")


def export(tensors: Sequence[Tensor]) -> list[tuple[str, int]]:
    """(IPC handle as hex digits, byte offset in its allocation) of each contiguous CUDA tensor.

    Raises:
        DriverError: the memory cannot be shared.
    """
    handles: dict[int, str] = {}
    exported = []
    for tensor in tensors:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        address = ctypes.c_uint64(tensor.data_ptr())
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        if base.value not in handles:
            handle = _Handle()
            _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
            handles[base.value] = bytes(ctypes.string_at(ctypes.byref(handle), 64)).hex()
        exported.append((handles[base.value], tensor.data_ptr() - base.value))
    return exported


def device_uuid(device: torch.device) -> str:
    """Identity of a GPU that does not depend on CUDA_VISIBLE_DEVICES."""
    return str(torch.cuda.get_device_properties(device).uuid)


def find_device(uuid: str) -> int:
    """This process's number of a GPU.

    Raises:
        DriverError: it is not visible here.
    """
    for number in range(torch.cuda.device_count()):
        if device_uuid(torch.device("cuda", number)) == uuid:
            return number
    raise DriverError(f"the store process sees no GPU {uuid}")


class RemoteMemory:
    """Another process's allocations on one GPU, opened for writing. Context manager."""

    def __init__(self, device: int) -> None:
        self._opened: dict[str, int] = {}
        self._stream = torch.cuda.Stream(device)
        self._number, self._context = ctypes.c_int(), ctypes.c_void_p()
        _call("cuDeviceGet", ctypes.byref(self._number), device)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._number)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context is this thread's: the driver, unlike the runtime, never sets one by itself."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def copy(self, handle: str, offset: int, source: Tensor) -> None:
        """Queue a copy of ``source`` (CPU, contiguous) to ``offset`` in the allocation."""
        with self._current():
            if handle not in self._opened:
                content = bytes.fromhex(handle)
                if len(content) != 64:
                    raise ValueError(f"an IPC handle has 64 bytes, got {len(content)}")
                structure, address = _Handle.from_buffer_copy(content), ctypes.c_uint64()
                flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
                _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), structure, flags)
                self._opened[handle] = address.value
            _call(
                "cuMemcpyHtoDAsync_v2",
                ctypes.c_uint64(self._opened[handle] + offset),
                ctypes.c_void_p(source.data_ptr()),
                ctypes.c_size_t(source.nbytes),
                ctypes.c_void_p(self._stream.cuda_stream),
            )

    def __enter__(self) -> RemoteMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.synchronize()
        with self._current():
            for address in self._opened.values():
                _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))
        self._opened.clear()
        _call("cuDevicePrimaryCtxRelease_v2", self._number)

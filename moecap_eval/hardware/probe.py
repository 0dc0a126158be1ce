"""Measured peaks of this machine: memory bandwidth and matrix-product rate."""

from __future__ import annotations

import time
from dataclasses import dataclass

_CPU_SIZES = (256, 512, 1024)
_CUDA_SIZES = (4096, 8192)
# float16 products have no fast kernel on most CPUs and would take minutes there.
_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_BANDWIDTH_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class Peaks:
    """What one device reached.

    ``read_bytes_per_s`` and ``copy_bytes_per_s`` are of its fastest memory (a copied byte counts once);
    ``flops_per_s`` is the best square matrix product by dtype, a multiply-add counted as two.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: dict[str, float]


def measure_peaks(device: str = "cpu", seconds: float = 2.0) -> Peaks:
    """Measure ``device`` for about ``seconds``, with the threads PyTorch would use.

    Raises:
        ValueError: a device other than ``"cpu"`` or ``"cuda"``, or no time.
        RuntimeError: ``"cuda"`` without a CUDA device.
    """
    kind = device.partition(":")[0]
    if kind not in _BANDWIDTH_BYTES:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    links = ("host_read", "host_copy") if kind == "cpu" else ("device_read", "device_copy")
    share = seconds / 2
    read, copy = (_bandwidth(link, _BANDWIDTH_BYTES[kind], share / 2) for link in links)
    dtypes = _DTYPES[kind]
    rates = {dtype: _matmul_rate(device, dtype, share / len(dtypes)) for dtype in dtypes}
    return Peaks(read, copy, rates)


def _bandwidth(link: str, nbytes: int, seconds: float) -> float:
    from tiered_memory import measure_bandwidth

    # A peak is the best repetition: other work on the machine can only slow one down.
    return float(max(measure_bandwidth(link, nbytes=nbytes, seconds=seconds).samples))


def _matmul_rate(device: str, dtype: str, seconds: float) -> float:
    """Best rate over sizes and repetitions of square products."""
    sizes = _CUDA_SIZES if device.startswith("cuda") else _CPU_SIZES
    return max(_square_rate(device, dtype, size, seconds / len(sizes)) for size in sizes)


def _square_rate(device: str, dtype: str, size: int, seconds: float) -> float:
    import torch

    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=generator).to(getattr(torch, dtype))
    right, out = left.T.contiguous(), torch.empty_like(left)
    flops = 2 * size**3
    torch.mm(left, right, out=out)
    samples: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < deadline:
        if left.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        if left.is_cuda:
            torch.cuda.synchronize()
        samples.append(flops / (time.perf_counter() - begin))
    return max(samples)

"""Let Megatron-core, which assumes CUDA throughout, train on CPUs over gloo."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed: list[Any] = []


class _CudaIsCpu(TorchFunctionMode):
    """Map the device ``"cuda"`` to the CPU, and call CPU tensors CUDA tensors where their type is asked."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if any(_is_cuda(value) for value in args[1:]):
            args = (args[0], *(torch.device("cpu") if _is_cuda(a) else a for a in args[1:]))
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _Stream:
    """A stream that is always done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        """Nothing runs beside the CPU."""

    def synchronize(self) -> None:
        """Nothing runs beside the CPU."""


@contextlib.contextmanager
def _no_stream(_: Any) -> Iterator[None]:
    yield


def install_cpu_compat() -> None:
    """Replace what Megatron-core calls of ``torch.cuda`` by CPU equivalents, in this process, for good.

    For tests, examples and dry runs on machines without GPUs. Does nothing where CUDA is available or when
    called again.
    """
    _define_missing_name()
    if _installed or torch.cuda.is_available():
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Stream()
    cuda.Stream = _Stream
    cuda.stream = _no_stream
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    module._lazy_call = lambda function, *_, **__: function()
    logging.getLogger(module.__name__).setLevel(logging.ERROR)  # "CPU RNG state changed": here they are one
    mode = _CudaIsCpu()
    mode.__enter__()
    _installed.append(mode)


def _define_missing_name() -> None:
    """Without TransformerEngine, 0.16.1's MoE router looks at a name that was never defined."""
    from megatron.core.transformer.moe import moe_utils

    module: Any = moe_utils
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None

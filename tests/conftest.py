"""Settings every test needs before a framework is imported."""

import os
import sys

import pytest

# vLLM in one process on few cores, without a network (read when vllm is first imported).
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device, and say so."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (make test-gpu)"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Undo what tests of one framework do to those of another in the same process."""
    _hide_dunder_names_of_llvmlite()
    _restore_set_num_threads()


def _restore_set_num_threads() -> None:
    """A vLLM engine for CPUs replaces ``torch.set_num_threads`` by nothing, for good.

    A forked worker that cannot set 1 thread waits forever for OpenMP threads that a fork does not copy.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads = torch._C.set_num_threads


def _hide_dunder_names_of_llvmlite() -> None:
    """Let vLLM start in a process that has imported numba.

    Its CPU platform looks at ``vars(x)`` of everything that any module holds, and llvmlite's handle of its C
    library answers even ``__dict__`` with a C function.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is None or hasattr(ffi, "dunder_names_hidden"):
        return
    library_attribute = ffi._lib_wrapper.__getattr__

    def public_attribute(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return library_attribute(self, name)

    ffi._lib_wrapper.__getattr__ = public_attribute
    ffi.dunder_names_hidden = True

from __future__ import annotations

import subprocess
import sys

import pytest

import tiered_memory

SCRIPT = """
import sys, threading, time
import torch
sys.modules["triton"] = None                      # `import triton` raises ImportError
threads = threading.active_count()
start = time.perf_counter()
import tiered_memory
for name in tiered_memory.__all__:
    getattr(tiered_memory, name)
elapsed = time.perf_counter() - start
assert threading.active_count() == threads, "a thread was started"
assert not torch.cuda.is_initialized(), "CUDA was touched"
print(elapsed)
"""


def test_tm13_import_is_cheap_and_touches_no_device():
    best = min(
        float(
            subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
        )
        for _ in range(2)
    )
    assert best <= 0.1


def test_tm13_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tiered_memory.nothing
    assert set(tiered_memory.__all__) <= set(dir(tiered_memory))

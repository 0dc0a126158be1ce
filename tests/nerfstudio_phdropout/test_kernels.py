"""Run kernel_cases.py with Triton's interpreter, in a process where nothing has imported Triton before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("kernel_cases.py")


def test_ph02_triton_kernel_equals_its_torch_twin():
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    assert " passed" in child.stdout

"""Run kernel_cases.py with Triton's interpreter, in a process where nothing has imported Triton before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spe_layers import SPE

CASES = Path(__file__).with_name("kernel_cases.py")


@pytest.mark.parametrize(
    "feature", ["sp05", "sp06", "sp07", "sp08", "sp14", "sp15", "sp21", "sp24", "refuses"]
)
def test_sp06_sp07_sp21_fused_kernels_equal_the_twin(feature, kernel_results):
    """One child process runs all cases; each feature is judged by its own."""
    names = [name for name in kernel_results if feature in name]
    assert names, "no case has this feature in its name"
    failed = [name for name in names if kernel_results[name] != "passed"]
    assert not failed


@pytest.fixture(scope="module")
def kernel_results(tmp_path_factory) -> dict[str, str]:
    pytest.importorskip("triton")
    report = tmp_path_factory.mktemp("kernels") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", str(CASES)]
    child = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert report.exists(), child.stdout[-3000:] + child.stderr[-3000:]
    sys.stdout.write(child.stdout[-3000:])
    from xml.etree import ElementTree

    cases = ElementTree.parse(report).iter("testcase")
    return {case.attrib["name"]: "passed" if not len(case) else case[0].tag for case in cases}


def test_triton_backend_without_a_device_says_what_it_needs():
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton can run here")
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, or TRITON_INTERPRET=1"):
        SPE(3, 8, 2, backend="triton")(torch.rand(4, 3))

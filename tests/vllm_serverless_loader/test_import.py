"""Importing the package and its core touches neither vLLM, Ray, CUDA nor threads."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, threading
threads = threading.active_count()
import vllm_serverless_loader as package
assert "torch" not in sys.modules
for name in package.__all__:
    if name not in ("register", "VLLMEngine"):
        getattr(package, name)
import vllm_serverless_loader.cli, vllm_serverless_loader.doctor
assert "vllm" not in sys.modules, "vllm"
assert "ray" not in sys.modules, "ray"
import torch
assert not torch.cuda.is_initialized()
assert threading.active_count() == threads
"""


def test_import_is_cheap_and_needs_no_framework():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)

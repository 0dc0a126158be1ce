"""PyG's own loader tests with these loaders in place of PyG's.

They are not part of the installed package: give the folder ``test/loader`` of a PyG checkout of the installed
version, ``PYG_LOADER_TESTS=.../test/loader pytest tests/pyg_quiver/test_pygs_own_tests.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pyg, pytest.mark.slow]
FILES = ("test_neighbor_loader.py", "test_link_neighbor_loader.py")
CONFTEST = """
import pytest


@pytest.fixture
def get_dataset():
    def get(name):
        from torch_geometric.datasets import KarateClub

        assert name == "karate"
        return KarateClub()

    return get
"""


def with_our_loaders(source: str) -> str:
    """Import our loaders, and run what PyG runs only where pyg-lib or torch-sparse is installed."""
    source = re.sub(
        r"from torch_geometric\.loader import (Neighbor|LinkNeighbor)Loader",
        r"from pyg_quiver import \1Loader",
        source,
    )
    source = source.replace("@onlyNeighborSampler\n", "")
    source = re.sub(r"@withPackage\('pyg_lib'(, 'torch_sparse')?\)\n", "", source)
    flags = " = ".join(
        f"WITH_{name}"
        for name in ("PYG_LIB", "TORCH_SPARSE", "WEIGHTED_NEIGHBOR_SAMPLE", "EDGE_TIME_NEIGHBOR_SAMPLE")
    )
    return re.sub(r"\n(def |@)", rf"\n{flags} = True\n\n\n\1", source, count=1)


def test_qv01_pygs_own_loader_tests_pass(tmp_path):
    folder = os.environ.get("PYG_LOADER_TESTS")
    if not folder:
        pytest.skip("PYG_LOADER_TESTS does not name the folder test/loader of a PyG checkout")
    for name in FILES:
        (tmp_path / name).write_text(with_our_loaders((Path(folder) / name).read_text()))
    (tmp_path / "conftest.py").write_text(CONFTEST)
    # The two that are left out compare pyg-lib with torch-sparse and call no loader.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-k",
        "not equality",
    ]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) >= 80, summary

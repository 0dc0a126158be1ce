"""The Triton sampler in the interpreter against the plain-Python sampler (QV-02, QV-05).

The interpreter must be chosen before Triton is imported, so the comparisons run in one process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.pyg

CASES = """
import sys
sys.path.insert(0, {folder!r})
import torch
from quiver_reference import check_backend
from pyg_quiver.backends import triton_gpu
print(check_backend(triton_gpu.sample, device="cpu"))
from pyg_quiver import CSCTopology, QuiverSampler
from quiver_reference import random_edges
topology = CSCTopology.from_edge_index(random_edges(30, 200, 0), 30)
a = QuiverSampler(topology, [3, 2], backend="triton").sample(torch.arange(9), key=4)
b = QuiverSampler(topology, [3, 2], backend="torch").sample(torch.arange(9), key=4)
assert torch.equal(a.node, b.node) and torch.equal(a.row, b.row) and torch.equal(a.edge, b.edge)
assert (triton_gpu._slot_map(30, torch.device("cpu")) == 2**31 - 1).all()
# One launch a hop; seeds, flags, writing and the map's reset; one prefix sum.
launches, sums, launch, cumsum = [], [], triton_gpu._launch, torch.cumsum
triton_gpu._launch = lambda kernel, *a, **k: (launches.append(kernel), launch(kernel, *a, **k))
torch.cumsum = lambda *a, **k: (sums.append(1), cumsum(*a, **k))[1]
sampler = QuiverSampler(topology, [3, 2, 2, 1], backend="triton")
for batch in (1, 30):
    launches.clear(), sums.clear()
    sampler.sample(torch.arange(batch), key=4)
    assert (len(launches), len(sums)) == (8, 1), (launches, sums)
print("done")
"""


def test_qv02_qv05_triton_equals_the_specification_in_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip("test_gpu.py runs the kernels on the device")
    pytest.importorskip("triton")
    code = CASES.format(folder=str(Path(__file__).parent))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "done"


def test_triton_on_a_cpu_without_the_interpreter_is_refused():
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch\n"
        "from pyg_quiver import CSCTopology, QuiverSampler\n"
        "t = CSCTopology(torch.tensor([0, 1]), torch.tensor([0]))\n"
        "try: QuiverSampler(t, [1], backend='triton').sample(torch.tensor([0]))\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs TRITON_INTERPRET=1" in done.stdout

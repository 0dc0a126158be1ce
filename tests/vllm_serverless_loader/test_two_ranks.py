"""Two tensor-parallel ranks of the real vLLM load their own partitions (SL-01).

Three engines of two processes each need two free cores for about two minutes, which other tests then lack, so
this runs on request. vLLM chooses its ports itself; everything runs in a process group of its own, which is
ended when the test ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.support.tiny_models import write_tiny_model
from vllm_serverless_loader import convert, open_checkpoint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("GRAFT_TWO_RANKS") != "1",
        reason="six processes on two cores for two minutes: set GRAFT_TWO_RANKS=1",
    ),
]

RUN = """
import json, sys
from tests.vllm_serverless_loader.engines import greedy_ids

if __name__ == "__main__":
    model, extra = sys.argv[1], json.loads(sys.argv[2])
    ids = greedy_ids(model, extra, tensor_parallel_size=2, distributed_executor_backend="mp")
    print("ids", json.dumps(ids))
"""


@pytest.fixture
def ids_of(tmp_path):
    """Greedy ids of a model on two ranks, in a process group that does not outlive the test."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    groups = []

    def run(model, extra=None):
        process = subprocess.Popen(
            [sys.executable, str(script), str(model), json.dumps(extra)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        groups.append(process.pid)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        return json.loads(next(line for line in output.splitlines() if line.startswith("ids"))[4:])

    yield run
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@pytest.mark.timeout(900)
def test_sl01_two_ranks_give_the_ids_of_auto_with_two_ranks(ids_of, tmp_path):
    model = write_tiny_model("qwen3_moe", tmp_path / "model", num_key_value_heads=2, tie_word_embeddings=True)
    ids = ids_of(model)
    converted = tmp_path / "two"
    assert ids_of(convert(model, tmp_path / "full", layout="full"), {"convert_to": str(converted)}) == ids
    assert ids_of(converted, {}) == ids
    for rank in range(2):
        with open_checkpoint(converted, rank=rank) as checkpoint:
            assert (checkpoint.rank, checkpoint.world_size) == (rank, 2)
            checkpoint.verify()
    with pytest.raises(ValueError, match="was written for tensor_parallel_size=2, running with 1"):
        open_checkpoint(converted, world_size=1)

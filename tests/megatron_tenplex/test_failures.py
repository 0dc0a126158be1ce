"""A worker is killed at every phase of a change: the others get a named error, and replicas take over."""

from __future__ import annotations

import re
import shutil
from functools import cache

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
import tenplex_jobs as jobs

from megatron_tenplex import GPTShape
from megatron_tenplex.testing import WorkerFailedError, run_world
from megatron_tenplex.testing.gpt import GPTJob

pytestmark = pytest.mark.megatron

JOB = GPTJob(GPTShape(4, 32, 4, 128), global_batch_size=12)
STEPS = 2


@pytest.fixture(scope="module")
def steady():
    """The curve of the first layout without any failure."""
    results = run_world(4, jobs.tour, JOB, ["tp=2,pp=2"], 8, timeout=100)
    return [step[0] for step in results[0]["steady"]]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """phase -> what the survivors of a kill at that phase say, and the replicas that are left."""

    @cache
    def run(phase):
        root = tmp_path_factory.mktemp(phase)
        with pytest.raises(WorkerFailedError) as caught:
            run_world(4, jobs.killed, JOB, "tp=2,pp=2", "tp=4", phase, root, STEPS, timeout=90)
        return caught.value, root

    return run


@pytest.mark.parametrize("phase", ["gather", "plan", "groups", "build", "move", "commit"])
def test_tx10_a_killed_worker_is_a_named_error_within_30_seconds(broken, phase):
    failure, _ = broken(phase)
    assert failure.failures.keys() == {1}, str(failure)
    assert failure.failures[1] == "killed by signal 9"
    for said, seconds in failure.results.values():
        assert seconds < 30
        assert re.match(r"(Runtime|DistNetwork|DistStore|DistBackend|Timeout)\w*Error: ", said), said


@pytest.mark.parametrize("phase", ["move", "commit"])
def test_tx14_the_survivors_resume_from_replicas_in_another_layout(broken, steady, phase):
    # Host 1 is gone with its worker: its state is on host 2.
    _, root = broken(phase)
    shutil.rmtree(root / "host1")
    results = run_world(
        3, jobs.resumed, JOB, "tp=1,pp=1,dp=3", root, 4, ["host0", "host2", "host3"], timeout=90
    )
    for iteration, curve in results:
        assert iteration == STEPS
        assert max(abs(a[0] - b) for a, b in zip(curve, steady[STEPS:], strict=False)) <= 2e-6


def test_tx13_a_corrupt_replica_is_left_out_and_the_other_copy_used(broken, steady):
    _, root = broken("plan")
    for file in sorted((root / "host2" / f"{STEPS:012d}").glob("*/data.bin")):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    hosts = ["host0", "host1", "host2", "host3"]
    results = run_world(4, jobs.resumed, JOB, "tp=4", root, 3, hosts, timeout=90)
    for _, curve in results:
        assert max(abs(a[0] - b) for a, b in zip(curve, steady[STEPS:], strict=False)) <= 2e-6


def test_tx14_too_many_lost_hosts_are_an_error_that_names_the_range(broken):
    _, root = broken("gather")
    with pytest.raises(WorkerFailedError) as caught:
        run_world(1, jobs.resumed, JOB, "dp=1", root, 1, ["host0"], timeout=60)
    assert "UncoveredRangeError: no holder for" in caught.value.failures[0]

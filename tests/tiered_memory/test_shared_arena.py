"""An arena that several processes share (TM-02)."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from tiered_memory import PinnedArena

READ_AND_WRITE = """
import sys, torch
from tiered_memory import PinnedArena
arena = PinnedArena.attach(int(sys.argv[1]))
table = arena.empty((4, 8), torch.float32)
print(table.sum().item())
table[1] = -1
arena.buffer[-1] = 77
"""


def run_child(code: str, fd: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(fd)], pass_fds=[fd], capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("nbytes", [10_001, 2 << 20, 5 << 20])
def test_tm02_another_process_reads_and_writes_the_same_bytes(nbytes):
    with PinnedArena(nbytes, shared=True, pinned=False) as arena:
        assert arena.fd is not None
        assert arena.nbytes == nbytes
        table = arena.empty((4, 8), torch.float32)
        table.copy_(torch.arange(32.0).view(4, 8))
        done = run_child(READ_AND_WRITE, arena.fd)
        assert float(done.stdout) == 496.0
        assert table[1].tolist() == [-1.0] * 8
        assert int(arena.buffer[-1]) == 77
    assert arena.fd is None


def test_tm02_the_descriptor_travels_over_a_socket():
    here, there = socket.socketpair()
    with PinnedArena(4096, shared=True) as arena:
        arena.buffer.fill_(5)
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [arena.fd]))])
        _, ancillary, _, _ = there.recvmsg(1, socket.CMSG_LEN(4))
        received = array.array("i", ancillary[0][2])[0]
        other = PinnedArena.attach(received)
        os.close(received)
        assert int(other.buffer.sum()) == 5 * 4096
    # The arena it came from is gone; the attached one stays valid.
    other.buffer[0] = 9
    assert int(other.buffer.sum()) == 5 * 4095 + 9
    tensor = other.empty(10)
    other.close()
    other.close()
    assert int(tensor[0]) == 9
    here.close()
    there.close()


def test_tm02_a_killed_process_leaves_no_file_and_the_others_stay_valid():
    code = (
        "import sys, time\n"
        "from tiered_memory import PinnedArena\n"
        "arena = PinnedArena.attach(int(sys.argv[1]))\n"
        "arena.buffer[1] = 42\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    before = set(os.listdir("/dev/shm"))
    with PinnedArena(1 << 20, shared=True) as arena:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(arena.fd)],
            pass_fds=[arena.fd],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert int(arena.buffer[1]) == 42
        arena.buffer.fill_(1)
        assert int(arena.buffer.sum()) == 1 << 20
    assert {name for name in set(os.listdir("/dev/shm")) - before if "tiered" in name} == set()


def test_tm02_no_descriptor_is_left():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with PinnedArena(4096, shared=True):
        pass
    before = descriptors()
    for _ in range(20):
        with PinnedArena(4096, shared=True) as arena, PinnedArena.attach(arena.fd) as other:
            other.buffer.fill_(3)
    if not torch.cuda.is_available():
        for _ in range(5):
            with pytest.raises(RuntimeError, match="no CUDA device"):
                PinnedArena(4096, shared=True, pinned=True)
    assert descriptors() == before


def test_tm02_errors(tmp_path):
    assert PinnedArena(64).fd is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        PinnedArena.attach(9999)
    with (tmp_path / "empty").open("w+b") as file, pytest.raises(OSError, match="holds no shared memory"):
        PinnedArena.attach(file.fileno())


@pytest.mark.gpu
def test_tm02_both_registrations_serve_a_kernel():
    from tiered_memory import gather_rows

    code = (
        "import sys, torch\n"
        "from tiered_memory import PinnedArena, gather_rows\n"
        "arena = PinnedArena.attach(int(sys.argv[1]), pinned=True)\n"
        "table = arena.empty((64, 4), torch.int64)\n"
        "print(int(gather_rows(table, torch.tensor([63, 0], device='cuda')).sum()))\n"
    )
    with PinnedArena(1 << 20, shared=True, pinned=True) as arena:
        table = arena.empty((64, 4), torch.int64)
        table.copy_(torch.arange(256).view(64, 4))
        assert arena.fd is not None
        expected = int(table[[63, 0]].sum())
        assert int(gather_rows(table, torch.tensor([63, 0], device="cuda")).sum()) == expected
        assert int(run_child(code, arena.fd).stdout) == expected

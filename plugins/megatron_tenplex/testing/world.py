"""Several workers as forked processes of one test."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class WorkerFailedError(RuntimeError):
    """A worker raised, died or did not finish.

    Attributes:
        failures: worker -> traceback, ``"killed by signal N"`` or ``"timeout"``.
        results: worker -> what it returned, of those that did.
    """

    def __init__(self, failures: dict[int, str], results: dict[int, Any]) -> None:
        self.failures, self.results = failures, results
        super().__init__("\n".join(f"worker {w}: {text}" for w, text in sorted(failures.items())))


def run_world(num_workers: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """``[function(store, worker, num_workers, *args) for each worker]``, each in a forked process.

    Fork, because importing Megatron takes longer than most tests; the store lives in the calling process.

    Raises:
        WorkerFailedError: with all tracebacks. Workers still running at ``timeout`` seconds are killed.
    """
    # The store starts after the forks: its thread could hold a lock that a child would then wait for.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pids = {
            w: _fork(w, listener, Path(folder), timeout, lambda s, w: function(s, w, num_workers, *args))
            for w in range(num_workers)
        }
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
            master_listen_fd=listener.detach(),
        )
        failures = _wait(pids, time.monotonic() + timeout, Path(folder))
        del store
        results: dict[int, Any] = {}
        for worker in pids:
            path = Path(folder) / str(worker)
            if path.exists():
                # Written by our own child a moment ago.
                ok, value = pickle.loads(path.read_bytes())
                if ok:
                    results[worker] = value
                else:
                    failures[worker] = value
            else:
                failures.setdefault(worker, "ended without a result")
    if failures:
        raise WorkerFailedError(failures, results)
    return [results[worker] for worker in range(num_workers)]


def _fork(
    worker: int,
    listener: socket.socket,
    folder: Path,
    timeout: float,
    function: Callable[[dist.Store, int], Any],
) -> int:
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # collecting the parent's stores here would wait for threads that a fork does not copy
    code = 1
    try:
        # A fork copies no OpenMP threads, and waits for them if it thinks that it has them. Not
        # ``torch.set_num_threads``, which a vLLM engine for CPUs in the parent replaces by nothing.
        torch._C.set_num_threads(1)
        port = listener.getsockname()[1]
        listener.close()
        stack = open(folder / f"{worker}.stack", "w")  # noqa: SIM115 - faulthandler writes to it later
        faulthandler.dump_traceback_later(0.9 * timeout, file=stack)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        try:
            result = (True, function(store, worker))
            code = 0
        except BaseException:
            result = (False, traceback.format_exc())
        temporary = folder / f"{worker}.part"
        temporary.write_bytes(pickle.dumps(result))
        temporary.rename(folder / str(worker))
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # dist_checkpointing keeps a process that would outlive us
        os._exit(code)


def _wait(pids: dict[int, int], deadline: float, folder: Path) -> dict[int, str]:
    failures: dict[int, str] = {}
    running = dict(pids)
    while running:
        for worker, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[worker]
                if os.WIFSIGNALED(status):
                    failures[worker] = f"killed by signal {os.WTERMSIG(status)}"
        if running and time.monotonic() > deadline:
            for worker, pid in running.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                stack = folder / f"{worker}.stack"
                failures[worker] = f"timeout\n{stack.read_text() if stack.exists() else ''}"
            break
        time.sleep(0.02)
    return failures

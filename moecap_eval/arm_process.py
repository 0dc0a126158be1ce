"""The runner's handle on one arm: start its process, ask, wait with a limit, end it for certain."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLOSE_TIMEOUT_S = 30.0
LOG_LINES = 5


class ArmFailure(RuntimeError):
    """An arm raised, died or ran out of time. ``user_error`` marks an option or path the user can mend."""

    def __init__(self, message: str, *, user_error: bool = False) -> None:
        super().__init__(message)
        self.user_error = user_error


class ArmProcess:
    """``python -m moecap_eval.worker`` in a session of its own.

    The session makes the arm and all its descendants one process group, which is killed as a whole; it also
    keeps a terminal's Ctrl-C from them. If this process is killed, the worker sees its command pipe close.
    """

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self._log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        command_read, command_write = os.pipe()
        reply_read, reply_write = os.pipe()
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "moecap_eval.worker", str(command_read), str(reply_write)],
                pass_fds=(command_read, reply_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        os.close(command_read)
        os.close(reply_write)
        self._commands = os.fdopen(command_write, "w", encoding="utf-8")
        self._reply_fd = reply_read
        self._buffer = bytearray()

    @property
    def pid(self) -> int:
        """Process id, which is also the process group's."""
        return self._process.pid

    def ask(self, command: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a command and wait for its reply.

        Raises:
            ArmFailure: the arm raised, ended or did not answer in time; it has then been killed.
        """
        try:
            self._commands.write(json.dumps(command, ensure_ascii=False) + "\n")
            self._commands.flush()
        except (BrokenPipeError, OSError):
            raise self._died() from None
        reply = self._read_reply(timeout_s)
        if reply["event"] == "error":
            self.kill()
            where = "" if reply["user_error"] else f" (log: {self._log_path})"
            raise ArmFailure(f"{reply['message']}{where}", user_error=bool(reply["user_error"]))
        return reply

    def close(self) -> None:
        """Let the arm release what it holds, then end it; nothing happens to one that has ended."""
        if self._reply_fd < 0:
            return
        with contextlib.suppress(ArmFailure):
            self.ask({"command": "close"}, CLOSE_TIMEOUT_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the arm and everything it started, at once; nothing happens to one that has ended."""
        if self._reply_fd < 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            self._commands.close()
        os.close(self._reply_fd)
        self._reply_fd = -1

    def _read_reply(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._reply_fd, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.kill()
                    raise ArmFailure(f"no answer within {timeout_s:g} s{self._log_tail()}")
                chunk = os.read(self._reply_fd, 1 << 20)
                if not chunk:
                    raise self._died()
                self._buffer += chunk
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        return dict(json.loads(line))

    def _died(self) -> ArmFailure:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        code = self._process.poll()
        self.kill()
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return ArmFailure(f"the process {how}{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        tail = [line.strip() for line in lines if line.strip()][-LOG_LINES:]
        return (
            f"; last lines of {self._log_path}: {' | '.join(tail)}" if tail else f" (log: {self._log_path})"
        )
